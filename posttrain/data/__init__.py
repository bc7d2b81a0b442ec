"""Readers of every dataset shape, seeded splits, and the token ledger: rows in, rows accounted for."""
