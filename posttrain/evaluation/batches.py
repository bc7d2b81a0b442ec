"""Rows of like length together, so that a batch holds little padding."""

from __future__ import annotations

from collections.abc import Sequence


def by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Groups row numbers, longest first, so that rows times longest row stays within `batch_tokens`.

    Every row is in exactly one batch; a row longer than `batch_tokens` gets a batch of its own. The longest
    come first, so that a batch too large for the memory fails at once and not after an hour.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    for row in order:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
