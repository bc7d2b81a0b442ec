"""The safetensors format: where each tensor of a file lies, and how to read its rows.

A file is 8 bytes with the header's length (little endian), a JSON header that gives dtype, shape and
byte range of each tensor, then the bytes. Source: the format's own description in safetensors' README.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
"""Dtypes that a merge can compute with and cast."""
_MAX_HEADER = 100_000_000  # the limit of safetensors itself
_DAMAGED = "copy or download the file again"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: enough to read it, nothing of it in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    """First byte, counted from the start of the file."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


def read_header(file: Path) -> list[TensorInfo]:
    """Reads the tensors of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: missing, truncated or damaged file, a name twice, ranges that overlap or leave gaps.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(
                    str(file), f"header of {length} bytes in a file of {size}: truncated or no safetensors", _DAMAGED
                )
            text = stream.read(length)
    except FileNotFoundError:
        raise CheckpointError(
            str(file), "no such file", "the folder is incomplete: copy or download it again"
        ) from None
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(file, pairs))
        entries.pop("__metadata__", None)
        tensors = [_parse(file, 8 + length, name, entry) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(file), f"damaged header ({error!r})", _DAMAGED) from None
    tensors.sort(key=lambda info: (info.start, info.nbytes))
    end = 8 + length
    for info in tensors:
        if info.start != end:
            raise CheckpointError(str(file), f"{info.name} starts at byte {info.start}, expected {end}", _DAMAGED)
        end += info.nbytes
    if end != size:
        word = "truncated" if size < end else "too long"
        raise CheckpointError(str(file), f"{word}: {size} bytes, its header promises {end}", _DAMAGED)
    return tensors


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise CheckpointError(str(file), f"names stored twice: {', '.join(twice)}", _DAMAGED)
    return entries


def _parse(file: Path, data: int, name: str, entry: dict[str, Any]) -> TensorInfo:
    begin, end = entry["data_offsets"]
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(str(file), f"{name} has dtype {entry['dtype']}", "give an unquantised checkpoint")
    info = TensorInfo(name, DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), file, data + begin)
    if end - begin != info.nbytes:
        raise ValueError(f"{name}: {end - begin} bytes for shape {list(info.shape)}")
    return info


def encode_header(tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> bytes:
    """Builds the start of a safetensors file whose tensors follow without gaps in the given order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned data: readers map it without copying
    return len(text).to_bytes(8, "little") + text


def read_rows(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """Reads rows [start, stop) in the file's own dtype; shape (stop - start, *rest), a scalar as (1,)."""
    rest = info.shape[1:]
    row = math.prod(rest) * info.dtype.itemsize
    flat = _read(info, start * row, (stop - start) * row)
    return flat.view(info.dtype).view(stop - start, *rest)


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Reads a whole tensor in the file's own dtype."""
    return read_rows(info, 0, info.rows).view(info.shape)


def read_bytes(info: TensorInfo, block: int = 8 << 20) -> Iterator[memoryview]:
    """Yields a tensor's bytes in blocks, without making a tensor of them."""
    for begin in range(0, info.nbytes, block):
        yield memoryview(_read(info, begin, min(block, info.nbytes - begin)).numpy())


def _read(info: TensorInfo, begin: int, length: int) -> torch.Tensor:
    flat = torch.empty(length, dtype=torch.uint8)
    view = memoryview(flat.numpy())
    with info.file.open("rb", buffering=0) as stream:
        done = 0
        while done < length:
            count = os.preadv(stream.fileno(), [view[done:]], info.start + begin + done)
            if count == 0:
                raise CheckpointError(str(info.file), f"ends inside {info.name}", _DAMAGED)
            done += count
    return flat
