"""Rows kept back from training, on which certificates compare models later."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from posttrain.data.groups import seeded_digest, take_groups

DEFAULT = 16
"""Rows held out where nobody asks for a number, from sets of `DEFAULT * FEWEST` rows on."""
FEWEST = 100
"""Rows for each one held out by default: a smaller set is trained on whole."""


def held_out_count(asked: int | None, rows: int) -> int:
    """Rows to hold out: as many as asked, else 16 and at most 1 %, which is none of a set below 100 rows."""
    return min(DEFAULT, rows // FEWEST) if asked is None else asked


def choose_held_out(prompts: Iterable[bytes], count: int, seed: int) -> set[int]:
    """Returns the indices of at most `count` rows whose prompts no other row has.

    Rows of one prompt stay together. Groups are ordered by SHA-256 of seed and prompt, which does not depend on
    the order of rows; each in turn that still fits is held out, so it is exactly `count` rows wherever enough
    prompts have one row. The prompts are read once, and none is kept.
    """
    if not count:
        return set()
    digests = bytearray()
    for prompt in prompts:
        digests += seeded_digest(seed, prompt)
    return set(np.flatnonzero(take_groups(digests, count)).tolist())
