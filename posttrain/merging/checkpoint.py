"""A model folder: its tensors by name over one or several safetensors shards, and its config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError
from posttrain.merging.header import TensorInfo, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_INCOMPLETE = "the folder is incomplete: copy or download it again"


@dataclass(frozen=True)
class Checkpoint:
    """What a model folder holds; no tensor is in memory."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    """By name, shard after shard, in the order of their bytes."""
    stamps: dict[Path, tuple[int, int, int]]
    """File -> (inode, size, mtime) when the headers were read."""


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads the headers of a model folder.

    Raises:
        CheckpointError: no safetensors, a missing or damaged shard, a name in two shards or in none.
    """
    config = read_json(folder / "config.json")
    if (folder / WEIGHTS).is_file():  # as transformers: a single file goes before an index
        files, listed = [folder / WEIGHTS], None
    elif (folder / INDEX).is_file():
        listed = _weight_map(folder / INDEX)
        files = [folder / name for name in sorted(set(listed.values()))]
    else:
        raise CheckpointError(
            str(folder), f"neither {WEIGHTS} nor {INDEX}", "give a folder with safetensors weights (.bin is not read)"
        )
    stamps = {file: stamp(file) for file in files}
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in read_header(file):
            if info.name in tensors:
                raise CheckpointError(str(file), f"{info.name} is also in {tensors[info.name].file.name}", _INCOMPLETE)
            tensors[info.name] = info
    for name, shard in (listed or {}).items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(str(folder / shard), f"lacks {name}, which {INDEX} promises", _INCOMPLETE)
    return Checkpoint(folder, config, tensors, stamps)


def _weight_map(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(str(path), "no weight_map", _INCOMPLETE)
    for name in index.values():  # none of which may point out of its folder
        if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
            raise CheckpointError(str(path), f"{name!r} is no file name", _INCOMPLETE)
    return index


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; CheckpointError when the file is missing, damaged or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(str(path), "no such file", _INCOMPLETE) from None
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror}", "see that it may be read") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"damaged JSON ({error})", _INCOMPLETE) from None
    if not isinstance(value, dict):
        raise CheckpointError(str(path), "not a JSON object", _INCOMPLETE)
    return value


def stamp(file: Path) -> tuple[int, int, int]:
    """(inode, size, mtime in ns) of a file; CheckpointError when it is missing."""
    try:
        found = file.stat()
    except FileNotFoundError:
        raise CheckpointError(str(file), "no such file", _INCOMPLETE) from None
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be read: {error.strerror}", "see that it may be read") from None
    return found.st_ino, found.st_size, found.st_mtime_ns


def check_stamps(stamps: dict[Path, tuple[int, int, int]]) -> None:
    """Raises CheckpointError for the first file that is no longer what it was."""
    for file, before in stamps.items():
        if stamp(file) != before:
            raise CheckpointError(str(file), "changed while it was being read", "merge again once nobody writes to it")
