"""The certificate of a merge: the files on disk against the adapter in use, on held-out rows."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.artifact import sha256, write_atomically


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
    min_delta_cosine: float | None = None
    """Of any tensor's change before and after rounding; no default, since the logits tell what it costs."""
    max_share_off: float | None = None
    """Of any tensor's numbers, those that are not the ones in use, rounded."""

    def over(self, given: Limits) -> Limits:
        """These limits, with those of `given` that are set in their place."""
        set_by_user = {name: value for name, value in asdict(given).items() if value is not None}
        return replace(self, **set_by_user)


def default_limits(dtype: str, quantised: bool, base_mode: str) -> Limits:
    """Limits some times above what was measured for a right merge, computing in fp32.

    The numbers themselves (`max_share_off`) tell right from wrong; the logits tell what rounding costs. What another
    base than training's costs was asked for: it is shown, and has no limit. Measured relative error, KL, top-1 on a
    small Llama: fp32 4e-7; bf16 3e-3 to 5e-3, 8e-5, 0.990; 4-bit adapter put on the original base, which is another
    model, 1.9e-2, 3.1e-3, 0.954; wrong merges 0.3 to 1.2.
    Top-1 agreement is held loosely: near ties flip it, in untrained models above all.

    Args:
        dtype: of the merged weights.
        quantised: whether the adapter was trained on a 4-bit base.
        base_mode: `original` or `dequantized`.
    """
    if quantised and base_mode == "original":  # how far another base leads is for people to judge
        return Limits(max_share_off=0.0)
    if dtype != "float32":
        return Limits(relative_error=0.03, mean_kl=2e-3, min_top1_agreement=0.8, max_share_off=0.0)
    if quantised:  # on another device than training's the grid is not the same in every number
        return Limits(relative_error=5e-3, mean_kl=2e-4, min_top1_agreement=0.95, max_share_off=0.0)
    return Limits(relative_error=1e-4, mean_kl=1e-6, min_top1_agreement=0.99, max_share_off=0.0)


def grid_allowance(quantised_on: str, compared_on: str) -> float:
    """Share of a 4-bit tensor's numbers that may be off though the merge is right, by the devices that quantised.

    A CPU rounds to the bit as the merge does. A GPU sums the mean of the scales in another order, which moves one
    dequantised number in some 60,000 over a boundary of bf16; between the two, one 8-bit scale in 250 is another
    (their tables differ), and with it its block of 64.
    """
    if quantised_on != compared_on:
        return 0.03
    return 0.0 if compared_on == "cpu" else 1e-3


@dataclass(frozen=True)
class Certificate:
    """What was merged, what was measured on it, against which limits, and what does not hold."""

    merged: str
    """Name of the folder."""
    method: dict[str, Any]
    """`{"kind": "chain"}`, or how several models were combined."""
    base: dict[str, Any]
    """`asked`, `mode` (original, dequantized), `proved_by`; with `auto`, the `relative_error` of both."""
    dtype: str
    """Of the merged weights."""
    parts: list[str]
    """Base first, then adapters or models, in order."""
    rows: dict[str, Any] | None
    """`source` (held_out, training, given), how many; None: no comparison was asked for."""
    compared: dict[str, Any] | None
    """`mode` (whole, layers) and the `dtype` in which both computed."""
    logits: dict[str, Any] | None
    """Merged files against the adapter in use, see `compare_logits`; None where models were combined."""
    weights: dict[str, Any] | None
    """Numbers of the merged files against those in use on the same base, see `compare_weights`; None as `logits`."""
    inputs: dict[str, dict[str, Any]]
    """Merged files against each model that was combined: figures without a limit."""
    limits: Limits
    tensors: list[dict[str, Any]]
    """What rounding left of each change, worst first."""
    advice: list[str]
    files: dict[str, dict[str, Any]]
    """Name -> {"sha256", "bytes"} of every file of the model."""
    failures: list[str]
    """Empty when the merge holds."""

    @property
    def verdict(self) -> str:
        """`pass` or `fail`."""
        return "fail" if self.failures else "pass"

    def as_dict(self) -> dict[str, Any]:
        """The certificate as plain JSON values; what JSON has no number for (NaN, infinity) is spelled."""
        spelled: dict[str, Any] = _spelled({"verdict": self.verdict, **asdict(self)})
        return spelled

    def save(self, folder: Path, page: str) -> list[str]:
        """Writes it as JSON, and `page` for people; returns the two names."""
        write_atomically(folder / "certificate.json", json.dumps(self.as_dict(), indent=2, allow_nan=False))
        write_atomically(folder / "certificate.md", page)
        return ["certificate.json", "certificate.md"]


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _spelled(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spelled(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def worst_first(tensors: Iterable[Any]) -> list[dict[str, Any]]:
    """A report's tensors as plain values, those first of which rounding left least; unknown ones last."""
    return sorted(map(asdict, tensors), key=lambda one: (one["cosine"] is None, one["cosine"] or 0.0, one["name"]))


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


def stray_numbers(
    weights: dict[str, Any], limits: Limits, dtype: str, on_grid: Container[str] = (), allowance: float = 0.0
) -> list[str]:
    """Names the tensor that is least what it is in use, where that is beyond the limit.

    Args:
        on_grid: names of the tensors that training held in 4 bits.
        allowance: as `grid_allowance`; the limit of those, where it is the larger one.
    """
    most = limits.max_share_off
    if most is None:
        return []
    beyond = [one for one in weights["off"] if not one["share"] <= max(most, allowance * (one["name"] in on_grid))]
    if not beyond:
        return []
    worst = f"{beyond[0]['name']}, {100 * beyond[0]['share']:.2g} % of its numbers"
    many = f"{len(beyond)} tensors are" if len(beyond) > 1 else "1 tensor is"
    return [f"{many} not what the adapters in use have, rounded to {dtype} (worst: {worst})"]


def eaten_deltas(tensors: list[dict[str, Any]], limits: Limits) -> list[str]:
    """Names the change of which rounding left least, where that is less than the limit."""
    least = limits.min_delta_cosine
    below = [one for one in tensors if least is not None and one["cosine"] is not None and not one["cosine"] >= least]
    if not below:
        return []
    worst = f"{below[0]['name']}, cosine {below[0]['cosine']:.3f}"
    return [f"rounding left less than cosine {least:g} of {len(below)} deltas (worst: {worst})"]


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
