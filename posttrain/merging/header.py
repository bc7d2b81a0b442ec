"""The safetensors format: where each tensor of a file lies. No torch here.

A file is 8 bytes with the header's length (little endian), a JSON header that gives dtype, shape and
byte range of each tensor, then the bytes. Source: the format's own description in safetensors' README.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError

BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
"""The format's word for a dtype -> bytes of an element. Types of less than a byte are not read."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""Dtypes that a merge can compute with and cast."""
_MAX_HEADER = 100_000_000  # the limit of safetensors itself
_DAMAGED = "the folder is incomplete: copy, download or train it again"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: enough to read it, nothing of it in memory."""

    name: str
    dtype: str
    """As the format spells it, a key of `BYTES`."""
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
        return self.numel * BYTES[self.dtype]

    @property
    def rows(self) -> int:
        """Length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1


def read_header(file: Path) -> list[TensorInfo]:
    """Reads the tensors of a safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: as `read_entries`; a dtype that is none of `BYTES`, ranges that overlap or leave gaps.
    """
    end, entries = read_entries(file)
    for name, entry in entries.items():
        if entry["dtype"] not in BYTES:
            raise CheckpointError(str(file), f"{name} has dtype {entry['dtype']}", "give an unquantised checkpoint")
    tensors = [
        TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, end + entry["data_offsets"][0])
        for name, entry in entries.items()
    ]
    tensors.sort(key=lambda info: (info.start, info.nbytes))
    for info in tensors:
        if info.start != end:
            raise CheckpointError(str(file), f"{info.name} starts at byte {info.start}, expected {end}", _DAMAGED)
        end += info.nbytes
    return tensors


def read_entries(file: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    """Reads a header as it stands: (first byte of the data, name -> {"dtype", "shape", "data_offsets"}).

    Raises:
        CheckpointError: missing, truncated or damaged file, a name twice, a tensor without the bytes of its shape.
    """
    size, length, text = _read_text(file)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(file, pairs))
        entries.pop("__metadata__", None)
        odd = [name for name, entry in entries.items() if not _fits(entry)]
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(str(file), "is not a safetensors file (no readable header)", _DAMAGED) from None
    if end != size:
        word = "truncated" if size < end else "too long"
        raise CheckpointError(str(file), f"holds {size} bytes where its header promises {end}: {word}", _DAMAGED)
    if odd:
        shape = entries[odd[0]]["shape"]
        raise CheckpointError(str(file), f"{odd[0]} does not have the bytes of its shape {shape}", _DAMAGED)
    return 8 + length, entries


def _read_text(file: Path) -> tuple[int, int, bytes]:
    """Returns (size of the file, length of the JSON header, the header)."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":  # what stands in its place where the large files were not fetched
                raise CheckpointError(str(file), "is a Git LFS pointer, not the file", "fetch it: git lfs pull")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                found = f"holds {size} bytes, less than its header: truncated, or no safetensors"
                raise CheckpointError(str(file), found, _DAMAGED)
            return size, length, stream.read(length)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CheckpointError(str(file), "is missing", _DAMAGED) from None
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be read: {error.strerror}", "see that it may be read") from None


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise CheckpointError(str(file), f"names stored twice: {', '.join(twice)}", _DAMAGED)
    return entries


def _fits(entry: dict[str, Any]) -> bool:
    """Whether a tensor's bytes are those of its shape; a dtype that is not known here fits."""
    begin, end = entry["data_offsets"]
    if min((begin, *entry["shape"])) < 0:
        raise ValueError(entry)
    width = BYTES.get(entry["dtype"])
    return width is None or math.prod(entry["shape"]) * width == end - begin


def encode_header(tensors: list[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Builds the start of a safetensors file whose tensors (name, dtype, shape) follow without gaps in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligned data: readers map it without copying
    return len(text).to_bytes(8, "little") + text
