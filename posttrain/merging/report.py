"""The figures of a merge: how much each tensor changed, and how much of the change outlived rounding."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from posttrain.errors import CheckpointError

SURVIVES = 0.9
"""Cosine below which rounding has eaten a delta; measured: bf16 keeps 0.89 at |delta| / |W| = 0.003."""


@dataclass(frozen=True)
class TensorReport:
    """One tensor that an adapter had a part in."""

    name: str
    keys: tuple[str, ...]
    """Keys of the adapters, in the order of the chain."""
    relative_change: float | None
    """|delta| / |W|, Frobenius, before rounding; None where the shape changed."""
    cosine: float | None
    """Between the change after rounding and the wanted one; 1 where both are zero."""
    norm_ratio: float | None
    """|change after rounding| / |wanted change|."""


@dataclass(frozen=True)
class MergeReport:
    """What was merged, and what was written."""

    dtype: str
    base_mode: str
    quantization: dict[str, Any] | None
    adapters: tuple[str, ...]
    tied: bool | None
    """Whether embedding and output layer stayed one tensor; None where they were two already."""
    tensors: tuple[TensorReport, ...]
    copied: int
    """Tensors copied as bytes."""
    cast: int
    """Untouched tensors that only changed their dtype, or went through the 4-bit grid."""
    parameters: int
    total_bytes: int
    files: dict[str, dict[str, Any]]
    """Name -> {"sha256", "bytes"} of every file written."""

    def advice(self) -> list[str]:
        """Warnings for people: deltas that rounding ate, adapters that change nothing."""
        lines = []
        eaten = [tensor for tensor in self.tensors if tensor.cosine is not None and tensor.cosine < SURVIVES]
        if eaten:
            worst = min(eaten, key=lambda tensor: tensor.cosine or 0.0)
            lines.append(
                f"{len(eaten)} of {len(self.tensors)} deltas did not survive rounding to {self.dtype} "
                f"(worst: {worst.name}, cosine {worst.cosine:.2f}); float32 keeps them"
            )
        changes = [tensor.relative_change for tensor in self.tensors if tensor.relative_change is not None]
        if changes and not any(changes):
            lines.append("the adapters change nothing: every delta is zero")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "advice": self.advice()}


class Survival:
    """Sums over the blocks of one tensor what its report needs.

    With W the base, D = merged - W in fp32 and D' = rounded - W: |D| / |W|, cos(D, D'), |D'| / |D|. Sums are in
    fp32 within a block and in fp64 over blocks.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._base = self._wanted = self._applied = self._dot = 0.0

    def add(self, base: torch.Tensor, merged: torch.Tensor, rounded: torch.Tensor) -> None:
        """Takes one block: base and merged in fp32, rounded in the output's dtype.

        Raises:
            CheckpointError: a value of the merged tensor is not finite, or overflows the output's dtype.
        """
        wanted = (merged - base).view(-1)
        applied = rounded.to(torch.float32, copy=True).sub_(base).view(-1)
        base = base.reshape(-1)
        self._base += torch.dot(base, base).item()
        self._wanted += torch.dot(wanted, wanted).item()
        self._applied += torch.dot(applied, applied).item()
        self._dot += torch.dot(wanted, applied).item()
        if not math.isfinite(self._applied):
            raise CheckpointError(
                self.name,
                f"merged values are not finite in {str(rounded.dtype).removeprefix('torch.')}",
                "check the adapter for NaN; from float16 choose bfloat16 or float32",
            )

    def report(self, keys: tuple[str, ...], same_shape: bool) -> TensorReport:
        """The tensor's figures, after its last block."""
        if not same_shape:
            return TensorReport(self.name, keys, None, None, None)
        wanted, applied = math.sqrt(self._wanted), math.sqrt(self._applied)
        change = wanted / math.sqrt(self._base) if self._base else math.inf if wanted else 0.0
        if wanted == 0:
            return TensorReport(self.name, keys, 0.0, 1.0 if applied == 0 else 0.0, None)
        cosine = self._dot / (wanted * applied) if applied else 0.0
        return TensorReport(self.name, keys, change, min(cosine, 1.0), applied / wanted)
