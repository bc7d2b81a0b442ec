"""Tokenised rows on disk: written once, read through a memory map, so that their number costs no memory.

A store is a folder of flat little-endian files, one per column, and `store.json`, written last, with the size of
each. Rows stand end to end in `ids`. Positions in a row's tokens are its `cuts`: of a `Row` the starts and ends of
the runs with loss, in turn; of a pair the ends of its prompt and of its better answer. In both, the prompt ends at
the first cut.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar, overload

import numpy as np

from posttrain.artifact import publish_folder, write_atomically
from posttrain.pretraining.rows import IGNORE, Row

T = TypeVar("T", covariant=True)
Make = Callable[[np.ndarray, np.ndarray], T]
"""(ids [tokens] int32, cuts as positions in the row [cuts] int64) -> the row."""
Block = dict[str, np.ndarray]
"""Rows as columns; `cuts` and `ends` count from the block's beginning."""
FORMAT = 1
_HEAD = "store.json"
_COLUMNS: dict[str, tuple[str, int]] = {
    "ids": ("<i4", 1),
    "cuts": ("<i8", 1),  # as positions in `ids`, so that they ascend over all rows
    "ends": ("<i8", 2),  # of each row: where it ends in `ids`, and where its cuts end in `cuts`
    "counts": ("<i4", 3),  # tokens with loss, tokens cut off, and the last id with loss (-1: none)
    "places": ("<i8", 2),  # file (by its place among the source's), and row as the file counts them
    "parts": ("<i4", 2),  # (2, 3): the second of three rows that one conversation was split into
}
_SCANNED = 1 << 18
"""Tokens read at a time where all are looked at: pages of the map would add up in memory."""


class BlockMaker:
    """Gathers rows into a block."""

    def __init__(self) -> None:
        self._columns = {name: array("i" if kind == "<i4" else "q") for name, (kind, _) in _COLUMNS.items()}

    def add(
        self,
        ids: Sequence[int],
        cuts: Sequence[int],
        counts: tuple[int, int, int],
        place: tuple[int, int],
        part: tuple[int, int] = (1, 1),
    ) -> None:
        """Adds a row; see the module for `cuts`, and the columns for the rest."""
        columns = self._columns
        begin = len(columns["ids"])
        columns["ids"].extend(ids)
        columns["cuts"].extend([begin + cut for cut in cuts])
        columns["ends"].extend((len(columns["ids"]), len(columns["cuts"])))
        columns["counts"].extend(counts)
        columns["places"].extend(place)
        columns["parts"].extend(part)

    def build(self) -> Block:
        """Returns the rows as columns."""
        shapes = {name: (-1, width) if width > 1 else (-1,) for name, (_, width) in _COLUMNS.items()}
        return {
            name: np.asarray(column, dtype=_COLUMNS[name][0]).reshape(shapes[name])
            for name, column in self._columns.items()
        }


