"""The chat contract: templates, the one rendering path, and what a saved folder must agree on.

Nothing here imports torch, but for `tokenizer.load_any_tokenizer`.
"""
