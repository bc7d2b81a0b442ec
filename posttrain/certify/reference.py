"""DPO at step 0: the policy is its own reference, so ratios are 0 and the loss is known beforehand."""

from __future__ import annotations

import math
from collections.abc import Sequence

THRESHOLDS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
"""Largest |policy - reference| per token log-prob at step 0, by compute dtype."""
LOG2 = math.log(2)


def step_zero_problems(
    policy_logps: Sequence[float],
    ref_logps: Sequence[float],
    token_counts: Sequence[int],
    dtype: str,
) -> list[str]:
    """Names the sequences of the first batch on which the policy is not its reference.

    Args:
        policy_logps, ref_logps: log-probs summed over each answer, chosen and rejected alike.
        token_counts: supervised tokens of each answer.
        dtype: compute dtype, a key of `THRESHOLDS`.

    Raises:
        ValueError: lengths differ, nothing to compare, or an unknown dtype.
    """
    if not len(policy_logps) == len(ref_logps) == len(token_counts):
        raise ValueError("policy, reference and token counts are of different length")
    if not token_counts or dtype not in THRESHOLDS:
        raise ValueError(f"nothing to compare, or unknown dtype {dtype!r}")
    problems = []
    for row, (policy, reference, tokens) in enumerate(zip(policy_logps, ref_logps, token_counts, strict=True)):
        if tokens < 1:
            problems.append(f"sequence {row}: no supervised token")
            continue
        gap = abs(policy - reference) / tokens
        if not gap < THRESHOLDS[dtype]:  # so that NaN is a problem too
            problems.append(
                f"sequence {row}: policy {policy:.6f} and reference {reference:.6f} differ by {gap:.2e} per token "
                f"over {tokens} tokens, {THRESHOLDS[dtype]:g} is allowed in {dtype}"
            )
    return problems


def loss_at_zero(
    loss_types: Sequence[str],
    weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    use_weighting: bool = False,
    aux_loss: bool = False,
) -> float | None:
    """The loss of TRL 1.16's DPOTrainer when policy and reference agree, or None where it depends on the data.

    The f-divergence, `ld_alpha` and DiscoPOP's temperature have no part in it: all scores are 0 at ratio 0.

    Args:
        loss_types, weights: as in DPOConfig; absent weights are 1.
        use_weighting: WPO multiplies by the policy's own probabilities, which are data.
        aux_loss: a mixture of experts adds its router loss, which is data.

    Raises:
        ValueError: an unknown loss type, or lists of different lengths.
    """
    given = list(weights) if weights is not None else [1.0] * len(loss_types)
    if len(given) != len(loss_types):
        raise ValueError(f"{len(loss_types)} loss types, {len(given)} weights")
    values = [_value_at_zero(name, beta, label_smoothing) for name in loss_types]
    if use_weighting or aux_loss or any(value is None and weight for value, weight in zip(values, given, strict=True)):
        return None
    return sum(weight * value for value, weight in zip(values, given, strict=True) if value is not None)


def _value_at_zero(name: str, beta: float, label_smoothing: float) -> float | None:
    """One loss type at ratio 0; each formula is that of `trl/trainer/dpo_trainer.py` with every ratio 0."""
    if name in ("sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired"):
        return LOG2  # -log sigmoid(0); label smoothing weighs two equal terms
    if name == "hinge":
        return 1.0  # relu(1 - 0)
    if name == "ipo":
        return 1 / (2 * beta) ** 2  # (0 - 1 / 2 beta)^2
    if name == "exo_pair":  # KL((1/2, 1/2) || (1 - e, e))
        return -LOG2 - (math.log1p(-label_smoothing) + math.log(label_smoothing)) / 2 if label_smoothing else math.inf
    if name in ("nca_pair", "bco_pair"):
        return 2 * LOG2
    if name == "sppo_hard":
        return 2 * (0.5 / beta) ** 2
    if name in ("apo_zero", "apo_down"):
        return 1.0  # 1/2 + 1/2
    if name == "discopop":
        return (LOG2 + 1) / 2  # half logistic, half exponential
    if name == "sft":
        return None
    raise ValueError(f"unknown loss type {name!r}")
