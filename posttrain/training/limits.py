"""How large one forward pass may be: execution only, never identity."""

from __future__ import annotations

from dataclasses import dataclass

_TOKENS = {"cpu": 4096, "cuda": 16384}
_ROW_ON_CPU = 256


@dataclass(frozen=True)
class Limits:
    """Limits of a piece of an optimizer step."""

    tokens: int
    """Most tokens, padding included."""
    documents: int | None
    """Most documents or pairs."""
    row_tokens: int
    """Capacity of a packed row."""


def piece_limits(device: str, micro_batch_tokens: int | None, micro_batch_size: int | None) -> Limits:
    """Chooses the limits of a piece for a device.

    On a CPU attention builds a dense mask per row, quadratic in its length, so rows stay short; on a GPU
    one long row keeps the kernels that need a batch of one.
    """
    tokens = micro_batch_tokens or _TOKENS[device]
    return Limits(tokens, micro_batch_size, min(tokens, _ROW_ON_CPU) if device == "cpu" else tokens)
