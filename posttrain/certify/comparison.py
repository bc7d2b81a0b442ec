"""Models side by side on the same rows, in as much memory as there is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from peft import PeftModel
from torch import nn

from posttrain.certify.certificate import Limits
from posttrain.certify.layers import Streamed, stream_merged, stream_policy, streamed_logits, streamed_units
from posttrain.certify.logits import Logits, compare_logits, load_merged, logits_of
from posttrain.certify.probes import Probes
from posttrain.certify.weights import compare_weights, units
from posttrain.merging.quantization import torch_dtype
from posttrain.models.lineage import Lineage
from posttrain.models.load import load_base, load_policy, put_adapters

Mode = Literal["auto", "whole", "layers"]


Opened: TypeAlias = nn.Module | Streamed
"""A model in memory, or one of which a layer at a time is."""


@dataclass(frozen=True)
class Comparison:
    """On what, and how, merged files are compared with the models they come from.

    Both compute in fp32 on the same base, so that their difference is the rounding of the files and nothing else.
    """

    probes: Probes
    device: str
    attn_implementation: str = "sdpa"
    """Flash attention computes in 16 bits only, so `sdpa` stands in for it."""
    mode: Mode = "auto"
    """`whole`: two models in memory; `layers`: one layer at a time from the files; `auto`: as fits."""
    limits: Limits = field(default_factory=Limits)
    """Set ones go before the defaults."""

    @property
    def attention(self) -> str:
        """The attention that computes in fp32."""
        return "sdpa" if self.attn_implementation.startswith("flash") else self.attn_implementation

    def for_size(self, parameters: int) -> Comparison:
        """The same with `auto` decided for models of so many parameters."""
        if self.mode != "auto":
            return self
        needed = 2 * parameters * torch.float32.itemsize
        mode: Mode = "whole" if needed <= available_memory(self.device) else "layers"
        return replace(self, mode=mode)

    def in_use(self, lineage: Lineage) -> Opened:
        """A model as its lineage says: base (quantised as in training) and live adapters, or standalone."""
        if self.mode == "layers":
            return stream_policy(lineage, self.device, self.attention)
        return load_exact(lineage, self.device, self.attention)

    def merged(self, folder: Path) -> Opened:
        """A merged folder, as plain transformers loads it.

        Raises:
            CheckpointError: weights that are missing, left over or of another shape.
        """
        if self.mode == "layers":
            return stream_merged(folder, self.device, self.attention)
        return load_merged(folder, torch.float32, self.device, self.attention)

    def measure(self, reference: Opened, candidate: Opened) -> dict[str, Any]:
        """The figures of `compare_logits` on the rows of this comparison."""
        one, other = (self._logits(model) for model in (reference, candidate))
        return compare_logits(one, other, self.probes.ids, [row.labels for row in self.probes.rows])

    def _logits(self, model: Opened) -> Logits:
        return streamed_logits(model, self.probes.ids) if isinstance(model, Streamed) else logits_of(model)

    def weigh(self, in_use: Opened, merged: Opened, dtype: torch.dtype) -> dict[str, Any]:
        """The figures of `compare_weights`: the files' numbers against those in use, rounded to the files' dtype."""
        if isinstance(in_use, Streamed) and isinstance(merged, Streamed):
            return compare_weights(streamed_units(in_use, merged), dtype)
        assert isinstance(in_use, nn.Module)
        assert isinstance(merged, nn.Module)  # one mode for both
        base = in_use.get_base_model() if isinstance(in_use, PeftModel) else in_use
        return compare_weights(units(base, merged), dtype)

    def as_dict(self) -> dict[str, str]:
        """How it was done, for a certificate."""
        return {"mode": self.mode, "dtype": "float32"}


def load_exact(lineage: Lineage, device: str, attn_implementation: str) -> nn.Module:
    """Loads a model as its lineage says, to compute in fp32 with the numbers that training saw.

    A 4-bit base is quantised and dequantised by bitsandbytes, in the dtype of its training: without gradients its own
    kernels multiply in the dtype of their input, with other numbers than in training (0.50).
    """
    quantization = lineage.quantization
    if quantization is None:
        return load_policy(lineage, torch.float32, device, attn_implementation)
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    base, dtype = lineage.base.folder, torch_dtype(quantization.source_dtype)
    model = load_base(base, dtype, device, attn_implementation, quantization)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.weight = nn.Parameter(values, requires_grad=False)
            plain.bias = module.bias
            model.set_submodule(name, plain)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return put_adapters(model, lineage)


def available_memory(device: str) -> int:
    """Bytes that can still be used: of the GPU, or of the machine and of the container we may be in."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    meminfo, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    if meminfo.is_file():  # what is cached counts as available there
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found = [int(lines["MemAvailable"].split()[0]) << 10]
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        found.append(int(most) - int((limit.parent / "memory.current").read_text()))
    return min(found)
