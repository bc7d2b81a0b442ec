"""Groups of rows, taken in an order that only a seed and what the rows share decide."""

from __future__ import annotations

import hashlib

import numpy as np

SIZE = 16
"""Bytes of a digest that are kept: of 10 million rows, two alike by chance are not to be met."""
_NEAR = 64


def seeded_digest(seed: int, key: bytes) -> bytes:
    """The first `SIZE` bytes of the SHA-256 of a seed and what a group shares."""
    return hashlib.sha256(b"%d\0%s" % (seed, key)).digest()[:SIZE]


def take_groups(digests: bytes | bytearray, room: int) -> np.ndarray:
    """Takes each group in turn that still fits into `room` rows, and skips one that would overflow.

    Args:
        digests: of all rows, end to end; rows of one digest are a group, and groups come in digests' order.

    Returns:
        [rows] bool: which rows were taken.
    """
    halves = np.frombuffer(digests, dtype=">u8").reshape(-1, 2)
    taken = np.zeros(len(halves), dtype=bool)
    near = (room + 1) * _NEAR
    if near < len(halves):  # few are wanted of many: mostly they are found among the first, and sorting is spared
        first = halves[:, 0].astype(np.uint64)
        begin = np.flatnonzero(first <= np.partition(first, near)[near])
        found = _take(halves[begin], room)
        if found.sum() == room:
            taken[begin[found]] = True
            return taken
    return _take(halves, room)


def times_before(digests: bytes | bytearray) -> np.ndarray:
    """How many rows of the same digest stand before each row, [rows] int64."""
    order, begins, sizes = _grouped(np.frombuffer(digests, dtype=">u8").reshape(-1, 2))
    times = np.empty(len(order), dtype=np.int64)
    times[order] = np.arange(len(order)) - np.repeat(begins, sizes)
    return times


def _take(halves: np.ndarray, room: int) -> np.ndarray:
    order, _, sizes = _grouped(halves)
    taken = np.zeros(len(halves), dtype=bool)
    taken[order] = np.repeat(_that_fit(sizes, room), sizes)
    return taken


def _grouped(halves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows in order of digests (those of one group in their own order), where groups begin, and their sizes."""
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    changes = (ordered[1:] != ordered[:-1]).any(axis=1)
    begins = np.flatnonzero(np.append(True, changes)) if len(ordered) else np.empty(0, dtype=np.int64)
    return order, begins, np.diff(begins, append=len(ordered))


def _that_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """Which groups fit, one after the other; every pass is done with all groups of at least one size."""
    fits = np.zeros(len(sizes), dtype=bool)
    left = np.arange(len(sizes))
    while len(left := left[sizes[left] <= room]):
        held = np.cumsum(sizes[left])
        count = int(np.searchsorted(held, room, side="right"))
        fits[left[:count]] = True
        room -= int(held[count - 1])
        left = left[count:]
    return fits
