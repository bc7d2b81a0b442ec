"""First values for rows of the embedding and output matrices: written into safetensors files as their bytes pass.

Only the shards that hold a matrix are written anew, and no matrix ever shrinks. No torch here.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from posttrain.artifact import write_atomically
from posttrain.doctor.checkpoint import Checkpoint, TensorPlace, read_rows
from posttrain.errors import CheckpointError, UserError

DIFFERENCE = 0.1
"""Length of what is added to a new row, as a share of the row: no two rows may begin the same."""
_SAMPLE = 1024
_BLOCK = 8 << 20
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class NewRow:
    """A row that has to be given its first values."""

    token: str
    id: int
    sources: tuple[int, ...]
    """Ids of the rows that it begins as the mean of; none = a row as long as others are."""


@dataclass(frozen=True)
class _Edit:
    """What becomes of one tensor of a file: its length afterwards, and bytes of single rows."""

    rows: int
    filler: bytes
    """One row, for rows that are new and nobody's (padding)."""
    values: dict[int, bytes]


def matrices(checkpoint: Checkpoint) -> list[TensorPlace]:
    """Lists what has one row per token: the embedding, and the output matrix and its bias where the files hold them."""
    embedding, head = checkpoint.embedding(), checkpoint.head()
    if embedding is None:
        return []
    found = [embedding]
    if head is not None:
        bias = checkpoint.tensors.get(head.name.removesuffix("weight") + "bias")
        found += [head] if bias is None else [head, replace(bias, shape=(bias.shape[0], 1))]
    return found


def rows_after(rows: int, highest: int) -> int:
    """Rows of a matrix that must hold the id `highest`: never fewer, padded to 64 or 8 where it was padded so."""
    if highest < rows:
        return rows
    multiple = next(size for size in (64, 8, 1) if rows % size == 0)
    return math.ceil((highest + 1) / multiple) * multiple


def write_rows(checkpoint: Checkpoint, new: Sequence[NewRow]) -> int:
    """Gives rows their first values in every matrix of a checkpoint, and returns how many rows there are then.

    A row is the mean of its sources' rows plus a small difference of its own that depends on the token's text
    alone, so the result is the same on every machine. Rows beyond the highest new id (padding) are the mean row.

    Args:
        checkpoint: of a folder that may be changed; its files are replaced, never written into.
        new: rows, each id once; ids beyond the matrix make it grow.

    Raises:
        CheckpointError: no embedding matrix of a known name, or matrices that are quantised.
        UserError: no room on the disk.
    """
    places = matrices(checkpoint)
    if not places:
        raise CheckpointError(str(checkpoint.folder), "no embedding matrix was found", "give a folder with safetensors")
    if odd := [place for place in places if not place.readable]:
        found = f"{odd[0].name} is stored as {odd[0].dtype}"
        raise CheckpointError(str(odd[0].file), found, "give the checkpoint before it was quantised")
    if len({place.shape[0] for place in places}) > 1:
        found = " and ".join(f"{place.name} has {place.shape[0]} rows" for place in places)
        raise CheckpointError(str(checkpoint.folder), found, "only one of them was resized: take the original")
    rows = rows_after(places[0].shape[0], max(row.id for row in new))
    for file in sorted({place.file for place in places}):
        edits = {place.name: _edit(place, rows, new) for place in places if place.file == file}
        _rewrite(file, edits)
    _update_index(checkpoint.folder)
    return rows


def first_values(place: TensorPlace, new: Sequence[NewRow]) -> np.ndarray:
    """Computes the first values of rows in one matrix: float32 [len(new), width]."""
    sample = _sample(place)
    mean, spread = sample.mean(axis=0), _root_mean_square(sample - sample.mean(axis=0))
    made = []
    for row in new:
        values = read_rows(place, row.sources).mean(axis=0) if row.sources else np.zeros_like(mean)
        if values.any():
            made.append(values + DIFFERENCE * _root_mean_square(values) * _signs(row.token, len(values)))
        else:
            made.append(mean + spread * _signs(row.token, len(mean)))
    return np.stack(made)


def _signs(token: str, width: int) -> np.ndarray:
    """A direction of its own for every token: +1 and -1 drawn from the bits of its text's SHAKE-256."""
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(token.encode()).digest(-(-width // 8)), np.uint8))
    return bits[:width].astype(np.float32) * 2 - 1


def _root_mean_square(values: np.ndarray) -> np.float32:
    return np.sqrt(np.square(values).mean())


def _sample(place: TensorPlace) -> np.ndarray:
    """All finite rows of a matrix, or of those spread evenly through a large one."""
    rows = read_rows(place, range(0, place.shape[0], -(-place.shape[0] // _SAMPLE)))
    return rows[np.isfinite(rows).all(axis=1)]


def _edit(place: TensorPlace, rows: int, new: Sequence[NewRow]) -> _Edit:
    values = first_values(place, new)
    filler = _encode(_sample(place).mean(axis=0), place.dtype)
    return _Edit(rows, filler, {row.id: _encode(made, place.dtype) for row, made in zip(new, values, strict=True)})


def _encode(values: np.ndarray, dtype: str) -> bytes:
    """Bytes of float32 values in a stored dtype, rounded to nearest, ties to even."""
    if dtype == "BF16":
        bits = values.astype("<f4").view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def _rewrite(file: Path, edits: dict[str, _Edit]) -> None:
    """Writes a safetensors file anew with some tensors longer and some of their rows replaced."""
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header: dict[str, Any] = json.loads(source.read(length))
        metadata = header.pop("__metadata__", None)
        order = sorted(header, key=lambda name: header[name]["data_offsets"])
        was = {name: header[name]["data_offsets"] for name in order}
        end = 0
        for name in order:
            entry, edit = header[name], edits.get(name)
            if edit is not None:
                entry["shape"] = [edit.rows, *entry["shape"][1:]]
            size = math.prod(entry["shape"]) * _BYTES[entry["dtype"]] if edit else was[name][1] - was[name][0]
            entry["data_offsets"] = [end, end + size]
            end += size
        if metadata is not None:
            header = {"__metadata__": metadata, **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # aligned data: readers map it without copying
        _check_space(file.parent, 8 + len(text) + end)
        temporary = file.with_name(f".{file.name}.incomplete")
        with temporary.open("wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                begin, stop = was[name]
                source.seek(8 + length + begin)
                start = target.tell()
                _copy(source, target, stop - begin)
                if name in edits:
                    _write_edit(target, start, stop - begin, edits[name])
    temporary.replace(file)


def _write_edit(target: BinaryIO, start: int, size: int, edit: _Edit) -> None:
    """Lengthens the tensor that was just written, and puts its new rows in their places."""
    row = len(edit.filler)
    target.writelines(edit.filler for _ in range(edit.rows - size // row))
    end = target.tell()
    for index, values in edit.values.items():
        target.seek(start + index * row)
        target.write(values)
    target.seek(end)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        block = source.read(min(size, _BLOCK))
        target.write(block)
        size -= len(block)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(str(folder), f"{needed:,} bytes needed, {free:,} free", "make room, or choose another disk")


def _update_index(folder: Path) -> None:
    """Brings the total size of an index, where there is one, up to date."""
    path = folder / "model.safetensors.index.json"
    if not path.is_file():
        return
    index = json.loads(path.read_text(encoding="utf-8"))
    tensors = Checkpoint(folder).tensors.values()
    metadata = index.setdefault("metadata", {})
    metadata["total_size"] = sum(place.end - place.begin for place in tensors)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(place.shape) for place in tensors)
    write_atomically(path, json.dumps(index, indent=2, sort_keys=True) + "\n")
