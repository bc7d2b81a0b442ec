"""How large one forward pass may be: execution only, never identity."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

from posttrain.models.attention import ONE_ROW
from posttrain.training.sizes import PIECE_TOKENS, ROW_OF_DENSE_MASK


@dataclass(frozen=True)
class Limits:
    """Limits of a piece of an optimizer step."""

    tokens: int
    """Most tokens, padding included."""
    documents: int | None
    """Most documents or pairs."""
    row_tokens: int
    """Capacity of a packed row."""
    one_row: bool = False
    """A piece is one row: what its attention backend needs, or runs fastest on."""

    @property
    def packed_row(self) -> int:
        """Capacity of a row where sequences are packed inside a piece."""
        return sys.maxsize if self.one_row else self.row_tokens

    def halved(self, longest: int) -> Limits | None:
        """Half the tokens, but never less than the longest row or pair; None where that is reached."""
        tokens = max(self.tokens // 2, longest, 1)
        return replace(self, tokens=tokens, row_tokens=min(self.row_tokens, tokens)) if tokens < self.tokens else None


def piece_limits(
    device: str,
    micro_batch_tokens: int | None,
    micro_batch_size: int | None,
    attention: str = "sdpa",
    fitting: Callable[[int | None], int] | None = None,
) -> Limits:
    """Chooses the limits of a piece for a device.

    A backend that is given a dense mask gets short rows, since the mask is quadratic in them; the others
    get one long row.

    Args:
        fitting: capacity of a row (None: a piece is one) -> tokens that should fit the device's memory; asked on
            a GPU, where the recipe gives no number.
    """
    one_row, tokens = attention in ONE_ROW, micro_batch_tokens or PIECE_TOKENS[device]
    if fitting is not None and micro_batch_tokens is None and device == "cuda":
        tokens = min(tokens, fitting(None if one_row else ROW_OF_DENSE_MASK[device]))
    row_tokens = tokens if one_row else min(tokens, ROW_OF_DENSE_MASK[device])
    return Limits(tokens, micro_batch_size, row_tokens, one_row)
