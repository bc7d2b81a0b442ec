"""A few rows of each data source, drawn by a fixed seed: what `posttrain check` tokenises instead of all of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from posttrain.artifact import fingerprint
from posttrain.data.files import source_files
from posttrain.data.read import SourceRows, SourceSpec, open_source, read_source
from posttrain.recipe.schema import Source
from posttrain.stages.sources import WANTED, source_spec

MOST = 256
"""Rows drawn of a source."""
_CHARACTERS = 1 << 20
"""Characters of rows after which no more are drawn: a second of tokenising."""
_WHOLE = 64 << 20
"""Bytes of local data up to which all rows are read; of larger files only the first rows are."""
_FIRST = 20_000
_SEED = 0


@dataclass(frozen=True)
class Sample:
    """Usable rows of a source, in file order, and how many there are."""

    rows: list[Any]
    usable: int
    """Rows of the source that can be rendered."""
    unusable: Counter[str]
    """Reason -> rows that cannot."""
    counted: bool = True
    """Whether the figures are counted; else they are extrapolated by bytes."""

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the source."""
        return self.counted and len(self.rows) == self.usable


class Samples:
    """Samples of the sources of a plan, by what is read and how; none is read twice.

    Attributes:
        chats: tokenizers with their templates, by folder and template: stages share them, and large ones take a second.
    """

    def __init__(self) -> None:
        self.chats: dict[tuple[str, str | None], Any] = {}
        self._drawn: dict[str, Sample | None] = {}

    def keep(self, kind: str, source: Source, recipe_dir: Path, read: SourceRows) -> None:
        """Draws from a source that a stage of some kind reads, and that has just been read as a whole."""
        key = _key(kind, source, source_spec(source, recipe_dir))
        self._drawn[key] = draw(read.rows, Counter(drop.reason for drop in read.dropped))

    def of(self, kind: str, source: Source, recipe_dir: Path) -> Sample | None:
        """The sample of a source that a stage of some kind reads; None where it is not cheap to have.

        Raises:
            DataError: a row that is read is broken.
        """
        spec = source_spec(source, recipe_dir)
        key = _key(kind, source, spec)
        if key not in self._drawn:
            self._drawn[key] = _read(spec, kind)
        return self._drawn[key]


def draw(rows: list[Any], unusable: Counter[str], counted: bool = True, times: float = 1.0) -> Sample:
    """Draws at most `MOST` rows, fewer where they are long.

    Args:
        times: rows of the source for each that was read.
    """
    chosen, size = [], 0
    for number in Random(_SEED).sample(range(len(rows)), min(MOST, len(rows))):
        chosen.append(number)
        size += len(str(rows[number]))
        if size > _CHARACTERS:
            break
    scaled = Counter({reason: round(times * count) for reason, count in unusable.items()})
    return Sample([rows[number] for number in sorted(chosen)], round(times * len(rows)), scaled, counted)


def _key(kind: str, source: Source, spec: SourceSpec) -> str:
    settings = source.model_dump(mode="json", exclude_none=True, exclude={"path", "weight", "rows"})
    return fingerprint([WANTED[kind], str(spec.path), settings])


def _read(spec: SourceSpec, kind: str) -> Sample | None:
    if isinstance(spec.path, str):
        return None
    files = source_files(spec.path)
    size = sum(file.stat().st_size for file in files)
    if size <= _WHOLE:
        read = read_source(spec, WANTED[kind])
        return draw(read.rows, Counter(drop.reason for drop in read.dropped))
    if spec.select is not None or any(file.suffix != ".jsonl" for file in files):
        return None
    return _begin(spec, kind, files[0], size)


def _begin(spec: SourceSpec, kind: str, first: Path, size: int) -> Sample:
    """Draws from the first rows of large JSON Lines; how many rows there are is told by the bytes of these."""
    rows, unusable = [], Counter[str]()
    for row, reason in islice(open_source(spec, WANTED[kind]).rows(), _FIRST):
        if reason is None:
            rows.append(row)
        else:
            unusable[reason] += 1
    with first.open("rb") as file:
        lines = [line for line in islice(file, _FIRST) if line.strip()]
    times = size / (sum(map(len, lines)) / len(lines)) / (len(rows) + unusable.total())
    return draw(rows, unusable, False, times)
