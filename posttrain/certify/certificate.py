"""The certificate of a merge: the files on disk against the adapter in use, on held-out rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.artifact import sha256
from posttrain.certify.logits import compare_logits, load_merged, logits_of


@dataclass(frozen=True)
class Limits:
    """Largest differences that a merge may show; None = not checked."""

    relative_error: float | None = None
    """|merged - in use| / |in use| over all logits."""
    max_logit_difference: float | None = None
    """Absolute; depends on the scale of a model's logits, so there is no default."""
    mean_kl: float | None = None
    """Nats per token."""
    min_top1_agreement: float | None = None

    def over(self, given: Limits) -> Limits:
        """These limits, with those of `given` that are set in their place."""
        set_by_user = {name: value for name, value in asdict(given).items() if value is not None}
        return replace(self, **set_by_user)


def default_limits(dtype: str, quantised: bool, base_mode: str) -> Limits:
    """Limits some times above what was measured for a right merge, and below what a wrong one shows.

    Measured relative error, KL, top-1 on a small Llama: fp32 4e-7; 4-bit base dequantised 1.2e-3, 1.3e-5,
    0.997 (bitsandbytes' CPU kernels compute in bf16 in eval mode); bf16 throughout 3e-3 to 5e-3, 8e-5, 0.990;
    4-bit adapter put on the original base, which is another model, 1.9e-2, 3.1e-3, 0.954; wrong merges 0.3 to 1.2.
    Top-1 agreement is held loosely: near ties flip it, in untrained models above all.

    Args:
        dtype: the coarser one of the merged weights' and the compared policy's.
        quantised: whether the adapter was trained on a 4-bit base.
        base_mode: `original` or `dequantized`.
    """
    if quantised and base_mode == "original":
        return Limits(relative_error=0.1, mean_kl=0.05, min_top1_agreement=0.7)
    if dtype != "float32":
        return Limits(relative_error=0.03, mean_kl=2e-3, min_top1_agreement=0.8)
    if quantised:
        return Limits(relative_error=5e-3, mean_kl=2e-4, min_top1_agreement=0.95)
    return Limits(relative_error=1e-4, mean_kl=1e-6, min_top1_agreement=0.99)


@dataclass(frozen=True)
class Certificate:
    """What was measured, against which limits, and what does not hold."""

    merged: str
    dtype: str
    """Dtype in which both models computed."""
    logits: dict[str, Any]
    """See `compare_logits`."""
    limits: Limits
    failures: list[str]
    """Empty when the merge holds."""

    def as_dict(self) -> dict[str, Any]:
        """The certificate as plain JSON values."""
        return asdict(self)


def certify_merge(
    merged: Path,
    policy_model: nn.Module,
    rows: list[list[int]],
    limits: Limits,
    dtype: torch.dtype | None = None,
) -> Certificate:
    """Loads the merged folder with transformers and compares its logits with those of the adapter in use.

    Args:
        merged: folder of the merged model, tokenizer not needed.
        policy_model: base and adapters, live; put in eval mode for the comparison and back again after it.
            On the CPU its 4-bit layers must have their bf16 packing switched off before their first eval forward.
        rows: token ids of held-out rows.
        dtype: of the merged model's computation; absent = the policy's embedding's.
    """
    parameter = next(policy_model.parameters())
    compute = dtype or (parameter.dtype if parameter.is_floating_point() else torch.bfloat16)
    candidate = load_merged(merged, compute, parameter.device)
    training = policy_model.training
    policy_model.eval()
    try:
        measured = compare_logits(logits_of(policy_model), logits_of(candidate), rows)
    finally:
        policy_model.train(training)
    word = str(compute).removeprefix("torch.")
    return Certificate(str(merged), word, measured, limits, failures(measured, limits))


def failures(measured: dict[str, Any], limits: Limits) -> list[str]:
    """Names each figure that is beyond its limit; a NaN is beyond every limit."""
    found = []
    for name, value, most in (
        ("relative error", measured["relative_error"], limits.relative_error),
        ("largest logit difference", measured["max_difference"], limits.max_logit_difference),
        ("mean KL", measured["mean_kl"], limits.mean_kl),
    ):
        if most is not None and not value <= most:
            found.append(f"{name} {value:.3g} is above {most:g}")
    agreement, least = measured["top1_agreement"], limits.min_top1_agreement
    if least is not None and not agreement >= least:
        found.append(f"top-1 agreement {agreement:.4f} is below {least:g}")
    return found


def verify_bytes(folder: Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Hashes files again and names those that are not what they were; {} of a record or a merge report.

    Args:
        files: relative name -> {"sha256", "bytes"}.
    """
    problems = []
    for name, expected in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif sha256(path) != expected["sha256"]:
            problems.append(f"{name} does not have the SHA-256 it was written with")
    return problems
