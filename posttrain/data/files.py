"""Data files: which ones a source means, and their rows as (row number, dict), read without trust.

Every reader is a generator, reads UTF-8 only (a byte order mark is tolerated), and raises `DataError`
with the file and row where reading stopped. Row numbers are those of `Origin`.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.artifact import visible_files
from posttrain.data.jsontext import BadJson, parse_json
from posttrain.errors import DataError

NumberedRow = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes after decompression, beyond which a file is refused rather than read into memory."""

    line: int = 64 << 20
    whole: int = 2 << 30
    """A JSON document, which has to be parsed in one piece."""
    stream: int = 64 << 30
    """A file that is read line by line."""


LIMITS = Limits()
_KINDS = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".txt": "text", ".text": "text", ".parquet": "parquet"}
_SUPPORTED = "supported: .json, .jsonl, .csv, .txt, .text (each also with .gz) and .parquet"


def kind_of(path: Path) -> str | None:
    """Returns `jsonl`, `json`, `csv`, `text` or `parquet` by a file's name, or None."""
    name = path.name.lower()
    packed = name.endswith(".gz")
    kind = _KINDS.get(Path(name.removesuffix(".gz")).suffix)
    return None if packed and kind == "parquet" else kind


def source_files(path: Path) -> list[Path]:
    """Lists the data files that a source's path means: the file itself, or a folder's, sorted, all of one kind.

    Hidden files and files of other kinds (README.md, LICENSE) are left out.

    Raises:
        DataError: nothing there, nothing supported, or a folder that mixes kinds.
    """
    if path.is_file():
        if kind_of(path) is None:
            raise DataError(str(path), f"not a data file we read (`{path.suffix or path.name}`)", _SUPPORTED)
        return [path]
    if not path.is_dir():
        raise DataError(str(path), "no such file or folder", "give a path that exists, relative to the recipe")
    present = list(visible_files(path))
    files = [file for file in present if kind_of(file)]
    if not files:
        names = ", ".join(str(file.relative_to(path)) for file in present[:5]) or "nothing"
        raise DataError(str(path), f"no data file in this folder, only {names}", _SUPPORTED)
    kinds = {str(kind_of(file)): file.name for file in files}
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise DataError(str(path), f"files of several kinds: {found}", "name one file, or a folder with one kind")
    return files


def file_rows(path: Path, limits: Limits = LIMITS) -> Iterator[NumberedRow]:
    """Yields the rows of one data file with their numbers; an empty file is an error, like every broken row."""
    rows = _READERS[kind_of(path) or ""](path, limits)
    empty = True
    for numbered in rows:
        empty = False
        yield numbered
    if empty:
        raise DataError(str(path), "holds no rows", "remove the file, or write it again")


def _jsonl_rows(path: Path, limits: Limits) -> Iterator[NumberedRow]:
    for number, line in _lines(path, limits):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except BadJson as error:
            cut = "" if line.endswith("\n") else "; the file ends inside this line"
            raise DataError(f"{path}:{number}", f"{error}{cut}", "write this line again as one JSON object") from None
        yield number, _object(row, path, number)


def _json_rows(path: Path, limits: Limits) -> Iterator[NumberedRow]:
    text = _whole_text(path, limits)
    if not text.strip():
        return
    try:
        value = parse_json(text)
    except BadJson as error:
        several = "Extra data" in str(error) and text.lstrip().startswith("{")
        todo = "one object per line is JSONL: rename it to .jsonl" if several else "is it complete? write it again"
        raise DataError(str(path), str(error), todo) from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        keys = f" with keys {', '.join(list(value)[:8])}" if isinstance(value, dict) else ""
        raise DataError(
            str(path),
            f"one {_json_type(value)}{keys}",
            "a JSON file is a list of rows, or an object with a `data` list",
        )
    for number, row in enumerate(rows, 1):
        yield number, _object(row, path, number)


