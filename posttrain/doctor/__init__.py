"""The doctor: finds where tokenizer, template, configs, weights and data of a checkpoint disagree, and mends it."""
