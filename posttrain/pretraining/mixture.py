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


def epoch_rows(shares: list[Share], seed: int, epoch: int) -> np.ndarray:
    """Draws the rows of one epoch, in training order.

    Whole copies of a source come first, the rest is a window over a fixed permutation that moves on with
    every epoch: a source at weight 0.5 is seen exactly once in two epochs.

    Returns:
        [sum(wanted), 2] int64: source index and row index within the source.
    """
    drawn = []
    for number, share in enumerate(shares):
        if not share.available:
            continue
        whole, rest = divmod(share.wanted, share.available)
        permutation = stream(seed, 1, number).permutation(share.available)
        window = permutation[(np.arange(rest) + epoch * rest) % share.available]
        rows = np.concatenate([np.tile(np.arange(share.available), whole), window]).astype(np.int64)
        drawn.append(np.stack([np.full(len(rows), number, dtype=np.int64), rows], axis=1))
    everything = np.concatenate(drawn) if drawn else np.empty((0, 2), dtype=np.int64)
    return everything[stream(seed, 2, epoch).permutation(len(everything))]
