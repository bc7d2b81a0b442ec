"""The recipe: its schema, how it is read, and every problem of it found before anything runs.

Nothing here imports torch, transformers, datasets or trl.
"""
