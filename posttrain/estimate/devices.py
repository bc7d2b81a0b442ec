"""Devices by name: memory, throughput, bandwidth and power, from vendors' data sheets; and the device that is here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from posttrain.errors import UserError

GB, GIB = 10**9, 1 << 30


@dataclass(frozen=True)
class GpuModel:
    """What is known of a device; throughput and power are None where only the memory is."""

    name: str
    memory: int
    """Bytes that a program can have."""
    teraflops: float | None = None
    """Dense 16-bit tensor throughput (bf16; fp16 where there is no bf16), fp32 accumulation."""
    bandwidth: float | None = None
    """Memory bandwidth in GB/s."""
    watts: int | None = None
    """Board power limit."""
    bf16: bool = True
    kind: str = "cuda"
    """`cuda` or `cpu`."""


# name: (GiB, dense bf16 TFLOP/s, GB/s, watts). Data sheets: NVIDIA A100 (2021), H100 and H200 (2023/24, SXM), L4,
# L40S, A10, T4, V100 SXM2, RTX A6000, B200 (HGX, 2025), GeForce RTX 3090/4090/5090 architecture papers (tensor
# rate with fp32 accumulation); AMD Instinct MI300X (2023). A card gives a little less than its nominal memory.
_TABLE: dict[str, tuple[float, float, float, int]] = {
    "a100-40gb": (39.5, 312, 1555, 400),
    "a100-80gb": (79.2, 312, 2039, 400),
    "h100": (79.2, 989, 3350, 700),
    "h200": (139.8, 989, 4800, 700),
    "b200": (178.0, 2250, 8000, 1000),
    "l4": (22.0, 121, 300, 72),
    "l40s": (44.5, 362, 864, 350),
    "a10g": (22.0, 70, 600, 300),
    "a6000": (47.5, 155, 768, 300),
    "rtx3090": (23.6, 71, 936, 350),
    "rtx4090": (23.5, 165, 1008, 450),
    "rtx5090": (31.4, 210, 1792, 575),
    "t4": (14.7, 65, 320, 70),
    "v100": (31.7, 125, 900, 300),
    "mi300x": (191.5, 1307, 5300, 750),
}
_NO_BF16 = {"t4", "v100"}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb)", re.IGNORECASE)


def known_devices() -> list[str]:
    """Names that `find_device` knows."""
    return list(_TABLE)


def find_device(text: str) -> GpuModel:
    """Reads a device's name (`h200`, `NVIDIA A100-SXM4-80GB`) or a size (`24GB`, taken as GiB as cards are sold).

    Raises:
        UserError: neither.
    """
    if size := _SIZE.fullmatch(text.strip()):
        return GpuModel(text.strip(), int(float(size[1]) * GIB))
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    for name in sorted(_TABLE, key=len, reverse=True):
        if plain == name.replace("-", ""):
            return _device(name)
    todo = f"give a size such as 24GB, or one of: {', '.join(_TABLE)}"
    raise UserError(f"--gpu {text}", "is no device that is known here", todo)


def _device(name: str) -> GpuModel:
    memory, teraflops, bandwidth, watts = _TABLE[name]
    return GpuModel(name, int(memory * GIB), teraflops, bandwidth, watts, name not in _NO_BF16)


def gpu_here() -> GpuModel | None:
    """The first GPU of this machine as its driver tells, without torch; None where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None  # a driver that does not answer: stages will find no GPU either
    if not told or "," not in told[0]:
        return None
    name, _, mebibytes = told[0].rpartition(",")
    if not mebibytes.strip().isdigit():
        return None
    return recognise(name.strip(), int(mebibytes) << 20)


def recognise(name: str, memory: int) -> GpuModel:
    """The device of a driver's name, with the memory it tells; figures from the table where the name is in it."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    for known in sorted(_TABLE, key=len, reverse=True):
        short = known.partition("-")[0]
        if re.search(rf"(?<![0-9]){short}(?![0-9])", plain) and abs(_TABLE[known][0] * GIB - memory) < 0.15 * memory:
            found = _device(known)
            return GpuModel(name, memory, found.teraflops, found.bandwidth, found.watts, found.bf16)
    return GpuModel(name, memory)


def cpu_here() -> GpuModel:
    """This machine's processor: its memory is known, its throughput only once something was measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return GpuModel("this machine's CPU", memory, kind="cpu")
