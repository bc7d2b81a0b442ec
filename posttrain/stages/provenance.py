"""What a stage ran with: recorded, never fingerprinted. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
import resource
import sys
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

LIBRARIES = (
    "posttrain",
    "torch",
    "transformers",
    "tokenizers",
    "trl",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
)


def versions() -> dict[str, str]:
    """Installed version of every library that may change what a stage computes."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def provenance(started: float, finished: float) -> dict[str, Any]:
    """Returns the machine, the versions, the times (seconds) and the peak memory (bytes) of this process.

    Args:
        started: Unix time at which the stage process began.
        finished: Unix time at which its outputs were complete.
    """
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpu": _gpu_name(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "started": _text(started),
        "finished": _text(finished),
        "seconds": round(finished - started, 3),
        "cpu_seconds": round(sum(usage.ru_utime + usage.ru_stime for usage in (own, children)), 3),
        "peak_rss_bytes": own.ru_maxrss * 1024,  # Linux counts it in KiB
        "peak_gpu_bytes": _gpu_peak(),
    }


def _text(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")


def _gpu_name() -> str | None:
    torch = sys.modules.get("torch")  # a stage that never loaded torch used no GPU
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.get_device_name()


def _gpu_peak() -> int | None:
    """Most bytes that torch held on the GPU at a time: reserved by its allocator, not only used."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_reserved()
