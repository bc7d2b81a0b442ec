"""Tokenised once per content: found again by what decides the tokens, made again where it is not whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import ChatError, DataError
from posttrain.models.lineage import Lineage, Link
from posttrain.recipe.schema import Data
from posttrain.runs import removable
from posttrain.stages import chat_rows, dpo, pair_rows, sft
from posttrain.stages import conversion as conversion_module
from posttrain.stages.conversation import open_chat
from posttrain.stages.prepare import Prepared, prepare
from posttrain.stages.sources import ROWS
from tests.stages.stage_tiny import chats, make_context, preferences, write_lines
from tests.training.spine_tiny import save_base

Tokenise = Callable[..., Any]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    write_lines(tmp_path / "chats.jsonl", chats(120))
    write_lines(tmp_path / "pairs.jsonl", preferences(110))
    return tmp_path


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the rows of every piece that is tokenised in this process."""
    rows: list[int] = []
    for module in (chat_rows, pair_rows):
        tokenise = module.tokenise

        def noted(given: list[Any], *more: Any, own: Tokenise = tokenise) -> Any:
            rows.append(len(given))
            return own(given, *more)

        monkeypatch.setattr(module, "tokenise", noted)
    return rows


def prepared_for(
    run: Path, *paths: str, kind: str = "sft", seed: int = 1, runtime: Any = None, **more: Any
) -> Prepared[Any]:
    sources = [{"path": path} for path in paths]
    data = Data.model_validate({"sources": sources, "max_length": 512, "max_dropped": 1.0, **more})
    context = replace(make_context(run, "stage", kind, runtime=runtime), seed=seed)
    chat = open_chat(Lineage(Link(run / "base", "base", None)), more.pop("template", "chatml"), context)
    return prepare(data, context, {"sft": sft, "dpo": dpo}[kind].conversion(chat, data))


def shown(prepared: Prepared[Any]) -> Any:
    rows = [[(row.ids.tolist(), row.labels.tolist()) for row in source] for source in prepared.rows]
    return rows, prepared.ledger.as_dict(), [place.tolist() for place in prepared.places], prepared.files


def test_the_second_time_rows_are_read(run: Path, made: list[int]) -> None:
    first = shown(prepared_for(run, "./chats.jsonl"))
    assert sum(made) == 120
    assert shown(prepared_for(run, "./chats.jsonl")) == first
    (run / "other").mkdir()
    (run / "chats.jsonl").rename(run / "other" / "named.jsonl")
    moved = shown(prepared_for(run, "./other/named.jsonl", seed=1))
    assert moved[0] == first[0], "neither the path nor the name decides a token"
    assert moved[3] == [str(run / "other" / "named.jsonl")]
    prepared_for(run, "./other/named.jsonl", seed=2, held_out=3)
    assert sum(made) == 120


def test_what_decides_tokens_decides_the_entry(run: Path, made: list[int]) -> None:
    prepared_for(run, "./chats.jsonl")
    for more in ({"max_length": 40}, {"long_rows": "drop"}, {"history": "split"}, {"system": "fold"}):
        before = sum(made)
        prepared_for(run, "./chats.jsonl", **more)  # type: ignore[arg-type]
        assert sum(made) == before + 120, more
    before = sum(made)
    rows = chats(120)
    rows[60]["messages"][1]["content"] = "Another answer."
    write_lines(run / "chats.jsonl", rows)
    prepared_for(run, "./chats.jsonl")
    assert sum(made) == before + 120
    write_lines(run / "more.jsonl", chats(5))
    prepared_for(run, "./more.jsonl", "./chats.jsonl")
    assert sum(made) == before + 125, "each source by itself"
    prepared_for(run, "./pairs.jsonl", kind="dpo")
    prepared_for(run, "./pairs.jsonl", kind="dpo")
    assert len(list((run / ROWS).iterdir())) == 8


def test_a_damaged_entry_is_made_again(run: Path, made: list[int]) -> None:
    first = shown(prepared_for(run, "./chats.jsonl"))
    (entry,) = (run / ROWS).iterdir()
    for damage in (
        lambda: (entry / "ids.bin").write_bytes((entry / "ids.bin").read_bytes()[:-4]),
        lambda: (entry / "store.json").unlink(),
        lambda: (entry / "store.json").write_text("{"),
        lambda: entry.rename(entry.with_name(f".{entry.name}.partial")),
    ):
        before = sum(made)
        damage()
        assert shown(prepared_for(run, "./chats.jsonl")) == first
        assert sum(made) == before + 120
        assert list((run / ROWS).iterdir()) == [entry]


def test_processes_make_the_same_store(run: Path, monkeypatch: pytest.MonkeyPatch, made: list[int]) -> None:
    rows = chats(120)
    rows[8]["messages"].pop()  # no answer
    rows[70]["messages"][1]["content"] = "long " * 300
    write_lines(run / "chats.jsonl", rows)
    monkeypatch.setattr(conversion_module, "_ROWS", 9)
    monkeypatch.setattr(conversion_module, "_ALONE", 2)
    found = {}
    for processes in (1, 3):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # as in a stage: a fork must not wait for threads
        prepared_for(run, "./chats.jsonl", runtime={"dataset_num_proc": processes}, long_rows="drop")
        (entry,) = (run / ROWS).iterdir()
        found[processes] = {path.name: path.read_bytes() for path in entry.iterdir()}
        entry.rename(run / f"entry-{processes}")
    assert found[1] == found[3]
    assert sum(made) == 119 + 17, "the second time all but two pieces were made elsewhere"
    about = json.loads(found[1]["store.json"])["about"]
    assert (about["rows_in"], about["unusable"], about["refused"]) == (
        120,
        {"no assistant turn": 1},
        {"longer than max_length": 1},
    )


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize(
    ("line", "where"),
    [("{", "chats.jsonl:161"), ('{"messages": [{"role": "?"}]}', "chats.jsonl:161"), (None, "chats.jsonl:191")],
)
def test_the_first_broken_row_is_named_whoever_meets_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, processes: int, line: str | None, where: str
) -> None:
    """Row 161 is no JSON, or of no known role; row 191 cannot be rendered."""
    lines = write_lines(run / "chats.jsonl", chats(300)).read_text().splitlines()
    lines[160] = line or lines[160]
    lines[190] = json.dumps(
        {"messages": [{"role": "user", "content": "\ufdd0"}, {"role": "assistant", "content": "a"}]}
    )
    lines[200] = "["
    (run / "chats.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(conversion_module, "_ROWS", 8)
    monkeypatch.setattr(conversion_module, "_ALONE", 1)
    with pytest.raises((DataError, ChatError), match=where):
        prepared_for(run, "./chats.jsonl", runtime={"dataset_num_proc": processes})
    assert list((run / ROWS).glob("[!.]*")) == []


def test_a_source_without_one_usable_row_is_refused_as_ever(run: Path) -> None:
    write_lines(run / "bad.jsonl", [{"messages": [{"role": "user", "content": "?"}]}] * 3)
    with pytest.raises(
        DataError, match=r"bad.jsonl:1: not one of 3 rows is usable, this one first: no assistant turn \(3\)"
    ):
        prepared_for(run, "./bad.jsonl")


def test_prune_lists_the_rows_of_a_run_whose_stages_are_finished(run: Path) -> None:
    prepared_for(run, "./chats.jsonl")
    assert removable(run) == [], "the stage is not finished: its next run reads them"
    (run / "stage.partial").rename(run / "stage")
    (found,) = removable(run)
    assert (found.path, found.why) == (run / ROWS, "tokenised rows of finished stages")
    assert found.bytes > 0
