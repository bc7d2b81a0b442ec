"""Scores of models on held-out rows: likelihood, generated answers, and what the differences are worth."""
