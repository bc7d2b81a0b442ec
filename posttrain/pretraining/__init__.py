"""The reused spine: tokenizer, model, mixture, order, packing, and one training loop for every stage."""
