"""A language-model head for CPUs: logits of supervised positions at once, instead of TRL's tiles.

TRL's fused head saves memory by computing every tile of logits twice and, off the GPU, scores masked
positions too. With small vocabularies on a CPU that memory is not what is short.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from peft import PeftModel
from trl.trainer.utils import FusedCausalLMOutput

_MOST_LOGITS = 1 << 26
"""Logits held at once (256 MiB in fp32); beyond it TRL's tiles are used."""
_SCALED = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Settings by which an architecture changes its logits after the head: left to TRL, which knows them."""


def use_plain_head(model: torch.nn.Module, squares: bool = False) -> bool:
    """Lets a model that TRL gave a fused head score tokens directly where that is faster; says whether it does.

    Calls with `fused_lm_head=True` get the same `FusedCausalLMOutput`, to rounding.

    Args:
        squares: also give `log_sum_sq_probs`, which WPO's weights need.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = base.config.get_text_config()
    changed = any(getattr(config, name, None) not in (None, 1.0) for name in _SCALED)
    routed = getattr(config, "output_router_logits", False)
    if next(base.parameters()).device.type != "cpu" or changed or routed:
        return False
    fused = base.forward

    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        many = 0 if labels is None else int((labels[:, 1:] != -100).sum()) * config.vocab_size
        if not fused_lm_head or "shift_labels" in kwargs or many > _MOST_LOGITS or kwargs.get("output_router_logits"):
            return fused(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        kwargs["use_cache"] = False
        hidden_BLD = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        return _score(self.get_output_embeddings(), hidden_BLD, labels[:, 1:], squares)

    base.forward = types.MethodType(forward, base)
    return True


def _score(
    head: torch.nn.Module, hidden_BLD: torch.Tensor, labels_BL: torch.Tensor, squares: bool
) -> FusedCausalLMOutput:
    """Scores the positions that have a label; N of them, V entries."""
    mask_BL = labels_BL != -100
    logits_NV = head(hidden_BLD[mask_BL]).float()
    targets_N = labels_BL[mask_BL]
    all_NV = torch.log_softmax(logits_NV, dim=-1)
    logps_N = all_NV.gather(1, targets_N[:, None])[:, 0]
    with torch.no_grad():
        fixed_NV = all_NV.detach()
        entropy_N = -(fixed_NV.exp() * fixed_NV).sum(dim=-1)
        squares_N = torch.logsumexp(2 * fixed_NV, dim=-1) if squares else None
        mean_N = logits_NV.detach().mean(dim=-1)
        top_N = fixed_NV.argmax(dim=-1) == targets_N

    def spread(values_N: torch.Tensor) -> torch.Tensor:
        return values_N.new_zeros(mask_BL.shape).masked_scatter(mask_BL, values_N)

    return FusedCausalLMOutput(
        loss=-logps_N.sum() / mask_BL.sum().clamp(min=1),
        log_probs=spread(logps_N),
        entropy=spread(entropy_N),
        log_sum_sq_probs=None if squares_N is None else spread(squares_N),
        mean_logits=spread(mean_N),
        is_top1=spread(top_N),
        label_mask=mask_BL,
    )
