"""Models: where they come from, how they are loaded, what they stand on, and whether their files are whole."""