class StoreWriter:
    """Appends blocks to a store that is not yet there; `finish` gives it its name.

    Args:
        folder: where the store will lie; what stands there, or was left there half-written, is removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._partial = folder, folder.with_name(f".{folder.name}.partial")
        for leftover in (self._partial, folder):
            if leftover.exists():
                shutil.rmtree(leftover)
        self._partial.mkdir(parents=True)
        self._files: dict[str, BinaryIO] = {name: self._path(name).open("wb") for name in _COLUMNS}
        self._tokens = self._cuts = self.rows = 0

    def write(self, block: Block) -> None:
        """Appends the rows of a block."""
        moved = {"cuts": block["cuts"] + self._tokens, "ends": block["ends"] + np.array([self._tokens, self._cuts])}
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(moved.get(name, block[name]), dtype=_COLUMNS[name][0]).data)
        self._tokens += len(block["ids"])
        self._cuts += len(block["cuts"])
        self.rows += len(block["ends"])

    def finish(self, about: dict[str, Any]) -> Store:
        """Completes the store: its head last, everything synced, then the rename.

        Args:
            about: whatever else is known about the rows, as JSON values.
        """
        self.close()
        head = {"format": FORMAT, "bytes": {name: self._path(name).stat().st_size for name in _COLUMNS}, "about": about}
        write_atomically(self._partial / _HEAD, json.dumps(head, ensure_ascii=False))
        publish_folder(self._partial, self._folder)
        return Store(self._folder, about)

    def close(self) -> None:
        """Closes the files; without `finish`, nothing has come of it."""
        for file in self._files.values():
            file.close()

    def _path(self, name: str) -> Path:
        return self._partial / f"{name}.bin"


def open_store(folder: Path) -> Store | None:
    """Opens a store, or returns None where there is none that is whole and of this format."""
    try:
        head = json.loads((folder / _HEAD).read_text(encoding="utf-8"))
        if head["format"] != FORMAT or any(
            (folder / f"{name}.bin").stat().st_size != head["bytes"][name] for name in _COLUMNS
        ):
            return None
        store = Store(folder, head["about"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return store if store.is_whole() else None


class Store:
    """The rows of one source, mapped.

    Attributes:
        about: what its writer knew about the rows.
        columns: by name, read-only; those with several figures a row are [rows, figures].
    """

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder, self.about = folder, about
        self.columns = {name: _mapped(folder / f"{name}.bin", *_COLUMNS[name]) for name in _COLUMNS}

    def __len__(self) -> int:
        return len(self.columns["ends"])

    def is_whole(self) -> bool:
        """Whether the columns are of one length, and the last row ends where ids and cuts do."""
        ends = self.columns["ends"]
        last = ends[-1].tolist() if len(ends) else [0, 0]
        same = all(len(self.columns[name]) == len(ends) for name in ("counts", "places", "parts"))
        return same and last == [len(self.columns["ids"]), len(self.columns["cuts"])]

    def tokens(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a row (a view of the map) and its cuts as positions in the row."""
        ends = self.columns["ends"]
        begin, cut = ends[index - 1].tolist() if index else (0, 0)
        end, last = ends[index].tolist()
        return self.columns["ids"][begin:end], self.columns["cuts"][cut:last] - begin

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, [rows] int64."""
        return np.diff(self.columns["ends"][:, 0], prepend=0)

    def loss_at(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Whether tokens carry loss, [n] bool, given by row and position in it; of rows, not of pairs."""
        ends = self.columns["ends"]
        before = np.where(rows[:, None] > 0, ends[rows - 1], 0)
        passed = np.searchsorted(self.columns["cuts"], before[:, 0] + positions, side="right") - before[:, 1]
        return passed % 2 == 1

    def prompts(self) -> Iterator[bytes]:
        """The ids (int32) before each row's first cut; rows made of one conversation have those of its first."""
        ends, places, last, prompt = self.columns["ends"], self.columns["places"], None, b""
        with (self.folder / "ids.bin").open("rb") as file:
            for first in range(0, len(ends), _SCANNED >> 8):
                part = slice(first, first + (_SCANNED >> 8))
                begins = [ends[first - 1].tolist() if first else [0, 0], *ends[part].tolist()]
                cuts = self.columns["cuts"][[cut for _, cut in begins[:-1]]].tolist()
                for (begin, _), cut, place in zip(begins, cuts, places[part].tolist(), strict=False):
                    if place != last:
                        file.seek(4 * begin)
                        prompt = file.read(4 * (cut - begin))
                    last = place
                    yield prompt

    def occurrences(self, vocabulary: int) -> np.ndarray:
        """How often each id stands in the rows, [vocabulary] int64."""
        counts = np.zeros(vocabulary, dtype=np.int64)
        with (self.folder / "ids.bin").open("rb") as file:
            while len(ids := np.fromfile(file, dtype="<i4", count=_SCANNED)):
                counts += np.bincount(ids, minlength=vocabulary)
        return counts


def _mapped(path: Path, kind: str, width: int) -> np.ndarray:
    shape = (-1, width) if width > 1 else (-1,)
    if not path.stat().st_size:
        return np.empty(0, dtype=kind).reshape(shape if width == 1 else (0, width))
    return np.asarray(np.memmap(path, dtype=kind, mode="r")).reshape(shape)


@dataclass(frozen=True, eq=False)
class StoredRows(Sequence[T], Generic[T]):
    """Rows of a store, each made when it is asked for."""

    store: Store
    chosen: np.ndarray
    """Which of the store's rows, [rows] int64."""
    make: Make[T]

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[T]: ...
    def __getitem__(self, at: int | slice) -> T | Sequence[T]:
        if isinstance(at, slice):
            return StoredRows(self.store, self.chosen[at], self.make)
        return self.make(*self.store.tokens(int(self.chosen[at])))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, [rows] int64."""
        return self.store.lengths[self.chosen]

    def column(self, name: str) -> np.ndarray:
        """A column of these rows."""
        return self.store.columns[name][self.chosen]


@dataclass(frozen=True, eq=False)
class Joined(Sequence[T], Generic[T]):
    """Several sequences as one."""

    parts: list[StoredRows[T]]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    @overload
    def __getitem__(self, at: int) -> T: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[T]: ...
    def __getitem__(self, at: int | slice) -> T | Sequence[T]:
        if isinstance(at, slice):
            return [self[number] for number in range(*at.indices(len(self)))]
        at = at + len(self) if at < 0 else at
        for part in self.parts:
            if 0 <= at < len(part):
                return part[at]
            at -= len(part)
        raise IndexError("no such row")


def stored_row(ids: np.ndarray, cuts: np.ndarray) -> Row:
    """Makes a row that carries loss between each two of its cuts."""
    labels = np.full(len(ids), IGNORE, dtype=np.int32)
    for start, stop in cuts.reshape(-1, 2).tolist():
        labels[start:stop] = ids[start:stop]
    return Row(ids, labels, np.arange(len(ids), dtype=np.int32))
