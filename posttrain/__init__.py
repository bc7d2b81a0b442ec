"""One recipe from a foundational checkpoint to an instruct and an aligned model, every hand-off proved."""

__version__ = "0.1.0"
