"""Which rows of which source make one epoch: exact, seeded, and stable."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Share:
    """How often a source's rows are seen in one epoch: by weight, or by an exact number of rows."""

    available: int
    """Rows the source has."""
    weight: float = 1.0
    """0.5 halves the source, 2.0 doubles it."""
    rows: int | None = None
    """Exact rows per epoch; takes the place of `weight`."""

    @property
    def wanted(self) -> int:
        """Rows of one epoch (halves round up, so that a small source is never lost)."""
        return self.rows if self.rows is not None else int(np.floor(self.available * self.weight + 0.5))


def stream(seed: int, *path: int) -> np.random.Generator:
    """A random generator that depends on the seed and a path of numbers, and on nothing else."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, *path])))


def rows_drawn(share: Share, number: int, seed: int, epoch: int) -> np.ndarray:
    """Draws the rows that one epoch takes from source `number`, not yet shuffled: [wanted] int64.

    Whole copies of a source come first, the rest is a window over a fixed permutation that moves on with
    every epoch: a source at weight 0.5 is seen exactly once in two epochs.
    """
    if not share.available:
        return np.empty(0, dtype=np.int64)
    whole, rest = divmod(share.wanted, share.available)
    copies = np.tile(np.arange(share.available, dtype=np.int64), whole)
    if not rest:
        return copies
    permutation = stream(seed, 1, number).permutation(share.available)
    return np.concatenate([copies, permutation[(np.arange(rest) + epoch * rest) % share.available]])


def epoch_rows(shares: list[Share], seed: int, epoch: int) -> np.ndarray:
    """Draws the rows of one epoch, in training order, see `rows_drawn`.

    Returns:
        [sum(wanted), 2] int64: source index and row index within the source.
    """
    drawn = [rows_drawn(share, number, seed, epoch) for number, share in enumerate(shares)]
    sizes = [len(rows) for rows in drawn]
    order = stream(seed, 2, epoch).permutation(sum(sizes))
    items = np.empty((len(order), 2), dtype=np.int64)
    items[:, 0] = np.repeat(np.arange(len(sizes)), sizes)[order]
    items[:, 1] = (np.concatenate(drawn) if drawn else order)[order]
    return items
