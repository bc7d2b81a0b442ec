"""Measured proofs of hand-offs: merged files against the adapter in use, the DPO reference at step 0."""
