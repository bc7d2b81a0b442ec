"""Safetensors shards written front to back: hashed while the bytes pass, under a temporary name until complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import CheckpointError
from posttrain.merging.checkpoint import INDEX, WEIGHTS
from posttrain.merging.header import encode_header

_SUFFIX = ".incomplete"


@dataclass(frozen=True)
class Slot:
    """One tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def assign_shards(slots: Iterable[Slot], max_shard_size: int) -> list[list[Slot]]:
    """Cuts tensors into shards of at most `max_shard_size` bytes, keeping their order; a larger tensor is alone."""
    shards: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        if shards[-1] and size + slot.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += slot.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """File names as transformers writes them: one plain file, or numbered from 1."""
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


class FileWriter:
    """Writes one file in a folder and gives it its name when it is complete.

    Args:
        path: the final name; while writing, the bytes are in `.NAME.incomplete` beside it.

    Leaving the `with` block by an exception leaves nothing behind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}{_SUFFIX}")
        self._digest = hashlib.sha256()
        self._bytes = 0

    def __enter__(self) -> FileWriter:
        self._stream = self._temporary.open("wb", buffering=0)
        return self

    def write(self, block: bytes | memoryview) -> None:
        """Appends bytes to the file and to its hash."""
        self._digest.update(block)
        rest = memoryview(block)
        while rest:
            rest = rest[self._stream.write(rest) :]
        self._bytes += len(block)

    def write_tensor(self, tensor: torch.Tensor) -> None:
        """Appends a tensor's elements, row after row."""
        if tensor.numel():
            self.write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))

    def describe(self) -> dict[str, Any]:
        """{"sha256", "bytes"} of what was written."""
        return {"sha256": self._digest.hexdigest(), "bytes": self._bytes}

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            os.fsync(self._stream.fileno())
        self._stream.close()
        if kind is None:
            self._temporary.replace(self.path)
        else:
            self._temporary.unlink(missing_ok=True)


def shard_header(shard: list[Slot]) -> bytes:
    """The bytes that go before a shard's tensors."""
    return encode_header([(slot.name, slot.dtype, slot.shape) for slot in shard])


def aligned(slots: list[Slot]) -> list[Slot]:
    """Orders a shard so that every tensor starts at a multiple of its element size: widest elements first."""
    return sorted(slots, key=lambda slot: -slot.dtype.itemsize)


def write_file(path: Path, content: bytes) -> dict[str, Any]:
    """Writes a small file; returns {"sha256", "bytes"}."""
    with FileWriter(path) as writer:
        writer.write(content)
    return writer.describe()


def write_index(folder: Path, shards: dict[str, list[Slot]]) -> dict[str, Any]:
    """Writes the index over several shards: sizes in bytes, as transformers reads them."""
    slots = [slot for shard in shards.values() for slot in shard]
    index = {
        "metadata": {
            "total_parameters": sum(torch.Size(slot.shape).numel() for slot in slots),
            "total_size": sum(slot.nbytes for slot in slots),
        },
        "weight_map": dict(sorted((slot.name, name) for name, shard in shards.items() for slot in shard)),
    }
    return write_file(folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")


def check_space(folder: Path, needed: int, free: int) -> None:
    """Raises CheckpointError when `needed` bytes and some slack do not fit into `free` ones."""
    needed += 64 << 20
    if needed > free:
        raise CheckpointError(
            str(folder), f"the merge needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", "make room, rerun"
        )
