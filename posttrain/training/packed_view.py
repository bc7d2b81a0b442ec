"""A view of a model that takes padded sequences and runs them packed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from posttrain.pretraining.packing import pack_best_fit
from posttrain.pretraining.rows import IGNORE


@dataclass(frozen=True)
class PackedView:
    """Calls a model with a fused LM head on packed rows, and gives the outputs back in the padded shape.

    No attention mask and no cache are used: position ids alone keep the sequences apart. Padding costs
    nothing beyond the tail of a packed row.

    Args:
        model: takes `input_ids, position_ids, labels, fused_lm_head, use_cache`.
        row_tokens: capacity of a packed row; raised to the longest sequence.
    """

    model: Any
    row_tokens: int

    def __call__(self, input_ids, attention_mask, labels, fused_lm_head: bool = True, **kwargs) -> Any:
        """Args: `input_ids`, `attention_mask` (right padded), `labels`: [B, L] int64.

        Returns:
            The model's output with per-token fields [B, L - 1]; zero where there is no label.
        """
        lengths = attention_mask.sum(dim=1).tolist()
        rows = pack_best_fit(lengths, max(self.row_tokens, *lengths))
        width = max(sum(lengths[i] for i in row) for row in rows)
        shape, device = (len(rows), width), input_ids.device
        packed_ids = torch.zeros(shape, dtype=input_ids.dtype, device=device)
        packed_labels = torch.full(shape, IGNORE, dtype=labels.dtype, device=device)
        positions = torch.zeros(shape, dtype=torch.long, device=device)
        places: dict[int, tuple[int, int]] = {}
        for number, row in enumerate(rows):
            at = 0
            for index in row:
                end = at + lengths[index]
                packed_ids[number, at:end] = input_ids[index, : lengths[index]]
                packed_labels[number, at + 1 : end] = labels[index, 1 : lengths[index]]
                positions[number, at:end] = torch.arange(lengths[index], device=device)
                places[index] = (number, at)
                at = end
            positions[number, at:] = torch.arange(width - at, device=device)
        kwargs.pop("use_cache", None)
        outputs = self.model(
            input_ids=packed_ids,
            position_ids=positions,
            labels=packed_labels,
            fused_lm_head=fused_lm_head,
            use_cache=False,
            **kwargs,
        )
        return _unpack(outputs, places, lengths, input_ids.size(1) - 1)


def _unpack(outputs: Any, places: dict[int, tuple[int, int]], lengths: list[int], width: int) -> Any:
    """Moves the per-token fields [rows, L - 1] of an output back to [sequences, width]."""

    def move(field: torch.Tensor) -> torch.Tensor:
        parts = []
        for index in range(len(lengths)):
            row, at = places[index]
            part = field[row, at : at + lengths[index] - 1]
            parts.append(torch.nn.functional.pad(part, (0, width - len(part))))
        return torch.stack(parts)

    names = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask")
    present = {field.name for field in fields(outputs)}
    moved = {name: move(value) for name in names if name in present and (value := getattr(outputs, name)) is not None}
    return replace(outputs, **moved)
