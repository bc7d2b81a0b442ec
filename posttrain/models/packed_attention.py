"""Attention over packed rows on a CPU: each document by itself, so no pair of tokens that is masked costs anything.

torch's kernel for CPUs skips nothing under a mask, and half of the work where it is told that it is causal.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "packed_sdpa"
"""Its name among transformers' attention implementations."""
_Part = tuple[int, int]


def segments_mask(documents: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """What `packed_attention` takes instead of a mask for pairs that share a prefix.

    Args:
        documents, branches: [R, W] int64, see `posttrain.training.layout.Layout`.

    Returns:
        [R, 1, 2, W] int64: four axes, which transformers hands on as they are.
    """
    return torch.stack([documents, branches], dim=1)[:, None]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: torch.Tensor | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within documents, in the form that transformers' layers call.

    Args:
        query, key, value: [B, heads, T, size]; fewer heads of keys and values than of queries are repeated.
        attention_mask: None (`position_ids` tell where documents begin), or from `segments_mask`.
        settings: what other kinds of attention need: a window, sinks, a cap or a bias.

    Returns:
        [B, T, heads, size].

    Raises:
        ValueError: a kind of attention that this is not.
    """
    other = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if settings.get(name) is not None]
    if other or not getattr(module, "is_causal", True) or settings.get("is_causal") is False:
        raise ValueError(f"{PACKED} is plain causal attention, without {', '.join(other) or 'sight of later tokens'}")
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    rows = []
    for number, plan in enumerate(_plans(attention_mask, position_ids, query.shape)):
        one = slice(number, number + 1)
        rows.append(_row(query[one], key[one], value[one], plan, dropout, scaling))
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).transpose(1, 2), None


def _row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: list[_Part], dropout: float, scale: float | None
) -> torch.Tensor:
    """Attention of one row, [1, heads, T, size].

    Args:
        plan: (length, shared) of each part; a part with `shared` also sees so many first tokens of the part before it.
    """
    lengths = [length for length, _ in plan]
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), plan, strict=True)
    made: list[torch.Tensor] = []
    before: tuple[torch.Tensor, torch.Tensor] | None = None
    for own_query, own_key, own_value, (length, shared) in parts:
        mask = None
        if shared:
            assert before is not None
            own_key = torch.cat([before[0][:, :, :shared], own_key], 2)
            own_value = torch.cat([before[1][:, :, :shared], own_value], 2)
            mask = torch.ones(length, shared + length, dtype=torch.bool).tril(shared)
        made.append(
            scaled_dot_product_attention(
                own_query, own_key, own_value, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=mask is None
            )
        )
        before = (own_key, own_value)
    return made[0] if len(made) == 1 else torch.cat(made, 2)


def _plans(mask: torch.Tensor | None, positions: torch.Tensor | None, shape: torch.Size) -> list[list[_Part]]:
    """The parts of every row."""
    rows, _, width, _ = shape
    if mask is None:
        if positions is None:
            raise ValueError(f"{PACKED} needs position_ids")
        return [_by_borders((row.diff() != 1).nonzero()[:, 0].add(1).tolist(), width) for row in _all(positions, rows)]
    if mask.dtype != torch.int64 or mask.shape[1:] != (1, 2, width):
        raise ValueError(f"{PACKED} takes no attention mask")
    return [_by_branches(row[0, 0], row[0, 1]) for row in mask]


def _all(positions: torch.Tensor, rows: int) -> torch.Tensor:
    return positions.expand(rows, -1) if positions.shape[0] != rows else positions


def _by_borders(borders: list[int], width: int) -> list[_Part]:
    return [(end - start, 0) for start, end in zip([0, *borders], [*borders, width], strict=True)]


def _by_branches(documents: torch.Tensor, branches: torch.Tensor) -> list[_Part]:
    """Shared part and first branch are one part, which is causal as it stands; the second branch is another."""
    changed = (documents.diff() != 0) | ((branches.diff() != 0) & (branches[1:] > 1))
    borders = [0, *(changed.nonzero()[:, 0] + 1).tolist(), len(documents)]
    known = branches.tolist()
    plan: list[_Part] = []
    before = 0
    for start, end in pairwise(borders):
        shared = known.index(1, before) - before if known[start] > 1 else 0
        plan.append((end - start, shared))
        before = start
    return plan


AttentionInterface.register(PACKED, packed_attention)
