"""What people read: the report of an evaluation and the model card."""
