"""Safetensors shards written front to back: hashed while the bytes pass, under a temporary name until complete."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import CheckpointError
from posttrain.merging.atomic import disk_errors
from posttrain.merging.checkpoint import INDEX, WEIGHTS
from posttrain.merging.header import BYTES, encode_header
from posttrain.merging.tensors import TORCH

_SUFFIX = ".incomplete"
_BUFFER = 4 << 20
"""Bytes that are hashed and written at once."""
_BUFFERS = 6
"""Most buffers that wait to be hashed and written."""
_ALIGNED = 4096
"""Bytes of which O_DIRECT wants whole multiples, but for a file's end."""


@dataclass(frozen=True)
class Slot:
    """One tensor to be written."""

    name: str
    dtype: str
    """As the format spells it, a key of `header.BYTES`."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BYTES[self.dtype]


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

    Bytes are gathered in a few buffers, which one thread hashes and another writes while the caller fills the
    next. They go to the disk past the page cache where the file system can (O_DIRECT): writing so takes a quarter
    of the processor's time, and a model larger than the memory does not drive everything else out of that.

    Errors of the threads are raised by a later call, or by the end of the `with` block. Leaving that by an
    exception leaves nothing behind.

    Raises:
        CheckpointError: from any method: the disk is full, or does not take what is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}{_SUFFIX}")
        self._digest = hashlib.sha256()
        self._direct = sys.platform == "linux"
        self._written = self._filled = 0
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._pending: deque[tuple[torch.Tensor, Future[None], Future[None]]] = deque()

    def __enter__(self) -> FileWriter:
        with disk_errors(self.path):
            self._file = self._open()
        self._hasher, self._writer = ThreadPoolExecutor(1, "hash"), ThreadPoolExecutor(1, "write")
        return self

    def room(self, length: int) -> torch.Tensor:
        """Memory (uint8) of the next `length` bytes of the file, to be filled before the next call."""
        if self._filled + length > len(self._buffer):
            whole = self._filled - self._filled % _ALIGNED
            rest = self._buffer[whole : self._filled]
            self._submit(whole)
            self._buffer = self._free_buffer(length + len(rest))
            self._buffer[: len(rest)] = rest
            self._filled = len(rest)
        self._filled += length
        return self._buffer[self._filled - length : self._filled]

    def write(self, block: bytes | memoryview) -> None:
        """Appends bytes."""
        memoryview(self.room(len(block)).numpy())[:] = block

    def write_tensor(self, tensor: torch.Tensor) -> None:
        """Appends a tensor's elements, row after row."""
        for part in tensor.contiguous().view(-1).view(torch.uint8).split(_BUFFER):
            self.room(len(part)).copy_(part)

    def write_rounded(self, rows: torch.Tensor, dtype: str) -> torch.Tensor:
        """Appends fp32 rows rounded to `dtype` (a key of `header.BYTES`); returns them as they are in the buffer."""
        own = TORCH[dtype]
        return self.room(rows.numel() * own.itemsize).view(own).view(rows.shape).copy_(rows)

    def describe(self) -> dict[str, Any]:
        """{"sha256", "bytes"} of what was written, after the `with` block."""
        return {"sha256": self._digest.hexdigest(), "bytes": self._written}

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        if sys.platform == "linux":
            try:
                return os.open(self._temporary, flags | os.O_DIRECT, 0o666)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a file system without it
                    raise
        self._direct = False
        return os.open(self._temporary, flags, 0o666)

    def _submit(self, length: int) -> None:
        """Hands over the first bytes of the buffer."""
        content = memoryview(self._buffer.numpy())[:length]
        hashed, written = self._hasher.submit(self._digest.update, content), self._writer.submit(self._put, content)
        self._pending.append((self._buffer, hashed, written))

    def _free_buffer(self, length: int) -> torch.Tensor:
        """A buffer that both threads are done with, or a new one while there are few; it begins at a page."""
        while len(self._pending) >= _BUFFERS:
            buffer, *steps = self._pending.popleft()
            for step in steps:
                step.result()
            if len(buffer) >= length:
                return buffer
        return torch.frombuffer(mmap.mmap(-1, max(length, _BUFFER)), dtype=torch.uint8)

    def _put(self, content: memoryview) -> None:
        with disk_errors(self.path):
            while content:
                whole = len(content) - len(content) % _ALIGNED
                if self._direct and not whole:
                    self._leave_direct()
                try:
                    count = os.write(self._file, content[:whole] if self._direct else content)
                except OSError as error:
                    if error.errno != errno.EINVAL or not self._direct:
                        raise
                    self._leave_direct()  # blocks of another size
                    continue
                self._written += count
                content = content[count:]

    def _leave_direct(self) -> None:
        if sys.platform == "linux":
            fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~os.O_DIRECT)
        self._direct = False

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self._submit(self._filled)
                for _, *steps in self._pending:
                    for step in steps:
                        step.result()
                with disk_errors(self.path):
                    os.fsync(self._file)
                    self._temporary.replace(self.path)
        finally:
            for thread in (self._hasher, self._writer):
                thread.shutdown(cancel_futures=True)
            os.close(self._file)
            self._temporary.unlink(missing_ok=True)


def lay_out(folder: Path, slots: list[Slot], max_shard_size: int) -> dict[str, list[Slot]]:
    """Cuts a model's tensors into files of `folder`, by name, once it is known that the disk has room for them.

    Raises:
        CheckpointError: it has not.
    """
    check_space(folder, sum(slot.nbytes for slot in slots), shutil.disk_usage(folder).free)
    shards = assign_shards(slots, max_shard_size)
    return {name: aligned(shard) for name, shard in zip(shard_names(len(shards)), shards, strict=True)}


def shard_header(shard: list[Slot]) -> bytes:
    """The bytes that go before a shard's tensors."""
    return encode_header([(slot.name, slot.dtype, slot.shape) for slot in shard])


def aligned(slots: list[Slot]) -> list[Slot]:
    """Orders a shard so that every tensor starts at a multiple of its element size: widest elements first."""
    return sorted(slots, key=lambda slot: -BYTES[slot.dtype])


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
            "total_parameters": sum(math.prod(slot.shape) for slot in slots),
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
