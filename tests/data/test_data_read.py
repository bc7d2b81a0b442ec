"""Whole sources: mapped columns, texts from any row, splits, dropped rows, and the refusals in between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.read import SourceSpec, locate, read_source
from posttrain.data.rows import ChatRow, Dropped, Origin, RawRow
from posttrain.data.select import SelectSpec
from posttrain.errors import DataError

QUESTIONS = [{"question": f"q{n % 6}", "answer": f"a{n}" if n else "", "id": n} for n in range(12)]
COLUMNS = {"prompt": "question", "completion": "answer"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "f.jsonl", QUESTIONS)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_columns_are_mapped_and_unusable_rows_reported(file: Path) -> None:
    source = read_source(SourceSpec(file, columns=COLUMNS), "chat")
    assert source.shape == "prompt_completion"
    assert source.files == [str(file)]
    assert source.rows_in == 12
    assert source.dropped == [Dropped(Origin(str(file), 1), "empty answer")]
    messages = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]
    assert source.rows[0] == ChatRow(messages, None, Origin(str(file), 2))


def test_columns_may_swap_names(tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", [{"prompt": "q", "chosen": "bad", "rejected": "good"}])
    spec = SourceSpec(file, columns={"chosen": "rejected", "rejected": "chosen"})
    assert read_source(spec, "pair").rows[0].chosen[0]["content"] == "good"


def test_raw_rows_keep_their_fields(file: Path) -> None:
    source = read_source(SourceSpec(file, columns={"prompt": "question"}), "raw", max_rows=2)
    assert source.shape == "raw"
    assert source.rows[1] == RawRow({**QUESTIONS[1], "prompt": "q1"}, Origin(str(file), 2))
    assert source.rows_in == 2


def test_text_format_reads_any_row(file: Path) -> None:
    source = read_source(SourceSpec(file, text_format="{question} {answer}"), "text", max_rows=3)
    assert [row.text for row in source.rows] == ["q0 ", "q1 a1", "q2 a2"]
    assert source.shape == "text"


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.jsonl", [{"text": name}])
    source = read_source(SourceSpec(tmp_path), "text")
    assert [row.text for row in source.rows] == ["a", "b"]
    assert [row.origin for row in source.rows] == [Origin(file, 1) for file in source.files]


@pytest.mark.parametrize("by", ["prompt", "row"])
def test_every_row_is_on_one_side_of_a_split(file: Path, by: Any) -> None:
    sides = [
        read_source(SourceSpec(file, columns=COLUMNS, select=SelectSpec(6, side, by)), "chat")
        for side in ("train", "heldout")
    ]
    origins = [{row.origin.row for row in [*side.rows, *side.dropped]} for side in sides]
    assert origins[0] | origins[1] == set(range(1, 13))
    assert not origins[0] & origins[1]
    assert [side.rows_in for side in sides] == [6, 6]
    if by == "prompt":
        prompts = [{row.messages[0]["content"] for row in side.rows} for side in sides]
        assert not prompts[0] & prompts[1]


def test_max_rows_cuts_the_wanted_side(file: Path) -> None:
    spec = SourceSpec(file, columns=COLUMNS, select=SelectSpec(6, "heldout", "row"))
    assert read_source(spec, "chat", max_rows=2).rows_in == 2


@pytest.mark.parametrize(
    ("fields", "want", "found"),
    [
        ({"columns": {"promt": "question"}}, "chat", "unknown field `promt`.*\n.*did you mean `prompt`"),
        ({"columns": {"prompt": "questoin"}}, "chat", "no column `questoin`.*\n.*did you mean `question`"),
        ({"columns": COLUMNS, "shape": "alpaca"}, "chat", "no column `instruction`"),
        ({"shape": "preference"}, "chat", "rows of shape preference"),
        ({"text_format": "{question}"}, "chat", "text_format makes texts"),
        ({"text_format": "{prompt}"}, "text", "no column 'prompt'"),
        ({"split": "train"}, "chat", "no subset, split or revision"),
        ({"revision": "main"}, "chat", "no subset, split or revision"),
        ({"columns": COLUMNS, "select": SelectSpec(13, "train")}, "chat", "13 rows of 12"),
        ({"columns": COLUMNS, "select": SelectSpec(12, "heldout")}, "chat", "heldout side of the split is empty"),
        ({"columns": COLUMNS, "select": SelectSpec(1, "train")}, "chat", "train side of the split is empty"),
    ],
)
def test_refusals(file: Path, fields: dict[str, Any], want: Any, found: str) -> None:
    with pytest.raises(DataError, match=found):
        read_source(SourceSpec(file, **fields), want)


def test_a_source_without_one_usable_row_is_an_error_at_the_first(tmp_path: Path) -> None:
    file = write(tmp_path / "f.jsonl", [{"prompt": "q", "completion": ""}] * 3)
    with pytest.raises(DataError, match=r"f\.jsonl:1: not one of 3 rows is usable.*empty answer \(3\)"):
        read_source(SourceSpec(file), "chat")


def test_a_row_broken_far_down_is_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "t"}] * 200
    file = write(tmp_path / "f.jsonl", [*rows, {"text": 5}])
    with pytest.raises(DataError, match=r"f\.jsonl:201: `text` is a number"):
        read_source(SourceSpec(file), "text")
    assert read_source(SourceSpec(file), "text", max_rows=200).rows_in == 200


def test_locate_tells_paths_from_hub_ids(tmp_path: Path) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name", tmp_path) == tmp_path / "owner" / "name"
    assert locate("owner/other", tmp_path) == "owner/other"
    assert locate("data/rows.jsonl", tmp_path) == tmp_path / "data" / "rows.jsonl"
    assert locate("./owner", tmp_path) == tmp_path / "owner"
    assert locate("../x/y", tmp_path) == tmp_path / ".." / "x" / "y"
    with pytest.raises(DataError, match="neither a file below"):
        locate("ultrachat", tmp_path)
