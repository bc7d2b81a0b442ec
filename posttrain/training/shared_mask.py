"""Attention masks for pairs that share a prefix, in the form that each attention backend takes.

A token sees what stands before it in its own document: the shared part, and its own branch; never the
other branch. All take `documents` and `branches`, [R, W] int64, as `layout.Layout` has them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from posttrain.models.packed_attention import PACKED, segments_mask
from posttrain.training.layout import SHARED
from posttrain.training.packed_view import MaskMaker


def bool_mask(documents: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """For sdpa: [R, 1, W, W] bool, True where a query (third axis) sees a key (fourth)."""
    width = documents.shape[1]
    same = documents[:, :, None] == documents[:, None, :]
    sees = (branches[:, None, :] == SHARED) | (branches[:, :, None] == branches[:, None, :])
    before = torch.ones(width, width, dtype=torch.bool, device=documents.device).tril()
    return (same & sees & before)[:, None]


def float_mask(documents: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """For eager attention, which adds it to the scores: [R, 1, W, W] fp32, 0 or the least number."""
    seen = bool_mask(documents, branches)
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, torch.finfo(torch.float32).min)


def block_mask(documents: torch.Tensor, branches: torch.Tensor) -> Any:
    """For flex_attention: a `BlockMask`; blocks that no query sees cost nothing."""

    def sees(batch: Any, head: Any, query: Any, key: Any) -> Any:
        own = (branches[batch, key] == SHARED) | (branches[batch, key] == branches[batch, query])
        return (documents[batch, key] == documents[batch, query]) & own & (key <= query)

    rows, width = documents.shape
    return _create_block_mask()(sees, rows, None, width, width, documents.device)


@functools.cache
def _create_block_mask() -> Any:
    """Compiled, or it would hold several [W, W] tables at once; kept, so that rows of one width compile once."""
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


MASKS: dict[str, MaskMaker] = {
    PACKED: segments_mask,
    "sdpa": bool_mask,
    "eager": float_mask,
    "flex_attention": block_mask,
}
"""Attention backends that take a mask of ours; flash attention takes none."""
