"""Reads one source of a recipe, whatever its format and shape, into rows of the wanted type."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, compress, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.files import file_rows, kind_of, source_files
from posttrain.data.hub import is_hub_id, load_hub_rows
from posttrain.data.rows import Dropped, Origin, RawRow, Row
from posttrain.data.select import SelectSpec, choose_rows
from posttrain.data.shapes import FIELDS, Fields, Want, check_format, check_shape, convert, detect_shape, format_text
from posttrain.errors import DataError

if TYPE_CHECKING:
    import numpy as np

DETECT_ROWS = 100
"""Rows whose columns decide the shape."""


@dataclass(frozen=True, slots=True)
class SourceSpec:
    """What to read: a file or folder (`Path`) or a hub id (`str`), and how; fields as in the recipe's source."""

    path: Path | str
    name: str | None = None
    split: str | None = None
    revision: str | None = None
    shape: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    """Our field name -> the column's name in the file."""
    text_format: str | None = None
    select: SelectSpec | None = None


@dataclass(frozen=True, slots=True)
class SourceRows:
    """What was read; `rows_in` = rows + dropped, of the selected side only where the source was split."""

    rows: list[Any]
    shape: str
    """The shape they had: detected or as given; `raw` for raw rows."""
    files: list[str]
    dropped: list[Dropped]
    rows_in: int


def locate(path: str, base: Path) -> Path | str:
    """Tells a file or folder, relative to `base`, from a hub id.

    Raises:
        DataError: neither exists below `base` nor has the form `owner/name`.
    """
    local = base / Path(path).expanduser()
    named_as_file = path.startswith((".", "/", "~")) or kind_of(Path(path)) is not None
    if local.exists() or named_as_file:
        return local
    if is_hub_id(path):
        return path
    raise DataError(path, f"neither a file below {base} nor a hub id", "give a path, or owner/name of a dataset")


@dataclass
class OpenSource:
    """A source whose shape is known; its rows are read as they are asked for, as often as they are, in file order."""

    spec: SourceSpec
    shape: str
    """The shape they have: detected or as given; `raw` for raw rows."""
    files: list[str]
    numbered: Callable[[], Iterator[tuple[Origin, Fields]]]
    """Begins to read all rows, columns renamed."""
    chosen: np.ndarray | None = None
    """Of a split: which rows [rows] (bool) are on the wanted side."""
    max_rows: int | None = None

    def fields(self) -> Iterator[tuple[Origin, Fields]]:
        """Yields the rows as their files have them: those of the selected side, the first `max_rows` alone."""
        rows = self.numbered()
        return islice(rows if self.chosen is None else compress(rows, self.chosen), self.max_rows)

    def convert(self, fields: Fields, origin: Origin) -> tuple[Row, str | None]:
        """Makes a row of the wanted type, and says why it cannot be used (None: it can); raises DataError."""
        if self.shape == "raw":
            return RawRow(fields, origin), None
        if self.spec.text_format is not None:
            return format_text(self.spec.text_format, fields, origin)
        return convert(self.shape, fields, origin)

    def rows(self) -> Iterator[tuple[Row, str | None]]:
        """Yields what `convert` makes of each row."""
        return (self.convert(fields, origin) for origin, fields in self.fields())


def open_source(spec: SourceSpec, want: Want, max_rows: int | None = None) -> OpenSource:
    """Finds the shape of a source by its first rows; where it is split, reads all of it once to choose a side.

    A split (`spec.select`) is made over all rows, unusable ones included, so that every row belongs to
    exactly one side and each unusable one is reported once. Both sides must be read with the same `want`.

    Args:
        spec: the source.
        want: `text` -> TextRow, `chat` -> ChatRow, `pair` -> PairRow, `raw` -> RawRow (fields as they are).
        max_rows: only the first so many, unusable ones counted.

    Raises:
        DataError: no rows, the shape is unclear, the split leaves nothing, or a row that was looked at is
            broken in kind; the others raise it when they are read.
    """
    files, begin = _open(spec)
    first = begin()
    head = list(islice(first, DETECT_ROWS if spec.select or max_rows is None else min(DETECT_ROWS, max_rows)))
    if not head:
        raise DataError(str(spec.path), "holds no rows", "give a source with rows")
    rename = _renaming(head, spec.columns, want)
    read = [chain(head, first)]  # the first reading goes on where the look at the head ended

    def numbered() -> Iterator[tuple[Origin, Fields]]:
        rows = read.pop() if read else begin()
        return rows if rename is None else ((origin, rename(fields)) for origin, fields in rows)

    renamed = head if rename is None else [(origin, rename(fields)) for origin, fields in head]
    source = OpenSource(spec, _shape(spec, want, renamed), files, numbered)
    if spec.select:
        source.chosen = _one_side(source, spec.select)
    source.max_rows = max_rows
    return source


