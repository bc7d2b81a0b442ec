"""Rows kept back from training, on which certificates compare models later."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

DEFAULT = 16
"""Rows held out where nobody asks for a number, from sets of `DEFAULT * FEWEST` rows on."""
FEWEST = 100
"""Rows for each one held out by default: a smaller set is trained on whole."""


def held_out_count(asked: int | None, rows: int) -> int:
    """Rows to hold out: as many as asked, else 16 and at most 1 %, which is none of a set below 100 rows."""
    return min(DEFAULT, rows // FEWEST) if asked is None else asked


def choose_held_out(prompts: Sequence[bytes], count: int, seed: int) -> set[int]:
    """Returns the indices of at most `count` rows whose prompts no other row has.

    Rows of one prompt stay together. Groups are ordered by SHA-256 of seed and prompt, which does not depend on
    the order of rows; each in turn that still fits is held out, so it is exactly `count` rows wherever enough
    prompts have one row.
    """
    groups: dict[bytes, list[int]] = {}
    for index, prompt in enumerate(prompts if count else ()):
        groups.setdefault(hashlib.sha256(b"%d\0%s" % (seed, prompt)).digest(), []).append(index)
    held: set[int] = set()
    for digest in sorted(groups):
        if len(held) + len(groups[digest]) <= count:
            held.update(groups[digest])
    return held
