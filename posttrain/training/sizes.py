"""Sizes of a piece where nobody says otherwise, by device; no torch, so that an estimate can read them."""

from __future__ import annotations

PIECE_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a piece."""
ROW_OF_DENSE_MASK = {"cpu": 256, "cuda": 2048}
"""Tokens of a packed row where attention is given a dense mask, which is quadratic in them."""
