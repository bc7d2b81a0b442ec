"""Two models on the same rows: how far apart their logits are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from posttrain.errors import CheckpointError

Logits = Callable[[list[int]], torch.Tensor]
"""Token ids of one row -> logits (tokens, vocabulary), any float dtype and device."""
_IGNORE = -100
_TOKENS = 256  # of a row that are compared at once: their softmax is held in fp32


def compare_logits(
    reference: Logits, candidate: Logits, rows: list[list[int]], labels: list[list[int]] | None = None
) -> dict[str, Any]:
    """Compares two models row by row; nothing is kept between rows.

    Args:
        labels: per row, as long as its ids: the id where its loss counts, -100 elsewhere.

    Returns:
        `max_difference`, `mean_difference`: absolute, over all logits.
        `relative_error`: |candidate - reference| / |reference|, Frobenius over all rows.
        `mean_kl`, `max_kl`: KL(reference || candidate), nats per token.
        `top1_agreement`: share of tokens whose most probable next token is the same.
        `reference_loss`, `loss`: mean cross-entropy of both in nats; None without labelled tokens.
        `tokens`, `rows`: what was compared.

    Raises:
        ValueError: no row, or an empty one; or logits of different shapes.
    """
    if not rows or not all(rows):
        raise ValueError("compare_logits needs rows of at least one token")
    largest = difference = squared = norm = kl = worst_kl = 0.0
    agree = tokens = values = labelled = 0
    losses = [0.0, 0.0]
    for number, ids in enumerate(rows):
        expected, found = reference(ids), candidate(ids)
        if expected.shape != found.shape:
            raise ValueError(f"logits of shape {tuple(expected.shape)} and {tuple(found.shape)}")
        targets = torch.tensor([*(labels[number] if labels else [_IGNORE] * len(ids))[1:], _IGNORE])
        labelled += int((targets != _IGNORE).sum())
        pieces = zip(expected.split(_TOKENS), found.split(_TOKENS), targets.split(_TOKENS), strict=True)
        for p, q, target in pieces:
            p, q = p.float().cpu(), q.float().cpu()
            gap = (q - p).abs()
            largest = _max(largest, gap.max().item())
            difference += gap.sum(dtype=torch.float64).item()
            squared += gap.double().square().sum().item()
            norm += p.double().square().sum().item()
            per_token = _kl(p, q)
            kl += per_token.sum(dtype=torch.float64).item()
            worst_kl = _max(worst_kl, per_token.max().item())
            agree += int((p.argmax(-1) == q.argmax(-1)).sum())
            tokens, values = tokens + len(p), values + p.numel()
            for side, logits in enumerate((p, q)):
                losses[side] += cross_entropy(logits, target, ignore_index=_IGNORE, reduction="sum").item()
    return {
        "max_difference": largest,
        "mean_difference": difference / values,
        "relative_error": math.sqrt(squared / norm) if norm else math.sqrt(squared),
        "mean_kl": kl / tokens,
        "max_kl": worst_kl,
        "top1_agreement": agree / tokens,
        "reference_loss": losses[0] / labelled if labelled else None,
        "loss": losses[1] / labelled if labelled else None,
        "tokens": tokens,
        "rows": len(rows),
    }


def _max(one: float, other: float) -> float:
    return other if math.isnan(other) or other > one else one  # NaN must not be lost in a comparison


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(softmax p || softmax q) per token, which rounding would take a little below zero."""
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)  # NaN stays NaN


def logits_of(model: nn.Module) -> Logits:
    """The logits of a causal language model in its present mode and on its own device, without gradients."""
    device = next(model.parameters()).device

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]

    return logits


def load_merged(
    folder: Path, dtype: torch.dtype, device: str | torch.device = "cpu", attn_implementation: str = "sdpa"
) -> nn.Module:
    """Loads a merged folder as plain transformers does, in eval mode.

    Raises:
        CheckpointError: weights that are missing, left over or of another shape.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attn_implementation,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise CheckpointError(str(folder), f"transformers does not load it whole: {wrong}", "merge again")
    return model.to(device).eval()
