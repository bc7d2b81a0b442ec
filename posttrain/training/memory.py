"""The peak of memory that a training run reached."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch


def measured_peak(device: str) -> dict[str, Any]:
    """The highest memory so far: of the GPU's allocator since the last reset, or of this process on a CPU."""
    if device == "cuda":
        return {
            "measured_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "measured_by": "cuda_allocator",
        }
    return {"measured_bytes": peak_resident(), "measured_by": "resident_set"}


def peak_resident() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
