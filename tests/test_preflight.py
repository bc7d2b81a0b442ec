"""Inputs are read before anything is written: all problems at once, and nothing twice."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from broken.whole import PAIRS, RECIPE, make_whole, write_rows
from runs_support import Project

from posttrain.chat.templates import load_template
from posttrain.errors import RecipeErrors, UserError
from posttrain.pipeline import preflight as module
from posttrain.pipeline.plan import plan
from posttrain.pipeline.preflight import Validated, preflight
from posttrain.recipe.load import load_recipe

BAD_PAIR = {"prompt": "q", "chosen": "a"}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "whole"
    make_whole(folder)
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    """A whole project of this test's own."""
    return Path(shutil.copytree(template, tmp_path / "project"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read as data."""
    found: list[str] = []
    read = module.read_source

    def noted(spec, want, max_rows=None):
        found.append(Path(spec.path).name)
        return read(spec, want, max_rows)

    monkeypatch.setattr(module, "read_source", noted)
    return found


def check(folder: Path, **options: object) -> Validated:
    loaded = load_recipe(folder / "recipe.yaml", [], os.environ)
    return preflight(loaded, plan(loaded, folder / "runs/whole", **options))  # type: ignore[arg-type]


def test_problems_of_all_stages_come_together(folder: Path) -> None:
    write_rows(folder / "chats.jsonl", [{"messages": 3}])
    write_rows(folder / "pairs.jsonl", [*PAIRS, BAD_PAIR])
    (folder / "base/config.json").unlink()
    with pytest.raises(RecipeErrors) as error:
        check(folder)
    assert [Path(problem.where).name for problem in error.value.problems] == [
        "config.json",  # once, though two stages read the model
        "chats.jsonl:1",
        "pairs.jsonl:21",
    ]
    assert error.value.exit_code == 2


def test_what_was_found_whole_is_not_read_again(folder: Path, reads: list[str]) -> None:
    check(folder).save()
    assert sorted(reads) == ["chats.jsonl", "pairs.jsonl", "questions.jsonl", "texts.txt"]
    reads.clear()
    check(folder)
    assert reads == []
    write_rows(folder / "pairs.jsonl", PAIRS[1:])
    check(folder)
    assert reads == ["pairs.jsonl"]


def test_settings_that_change_the_verdict_are_judged_again(folder: Path, reads: list[str]) -> None:
    rows = [{"prompt": "q", "completion": "a"}] * 19 + [{"prompt": "q", "completion": ""}]
    write_rows(folder / "chats.jsonl", rows)
    recipe = folder / "recipe.yaml"
    for limit, accepted in (("0.05", True), ("0.04", False)):
        recipe.write_text(RECIPE.replace("./chats.jsonl}]", f"./chats.jsonl}}], max_dropped: {limit}"))
        if accepted:
            check(folder).save()
        else:
            with pytest.raises(UserError, match=r"1 of 20 rows \(5.0 %\) were dropped: empty answer"):
                check(folder)


def test_only_what_runs_is_read(folder: Path, reads: list[str]) -> None:
    write_rows(folder / "pairs.jsonl", [BAD_PAIR])
    check(folder, until="instruct")
    assert reads == ["chats.jsonl"]


def test_a_suite_reads_no_further_than_it_uses(folder: Path) -> None:
    write_rows(folder / "questions.jsonl", [{"prompt": "q", "answers": ["a"]}, {"prompt": "q"}])
    recipe = folder / "recipe.yaml"
    with pytest.raises(UserError, match=r"questions.jsonl:2: no field `answers`"):
        check(folder)
    recipe.write_text(RECIPE.replace("max_new_tokens: 4", "max_rows: 1"))
    check(folder)


def test_a_refusal_changes_nothing_in_a_run_that_is_there(finished: Project) -> None:
    def tree() -> dict[Path, tuple[int, bytes]]:
        files = [path for path in finished.folder.rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    write_rows(finished.folder / "pairs.jsonl", [*PAIRS, BAD_PAIR])
    before = tree()
    for redo, said in ((("dpo",), "no column `rejected`"), ((), "does not match what was run")):
        with pytest.raises(UserError, match=said):
            finished.go(redo=redo)
    assert tree() == before


def test_a_template_that_begins_twice_is_found_before_anything_runs(folder: Path) -> None:
    tokenizer = folder / "base/tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "bos_token": "<|endoftext|>"}))
    twice = "{{ bos_token }}{{ bos_token }}" + load_template("chatml", folder).source
    (folder / "twice.jinja").write_text(twice)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.replace("chat_template: chatml\n    data", "chat_template: ./twice.jinja\n    data"))
    with pytest.raises(UserError, match=r"recipe.yaml:\d+.*begins a conversation with '<\|endoftext\|>' twice"):
        check(folder)


def test_a_damaged_memory_is_read_again(folder: Path, reads: list[str]) -> None:
    memory = folder / "runs/.cache/validated.json"
    memory.parent.mkdir(parents=True)
    memory.write_text('{"a":')
    check(folder).save()
    assert len(reads) == 4
    assert json.loads(memory.read_text())
