"""Which files a source means, and their rows: every format gives the same rows with the numbers people look for."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.data.files import Limits, file_rows, source_files
from posttrain.data.jsontext import MAX_DEPTH, BadJson, parse_json
from posttrain.errors import DataError

ROWS = [{"text": "Què és Andorra?"}, {"text": 'two\nlines, and a "quote"'}, {"text": "három"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "data.json", "a.csv", "a.csv.gz"])
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = {
        "jsonl": JSONL,
        "json": json.dumps({"version": 1, "data": ROWS} if name == "data.json" else ROWS),
        "csv": 'text\r\nQuè és Andorra?\r\n"two\nlines, and a ""quote"""\r\nhárom\r\n',
    }[name.split(".")[1]].encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(file_rows(path)) == list(enumerate(ROWS, 1))


def test_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS * 600)
    assert list(file_rows(tmp_path / "a.parquet")) == list(enumerate(ROWS * 600, 1))


def test_byte_order_mark_and_blank_lines_keep_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\n\n  \n{"a": 2}')
    assert list(file_rows(path)) == [(1, {"a": 1}), (4, {"a": 2})]


def test_text_documents_are_blocks_numbered_by_their_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\r\ntwo\r\n \r\n\r\n  three\n")
    assert list(file_rows(path)) == [(3, {"text": "one\ntwo"}), (7, {"text": "  three"})]


def test_folder_lists_its_data_files_sorted_and_ignores_the_rest(tmp_path: Path) -> None:
    for name in ("b.jsonl", "sub/a.jsonl.gz", ".hidden.jsonl", ".git/x.jsonl", "README.md", "LICENSE"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(file.relative_to(tmp_path)) for file in source_files(tmp_path)] == ["b.jsonl", "sub/a.jsonl.gz"]
    assert source_files(tmp_path / "b.jsonl") == [tmp_path / "b.jsonl"]


@pytest.mark.parametrize(
    ("names", "path", "found"),
    [
        ([], "absent.jsonl", "no such file"),
        (["x.jsonl.zst"], "x.jsonl.zst", "not a data file"),
        (["x.parquet.gz"], "x.parquet.gz", "not a data file"),
        (["data.arrow", "state.md"], ".", "data.arrow, state.md"),
        ([".hidden.json"], ".", "only nothing"),
        (["a.json", "a.jsonl"], ".", "several kinds: json .a.json., jsonl .a.jsonl."),
    ],
)
def test_source_files_refusals(tmp_path: Path, names: list[str], path: str, found: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=found):
        source_files(tmp_path / path)


def test_sizes_are_capped_after_decompression(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "short"}\n{"text": "' + b"x" * 100_000 + b'"}\n'))
    with pytest.raises(DataError, match=r"a.jsonl.gz:2: a line of more than 1,000 bytes"):
        list(file_rows(path, Limits(line=1_000)))
    with pytest.raises(DataError, match=r"a.jsonl.gz:2: more than 5,000 bytes"):
        list(file_rows(path, Limits(stream=5_000)))
    whole = tmp_path / "a.json.gz"
    whole.write_bytes(gzip.compress(b"[" + b" " * 100_000 + b"]"))
    with pytest.raises(DataError, match="more than 10,000 bytes of JSON in one piece"):
        list(file_rows(whole, Limits(whole=10_000)))


def test_nesting_is_counted_outside_strings() -> None:
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deepest)
    assert parse_json(json.dumps(["[{" * 5000, '\\"[' * 5000, "]"]))[2] == "]"
    assert len(parse_json("[" + "[],{}," * 5000 + "[]]")) == 10_001
    for text in (f"[{deepest}]", "[" * 100_000, '{"a":' * 100_000):
        with pytest.raises(BadJson, match="nested"):
            parse_json(text)


@pytest.mark.parametrize(
    "text", ['{"a": NaN}', '{"a": -Infinity}', '{"a": "\\ud83d"}', "1" * 5000, "{'a': 1}", '"\\"\\"\\"' * 100_000]
)
def test_json_that_would_break_something_later_is_refused(text: str) -> None:
    with pytest.raises(BadJson):
        parse_json(text)


def test_a_whole_surrogate_pair_is_text() -> None:
    assert parse_json('"\\ud83d\\ude00 \\u00e9"') == "😀 é"


def test_nothing_heavy_is_imported_to_read_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(JSONL)
    code = (
        "import sys; from pathlib import Path; import posttrain.data.ledger\n"
        "from posttrain.data.read import SourceSpec, read_source\n"
        f"assert len(read_source(SourceSpec(Path({str(tmp_path / 'a.jsonl')!r})), 'text').rows) == 3\n"
        "print([m for m in ('torch', 'datasets', 'pyarrow', 'huggingface_hub', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
