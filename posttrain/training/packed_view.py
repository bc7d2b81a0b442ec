"""A view of a model that takes padded sequences and runs them packed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from posttrain.training.layout import lay_out

MaskMaker = Callable[[torch.Tensor, torch.Tensor], Any]
"""(documents, branches), both [R, W] int64 -> the attention mask a backend takes; see `shared_mask`."""
BLOCK = 128
"""Rows that go with a mask are filled up to a multiple of it on a GPU: FlexAttention works in blocks of it."""
_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")


@dataclass(frozen=True)
class PackedView:
    """Calls a model with a fused LM head on packed rows, and gives the outputs back in the padded shape.

    Plain, no attention mask and no cache are used: position ids alone keep the sequences apart. With
    `mask`, the second half of the batch are partners of the first: what both of a pair begin with runs once.

    Args:
        model: takes `input_ids, position_ids, labels, fused_lm_head, use_cache` (and `attention_mask`).
        row_tokens: capacity of a packed row; raised to the longest sequence.
        mask: makes the attention mask that lets branches see the shared part and themselves.
    """

    model: Any
    row_tokens: int
    mask: MaskMaker | None = None

    def __call__(self, input_ids, attention_mask, labels, fused_lm_head: bool = True, **kwargs) -> Any:
        """Args: `input_ids`, `attention_mask` (right padded), `labels`: [B, L] int64.

        Returns:
            The model's output with per-token fields [B, L - 1]; zero where there is no label.
        """
        device, share = input_ids.device, self.mask is not None
        multiple = BLOCK if share and device.type == "cuda" else 1
        ids, known = input_ids.cpu().numpy(), labels.cpu().numpy()
        layout = lay_out(ids, known, attention_mask.sum(dim=1).tolist(), self.row_tokens, share, multiple)

        def move(array: Any) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        if self.mask is not None:
            kwargs["attention_mask"] = self.mask(move(layout.documents), move(layout.branches))
        outputs = self.model(
            input_ids=move(layout.ids),
            position_ids=move(layout.positions),
            labels=move(layout.labels),
            fused_lm_head=fused_lm_head,
            **{**kwargs, "use_cache": False},
        )
        return _unpack(outputs, move(layout.sources))


def _unpack(outputs: Any, sources: torch.Tensor) -> Any:
    """Moves the per-token fields [R, W - 1] of an output back to [sequences, L - 1]; gradients of shared ones add."""
    has, index = sources >= 0, sources.clamp(min=0)

    def back(field: torch.Tensor) -> torch.Tensor:
        taken = field.reshape(-1)[index]
        return torch.where(has, taken, torch.zeros_like(taken))

    present = {field.name for field in fields(outputs)}
    moved = {name: back(value) for name in _FIELDS if name in present and (value := getattr(outputs, name)) is not None}
    return replace(outputs, **moved)