def _csv_rows(path: Path, limits: Limits) -> Iterator[NumberedRow]:
    csv.field_size_limit(limits.line)  # the module's own limit, 128 KB, cuts long documents
    reader = csv.reader((line for _, line in _lines(path, limits)), strict=True)
    header: list[str] | None = None
    number = 0
    try:
        for cells in reader:
            if header is None:
                header = _checked_header(path, cells)
            elif cells:
                number += 1
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}:{number}",
                        f"{len(cells)} cells (up to line {reader.line_num}) under {len(header)} columns",
                        "quote cells that hold commas or line breaks",
                    )
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        found = f"not valid CSV near line {reader.line_num} ({error})"
        raise DataError(f"{path}:{number + 1}", found, "close its quotes, or write the file again") from None


def _checked_header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    if "" in names or len(set(names)) < len(names):
        raise DataError(str(path), f"the header has empty or repeated names: {names}", "name every column once")
    return names


def _text_rows(path: Path, limits: Limits) -> Iterator[NumberedRow]:
    """A document is a block of lines; blank lines separate documents, however many."""
    block: list[str] = []
    start = 0
    for number, line in _lines(path, limits):
        if line.strip():
            start = start if block else number
            block.append(line.rstrip("\r\n"))
        elif block:
            yield start, {"text": "\n".join(block)}
            block = []
    if block:
        yield start, {"text": "\n".join(block)}


def _parquet_rows(path: Path, limits: Limits) -> Iterator[NumberedRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        found = f"not a readable Parquet file ({_first_line(error)})"
        raise DataError(f"{path}:{number + 1}" if number else str(path), found, "write or download it again") from None


_READERS = {
    "jsonl": _jsonl_rows,
    "json": _json_rows,
    "csv": _csv_rows,
    "text": _text_rows,
    "parquet": _parquet_rows,
}


def _object(row: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        todo = 'a row is an object like {"text": …}; a file with one big list is .json, not .jsonl'
        raise DataError(f"{path}:{number}", f"a row that is a {_json_type(row)}", todo)
    return row


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _open(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _whole_text(path: Path, limits: Limits) -> str:
    try:
        with _open(path) as file:
            data = file.read(limits.whole + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(str(path), error) from None
    if len(data) > limits.whole:
        raise DataError(str(path), f"more than {limits.whole:,} bytes of JSON in one piece", "convert it to .jsonl")
    return _decoded(data, path, 1)


def _lines(path: Path, limits: Limits) -> Iterator[tuple[int, str]]:
    number = total = 0
    try:
        with _open(path) as file:
            while line := file.readline(limits.line + 1):
                number, total = number + 1, total + len(line)
                if len(line) > limits.line:
                    todo = "is it one row per line? split this row"
                    raise DataError(f"{path}:{number}", f"a line of more than {limits.line:,} bytes", todo)
                if total > limits.stream:
                    raise DataError(f"{path}:{number}", f"more than {limits.stream:,} bytes", "split the file")
                yield number, _decoded(line, path, number)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(f"{path}:{number + 1}", error) from None


def _decoded(data: bytes, path: Path, number: int) -> str:
    try:
        return data.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = number + data.count(b"\n", 0, error.start)
        found = f"not UTF-8 (byte 0x{data[error.start]:02x}: {error.reason})"
        todo = "convert it, e.g. iconv -f latin1 -t utf-8"
        if data.startswith(b"\x1f\x8b"):
            found, todo = "a gzip file without .gz in its name", f"rename it to {path.name}.gz"
        elif data.startswith((b"\xff\xfe", b"\xfe\xff")):
            found, todo = "UTF-16 text", "convert it: iconv -f utf-16 -t utf-8"
        raise DataError(f"{path}:{line}", found, todo) from None


def _unreadable(where: str, error: Exception) -> DataError:
    if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)):
        return DataError(where, f"gzip data that is cut off or damaged ({error})", "download or compress it again")
    return DataError(where, f"cannot be read ({_first_line(error)})", "check the file and its permissions")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
