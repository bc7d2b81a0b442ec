"""Models side by side on the same rows, in as much memory as there is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from posttrain.certify.certificate import Limits
from posttrain.certify.logits import Logits, compare_logits, load_merged, logits_of
from posttrain.certify.probes import Probes
from posttrain.models.lineage import Lineage
from posttrain.models.load import load_policy

Mode = Literal["auto", "whole", "layers"]


@dataclass(frozen=True)
class Comparison:
    """On what, and how, merged files are compared with the models they come from."""

    probes: Probes
    dtype: torch.dtype
    """In which both compute."""
    device: str
    attn_implementation: str = "sdpa"
    mode: Mode = "auto"
    """`whole`: two models in memory; `layers`: one layer at a time from the files; `auto`: as fits."""
    limits: Limits = field(default_factory=Limits)
    """Set ones go before the defaults."""

    def for_size(self, parameters: int) -> Comparison:
        """The same with `auto` decided for models of so many parameters."""
        if self.mode != "auto":
            return self
        needed = 2 * parameters * self.dtype.itemsize
        mode: Mode = "whole" if needed <= available_memory(self.device) else "layers"
        return replace(self, mode=mode)

    def in_use(self, lineage: Lineage) -> Logits:
        """A model as its lineage says: base (quantised as in training) and live adapters, or standalone."""
        if self.mode == "layers":
            from posttrain.certify.layers import layered_policy

            return layered_policy(lineage, self.probes.ids, self.dtype, self.device, self.attn_implementation)
        return logits_of(load_policy(lineage, self.dtype, self.device, self.attn_implementation))

    def merged(self, folder: Path) -> Logits:
        """A merged folder, as plain transformers loads it.

        Raises:
            CheckpointError: weights that are missing, left over or of another shape.
        """
        if self.mode == "layers":
            from posttrain.certify.layers import layered_merged

            return layered_merged(folder, self.probes.ids, self.dtype, self.device, self.attn_implementation)
        return logits_of(load_merged(folder, self.dtype, self.device, self.attn_implementation))

    def measure(self, reference: Logits, candidate: Logits) -> dict[str, Any]:
        """The figures of `compare_logits` on the rows of this comparison."""
        return compare_logits(reference, candidate, self.probes.ids, [row.labels for row in self.probes.rows])

    def as_dict(self) -> dict[str, str]:
        """How it was done, for a certificate."""
        return {"mode": self.mode, "dtype": str(self.dtype).removeprefix("torch.")}


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
