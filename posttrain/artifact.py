"""Artifacts: folders that exist under their final name only when they are complete.

A stage works in `<stage>.partial/`. `finish` writes `stage.json` last, syncs every file and renames
the folder. Readers may therefore trust any folder under its final name, and a `stage.json` inside a
partial folder means that only the rename is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError

RECORD = "stage.json"
FORMAT = 1
_BLOCK = 1 << 20


def canonical(value: Any) -> str:
    """Returns the one JSON text of a value, whatever order its dicts were built in.

    Raises:
        TypeError: for anything without a stable form (objects, sets, NaN, non-string keys).
    """
    return json.dumps(_stable(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def _stable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{value} has no stable form")
        return int(value) if value.is_integer() and abs(value) < 2**53 else value  # 1.0 in YAML is 1
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("a dict with keys that are not strings has no stable form")
        return {key: _stable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_stable(inner) for inner in value]
    raise TypeError(f"{type(value).__name__} has no stable form")


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of the canonical form of a value; raises TypeError where there is none."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def differences(old: Any, new: Any, at: str = "") -> list[tuple[str, Any, Any]]:
    """Lists the leaves in which two nested values differ, as (dotted path, old, new); absent = None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{at}.{key}" if at else key)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, pair in enumerate(zip(old, new, strict=True)) for d in differences(*pair, f"{at}[{i}]")]
    same = _stable(old) == _stable(new)
    return [] if same else [(at, old, new)]


@dataclass(frozen=True)
class Record:
    """What `stage.json` says: the proof that a folder is complete, and where it came from."""

    stage: str
    kind: str
    version: int
    """Version of the stage's code as far as it changes results."""
    fingerprint: str
    """Of `identity`."""
    identity: dict[str, Any]
    """Everything that gives the output its identity: resolved settings, seed, digests of data and inputs."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Label (`model`, `models.base`) -> what it was: `@stage`, path or id with commit."""
    lineage: dict[str, Any] | None = None
    """`{"base": {...}, "adapters": [{...}], "quantization": {...} | None}`; see `posttrain.models.lineage`."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Relative path -> {"sha256", "bytes"}, for what the stage leaves (not logs, not checkpoints)."""
    summary: dict[str, Any] = field(default_factory=dict)
    """The stage's figures."""
    ledger: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, machine, times: recorded, never fingerprinted."""
    format: int = FORMAT


@dataclass(frozen=True)
class Artifact:
    """A finished folder and its record."""

    folder: Path
    record: Record

    @classmethod
    def read(cls, folder: Path) -> Artifact | None:
        """Reads a folder's record, or returns None where there is none (or no folder).

        Raises:
            CheckpointError: the record is damaged or from a newer format.
        """
        path = folder / RECORD
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = data["format"]
            record = Record(**data) if found == FORMAT else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise CheckpointError(str(path), f"damaged record ({error})", "move the folder aside and rerun") from None
        if record is None:
            raise CheckpointError(str(path), f"record format {found}", f"this version reads format {FORMAT}")
        return cls(folder, record)


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


class DigestCache:
    """SHA-256 of files, remembered by (device, inode, size, mtime) so that a plan is fast.

    Args:
        path: JSON file of the cache; created on `save`.
        verify: recompute every digest instead of trusting the cache.
    """

    def __init__(self, path: Path, verify: bool = False) -> None:
        self.path, self.verify = path, verify
        self._new: dict[str, str] = {}
        try:
            self._known: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}  # a cache may be lost: digests are computed again

    def digest(self, path: Path) -> str:
        """Returns the SHA-256 of a file, computing it only when the file changed."""
        stat = path.stat()
        key = f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}"
        value = None if self.verify else self._known.get(key)
        if value is None:
            value = sha256(path)
        self._new[key] = value
        return value

    def tree(self, folder: Path, files: Iterable[Path] | None = None) -> str:
        """Returns one digest of a folder: names (relative) and contents, independent of where it lies."""
        chosen = sorted(files if files is not None else visible_files(folder))
        return fingerprint({str(path.relative_to(folder)): self.digest(path) for path in chosen})

    def save(self) -> None:
        """Writes what this run saw; silently gives up on a read-only place, since it is only a cache."""
        if not self._new.keys() - self._known.keys():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, json.dumps({**self._known, **self._new}))
        except OSError:
            return


def visible_files(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder, hidden ones and folders left out."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file under another name, syncs it, and renames it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Forces a folder's files and names to disk, children first."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if not path.is_symlink():
            _fsync(path)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(partial: Path, final: Path) -> None:
    """Syncs a folder and gives it its final name in one rename; `final` must not exist."""
    sync_folder(partial)
    os.rename(partial, final)  # atomic within one filesystem; fails if `final` is a non-empty folder
    _fsync(final.parent)


def write_record(partial: Path, record: Record) -> None:
    """Writes a folder's record, after which only the rename is missing."""
    write_atomically(partial / RECORD, json.dumps(asdict(record), indent=2, ensure_ascii=False))


def finish(partial: Path, final: Path, record: Record) -> Artifact:
    """Completes a stage's folder: record last, everything synced, then the rename."""
    write_record(partial, record)
    publish_folder(partial, final)
    return Artifact(final, record)


def move_aside(folder: Path, aside: Path) -> Path:
    """Moves a folder below `aside` under a name that is free, and returns where it went."""
    aside.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := aside / f"{folder.name}-{number}").exists():
        number += 1
    shutil.move(folder, target)
    return target


def describe_files(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns {"sha256", "bytes"} of files given relative to a folder, for a record."""
    return {name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size} for name in sorted(names)}
