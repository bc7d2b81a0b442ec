"""A table of broken files: one clear error at the exact place, exit code 2, and nothing written beside them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from posttrain.data.read import SourceSpec, read_source
from posttrain.errors import DataError

PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


BROKEN = {
    "missing column": (
        "f.jsonl",
        lines(PAIR, {"prompt": "q", "chosen": "a"}),
        "pair",
        "f.jsonl:2: no column `rejected`",
    ),
    "empty answers": (
        "f.jsonl",
        lines({**PAIR, "chosen": ""}, {**PAIR, "chosen": " "}),
        "pair",
        "f.jsonl:1: not one of 2 rows is usable, this one first: empty chosen answer (2)",
    ),
    "chosen equals rejected": ("f.jsonl", lines({**PAIR, "rejected": "a"}), "pair", "chosen equals rejected (1)"),
    "wrong type": ("f.jsonl", lines(CHAT, {"messages": 3}), "chat", "f.jsonl:2: `messages` is a number"),
    "unknown role": (
        "f.jsonl",
        lines({"messages": [{"role": "usr", "content": "q"}]}),
        "chat",
        "f.jsonl:1: `messages[0]` has the unknown role 'usr'",
    ),
    "two shapes": ("f.jsonl", lines({**CHAT, "text": "t"}), "chat", "columns of several shapes (text, messages)"),
    "truncated jsonl": ("f.jsonl", lines(CHAT) + b'{"messages": [', "chat", "f.jsonl:2: not valid JSON"),
    "truncated json": ("f.json", json.dumps([CHAT] * 5).encode()[:-20], "chat", "f.json: not valid JSON"),
    "jsonl named json": ("f.json", lines(CHAT, CHAT), "chat", "rename it to .jsonl"),
    "json named jsonl": ("f.jsonl", json.dumps([CHAT]).encode(), "chat", "f.jsonl:1: a row that is a list"),
    "json without rows": ("f.json", b'{"rows": []}', "chat", "f.json: one object with keys rows"),
    "truncated gzip": ("f.jsonl.gz", gzip.compress(lines(*[CHAT] * 99))[:-9], "chat", "cut off or damaged"),
    "damaged gzip": ("f.json.gz", b"\x1f\x8b\x08\x00" + b"\xff" * 60, "chat", "cut off or damaged"),
    "not gzip at all": ("f.jsonl.gz", lines(CHAT), "chat", "f.jsonl.gz:1: gzip data that is cut off or damaged"),
    "gzip without its name": ("f.jsonl", gzip.compress(lines(CHAT)), "chat", "rename it to f.jsonl.gz"),
    "latin-1": ("f.jsonl", lines(CHAT) + b'{"text": "a\xf1o"}', "chat", "f.jsonl:2: not UTF-8 (byte 0xf1"),
    "latin-1 in json": ("f.json", b'[\n{"text":\n"a\xf1o"}]', "text", "f.json:3: not UTF-8"),
    "utf-16": ("f.csv", "text\nhello\n".encode("utf-16"), "text", "f.csv:1: UTF-16 text"),
    "empty file": ("f.jsonl", b"", "chat", "f.jsonl: holds no rows"),
    "only blank lines": ("f.txt", b"\n \n", "text", "f.txt: holds no rows"),
    "empty list": ("f.json", b"[]", "chat", "f.json: holds no rows"),
    "header only": ("f.csv", b"text\n", "text", "f.csv: holds no rows"),
    "ragged csv": ("f.csv", b"text,n\na,1\nb\n", "text", "f.csv:2: 1 cells (up to line 3) under 2 columns"),
    "open quote in csv": ("f.csv", b'text\na\n"b\n', "text", "f.csv:2: not valid CSV"),
    "column named twice": ("f.csv", b"text,text\na,b\n", "text", "empty or repeated names"),
    "not parquet": ("f.parquet", b"PAR1" + b"\0" * 50, "text", "not a readable Parquet file"),
    "100,000 brackets": ("f.json", b"[" * 100_000 + b"]" * 100_000, "chat", "nested more than"),
    "brackets in a line": ("f.jsonl", b'{"text": ' + b"[" * 100_000, "text", "f.jsonl:1: brackets nested"),
    "huge number": ("f.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "text", "f.jsonl:1: not usable JSON"),
    "half a character": ("f.jsonl", b'{"text": "\\ud83d"}', "text", "f.jsonl:1: half of a surrogate pair"),
    "transcripts": (
        "f.jsonl",
        lines(*[{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}] * 150)
        + lines({"chosen": "hello", "rejected": "bye"}),
        "pair",
        "f.jsonl:151: `chosen` is not a transcript",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_one_clear_error_at_the_exact_place(tmp_path: Path, case: str) -> None:
    name, content, want, found = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_source(SourceSpec(tmp_path / name), want)
    assert found in str(error.value)
    assert error.value.where.startswith(str(tmp_path / name))
    assert error.value.todo
    assert error.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_line_of_80_megabytes_behind_80_kilobytes(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * (80 << 20), compresslevel=1))
    with pytest.raises(DataError, match=r"bomb.jsonl.gz:1: a line of more than 67,108,864 bytes"):
        read_source(SourceSpec(path), "text")
