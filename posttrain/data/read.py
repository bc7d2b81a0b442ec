"""Reads one source of a recipe, whatever its format and shape, into rows of the wanted type."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from posttrain.data.files import file_rows, kind_of, source_files
from posttrain.data.hub import is_hub_id, load_hub_rows
from posttrain.data.rows import Dropped, Origin, RawRow, Row
from posttrain.data.select import SelectSpec, side_of, split_keys
from posttrain.data.shapes import FIELDS, Fields, Want, check_format, check_shape, convert, detect_shape, format_text
from posttrain.errors import DataError

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


def read_source(spec: SourceSpec, want: Want, max_rows: int | None = None) -> SourceRows:
    """Reads all rows of a source, in file order, as the wanted type.

    Args:
        spec: the source.
        want: `text` -> TextRow, `chat` -> ChatRow, `pair` -> PairRow, `raw` -> RawRow (fields as they are).
        max_rows: only the first so many, unusable ones counted.

    A split (`spec.select`) is made over all rows, unusable ones included, so that every row belongs to
    exactly one side and each unusable one is reported once. Both sides must be read with the same `want`.

    Raises:
        DataError: a file or row is broken in kind, the shape is unclear, the split leaves nothing, or not
            one row is usable. Rows with unusable content (empty answer, chosen = rejected) are `dropped`.
    """
    name = str(spec.path)
    files, stream = _open(spec)
    stream = islice(stream, None if spec.select else max_rows)
    head = list(islice(stream, DETECT_ROWS))
    if not head:
        raise DataError(name, "holds no rows", "give a source with rows")
    head, stream = _renamed(head, stream, spec.columns, want)
    shape = _shape(spec, want, head)
    converted = [_convert(spec, shape, fields, origin) for origin, fields in chain(head, stream)]
    if spec.select:
        converted = _one_side(converted, spec.select, name)[:max_rows]
    rows = [row for row, reason in converted if reason is None]
    dropped = [Dropped(row.origin, reason) for row, reason in converted if reason is not None]
    if not rows:
        raise _all_dropped(dropped)
    return SourceRows(rows, shape, files, dropped, len(converted))


def _open(spec: SourceSpec) -> tuple[list[str], Iterator[tuple[Origin, Fields]]]:
    if isinstance(spec.path, str):
        at = f"{spec.path}@{spec.revision}" if spec.revision else spec.path
        rows = load_hub_rows(spec.path, spec.name, spec.split, spec.revision)
        return [at], ((Origin(at, number), fields) for number, fields in rows)
    given = [key for key in ("name", "split", "revision") if {"name": spec.name, "split": spec.split}.get(key)]
    if given or spec.revision:
        todo = f"remove {' and '.join(given or ['revision'])}, or give a hub id"
        raise DataError(str(spec.path), "a local file has no subset, split or revision", todo)
    files = source_files(spec.path)
    return [str(file) for file in files], (
        (Origin(str(file), number), fields) for file in files for number, fields in file_rows(file)
    )


def _renamed(
    head: list[tuple[Origin, Fields]], stream: Iterator[tuple[Origin, Fields]], columns: dict[str, str], want: Want
) -> tuple[list[tuple[Origin, Fields]], Iterator[tuple[Origin, Fields]]]:
    """Applies `columns`: a mapped column answers to our name alone, and may take the name of another."""
    if not columns:
        return head, stream
    origin, present = head[0][0], list(dict.fromkeys(name for _, fields in head for name in fields))
    for ours, theirs in columns.items():
        if ours not in FIELDS and want != "raw":
            raise origin.broken(f"columns maps the unknown field `{ours}`", _nearest(ours, FIELDS))
        if theirs not in present:
            raise origin.broken(f"no column `{theirs}` (columns: {{{ours}: {theirs}}})", _nearest(theirs, present))

    def rename(fields: Fields) -> Fields:
        kept = fields if want == "raw" else {k: v for k, v in fields.items() if k not in columns.values()}
        return {**kept, **{ours: fields[theirs] for ours, theirs in columns.items() if theirs in fields}}

    return [(o, rename(fields)) for o, fields in head], ((o, rename(fields)) for o, fields in stream)


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


def _convert(spec: SourceSpec, shape: str, fields: Fields, origin: Origin) -> tuple[Row, str | None]:
    if shape == "raw":
        return RawRow(fields, origin), None
    if spec.text_format is not None:
        return format_text(spec.text_format, fields, origin)
    return convert(shape, fields, origin)


def _one_side(converted: list[tuple[Row, str | None]], select: SelectSpec, name: str) -> list[tuple[Row, str | None]]:
    keys = split_keys([row for row, _ in converted], select.by)
    if select.rows > len(keys):
        raise DataError(name, f"select asks for {select.rows} rows of {len(keys)}", "lower select.rows")
    indices = side_of(keys, select)
    if not indices:
        todo = "lower select.rows" if select.side == "heldout" else "raise select.rows, or split by row"
        raise DataError(name, f"the {select.side} side of the split is empty", todo)
    return [converted[index] for index in indices]


def _all_dropped(dropped: list[Dropped]) -> DataError:
    reasons = Counter(drop.reason for drop in dropped)
    listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    return DataError(
        str(dropped[0].origin),
        f"not one of {len(dropped)} rows is usable, this one first: {listed}",
        "are the right columns read? set `shape:` or `columns:`",
    )
