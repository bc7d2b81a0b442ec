"""From a recipe to its artifacts: what runs, what is skipped, what is refused and why; then running it."""