def read_source(spec: SourceSpec, want: Want, max_rows: int | None = None) -> SourceRows:
    """Reads all rows of a source into memory, in file order, as the wanted type; see `open_source`.

    Raises:
        DataError: a file or row is broken in kind, the shape is unclear, the split leaves nothing, or not
            one row is usable. Rows with unusable content (empty answer, chosen = rejected) are `dropped`.
    """
    source = open_source(spec, want, max_rows)
    rows: list[Row] = []
    dropped: list[Dropped] = []
    for row, reason in source.rows():
        if reason is None:
            rows.append(row)
        else:
            dropped.append(Dropped(row.origin, reason))
    if not rows:
        raise nothing_usable(str(dropped[0].origin), Counter(drop.reason for drop in dropped))
    return SourceRows(rows, source.shape, source.files, dropped, len(rows) + len(dropped))


def _open(spec: SourceSpec) -> tuple[list[str], Callable[[], Iterator[tuple[Origin, Fields]]]]:
    """The files of a source, and what begins to read its rows."""
    if isinstance(spec.path, str):
        path, at = spec.path, f"{spec.path}@{spec.revision}" if spec.revision else spec.path
        return [at], lambda: (
            (Origin(at, number), fields) for number, fields in load_hub_rows(path, spec.name, spec.split, spec.revision)
        )
    given = [key for key in ("name", "split", "revision") if {"name": spec.name, "split": spec.split}.get(key)]
    if given or spec.revision:
        todo = f"remove {' and '.join(given or ['revision'])}, or give a hub id"
        raise DataError(str(spec.path), "a local file has no subset, split or revision", todo)
    files = source_files(spec.path)
    return [str(file) for file in files], lambda: (
        (Origin(str(file), number), fields) for file in files for number, fields in file_rows(file)
    )


def _renaming(
    head: list[tuple[Origin, Fields]], columns: dict[str, str], want: Want
) -> Callable[[Fields], Fields] | None:
    """What applies `columns`: a mapped column answers to our name alone, and may take the name of another."""
    if not columns:
        return None
    origin, present = head[0][0], list(dict.fromkeys(name for _, fields in head for name in fields))
    for ours, theirs in columns.items():
        if ours not in FIELDS and want != "raw":
            raise origin.broken(f"columns maps the unknown field `{ours}`", _nearest(ours, FIELDS))
        if theirs not in present:
            raise origin.broken(f"no column `{theirs}` (columns: {{{ours}: {theirs}}})", _nearest(theirs, present))

    def rename(fields: Fields) -> Fields:
        kept = fields if want == "raw" else {k: v for k, v in fields.items() if k not in columns.values()}
        return {**kept, **{ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}}

    return rename


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(known)}"


def _shape(spec: SourceSpec, want: Want, head: list[tuple[Origin, Fields]]) -> str:
    if spec.text_format is not None:
        if want != "text":
            raise DataError(str(spec.path), f"text_format makes texts, not {want} rows", "remove text_format")
        check_format(spec.text_format, str(spec.path))
        return "text"
    if want == "raw":
        return "raw"
    if spec.shape == "auto":
        return detect_shape(head, want)
    check_shape(spec.shape, want, head[0][0])
    return spec.shape


def _one_side(source: OpenSource, select: SelectSpec) -> np.ndarray:
    name = str(source.spec.path)
    chosen = choose_rows(lambda: (row for row, _ in source.rows()), select)
    if select.rows > len(chosen):
        raise DataError(name, f"select asks for {select.rows} rows of {len(chosen)}", "lower select.rows")
    if not chosen.any():
        todo = "lower select.rows" if select.side == "heldout" else "raise select.rows, or split by row"
        raise DataError(name, f"the {select.side} side of the split is empty", todo)
    return chosen


def nothing_usable(first: str, reasons: Counter[str]) -> DataError:
    """Builds the error for a source of which not one row can be used.

    Args:
        first: where the first row stands.
        reasons: how many rows were dropped, by reason.
    """
    listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    return DataError(
        first,
        f"not one of {reasons.total()} rows is usable, this one first: {listed}",
        "are the right columns read? set `shape:` or `columns:`",
    )
