"""`check --show`: what it shows is what the stages then train on, before and after the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from posttrain import cli
from posttrain.pipeline.plan import plan
from posttrain.pretraining.order import rows_of_step
from posttrain.recipe.load import LoadedRecipe, load_recipe
from posttrain.report.token_view import ShownStage
from posttrain.stages.preview import preview
from tests.in_process import run_in_process
from tests.stages.stage_tiny import chats, preferences, write_lines
from tests.training.spine_tiny import save_base

RECIPE = """
name: shown
seed: 3
precision: fp32
runtime: {device: cpu, threads: 1}
stages:
  sft:
    kind: sft
    model: ./base
    chat_template: chatml
    data: {sources: [{path: ./chats.jsonl}], max_length: 60, max_dropped: 0.9}
    method: {lora: {r: 2}}
    trainer: {num_train_epochs: 1, global_batch_size: 4}
  instruct: {kind: merge, model: "@sft"}
  dpo:
    kind: dpo
    model: "@instruct"
    data: {sources: [{path: ./pairs.jsonl}], max_length: 50}
    trainer: {num_train_epochs: 1, global_batch_size: 4}
"""
SCRATCH = """
name: scratch
precision: fp32
runtime: {device: cpu, threads: 1}
stages:
  base:
    kind: pretrain
    init: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}
    tokenizer: {vocab_size: 300}
    data: {sources: [{path: ./texts.jsonl}], max_length: 32}
    trainer: {max_steps: 1, global_batch_size: 1}
  sft:
    kind: sft
    model: "@base"
    chat_template: chatml
    data: {sources: [{path: ./chats.jsonl}], max_length: 60}
    trainer: {max_steps: 1, global_batch_size: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shown")
    save_base(folder / "base")
    write_lines(folder / "chats.jsonl", chats(12))
    write_lines(folder / "pairs.jsonl", preferences(9))
    write_lines(folder / "texts.jsonl", [{"text": "kaixo mundua"}] * 9)
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "scratch.yaml").write_text(SCRATCH)
    return folder


def load(folder: Path, *overrides: str) -> LoadedRecipe:
    return load_recipe(folder / "recipe.yaml", list(overrides), os.environ)


def shown(loaded: LoadedRecipe, runs: Path, stage: str, count: int = 1000) -> ShownStage:
    jobs = {one.stage: one.job for one in plan(loaded, runs).stages}
    return preview(jobs[stage], jobs, count)


def total(stage: ShownStage) -> dict[str, int]:
    tokens = [token for row in stage.rows for part in row.parts for token in part.tokens]
    trained = sum(token.trained for token in tokens)
    cut = sum(row.truncated for row in stage.rows)
    return {"trained": trained, "masked": len(tokens) - trained, "truncated": cut}


def places(folder: Path, steps: int) -> list[str]:
    return [f"{file}:{row}" for step in range(1, steps + 1) for _, file, row in rows_of_step(folder, step)]


def check(folder: Path, recipe: str, *words: str) -> Any:
    return CliRunner().invoke(cli.app, ["check", str(folder / recipe), "--runs-dir", str(folder / "runs"), *words])


def test_shown_rows_are_those_that_train(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder)
    before = {name: shown(loaded, tmp_path / "run", name) for name in ("sft", "dpo")}
    assert not (tmp_path / "run").exists()
    left = run_in_process(loaded, tmp_path / "run")
    for name, rows, steps in (("sft", 12, 3), ("dpo", 9, 3)):
        after = shown(loaded, tmp_path / "run", name)
        assert after == before[name], "the tokenizer and template of a model to come are those it will have"
        assert [row.place for row in after.rows] == places(tmp_path / "run" / name, steps)
        assert len(after.rows) == rows
        ledger = left[name].record.ledger["total"]["tokens"]
        assert total(after) == {key: ledger[key] for key in total(after)}
    assert total(before["sft"])["truncated"] > 0
    assert [part.name for part in before["dpo"].rows[0].parts] == ["prompt", "chosen", "rejected"]


def test_trained_is_the_answer_and_its_end(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder, "stages.sft.data.max_length=500")
    row = next(row for row in shown(loaded, tmp_path, "sft").rows if row.place.endswith("chats.jsonl:1"))
    (part,) = row.parts
    assert "".join(token.text for token in part.tokens if token.trained) == "A country. <|im_end|>"
    assert [token.text for token in part.tokens if token.control] == ["<|im_start|>", "<|im_end|>"] * 2


def test_a_conversation_that_was_split_says_so(folder: Path, tmp_path: Path) -> None:
    words = ("chat_template=qwen3", "data.history=split", "data.max_length=500")
    rows = shown(load(folder, *(f"stages.sft.{word}" for word in words)), tmp_path, "sft").rows
    said = sorted(row.place.partition("chats.jsonl:2")[2] for row in rows if row.place.count("chats.jsonl:2"))
    assert said == [f", row {number} of 2 that it was split into" for number in (1, 2)]


def test_check_prints_rows_of_every_stage_or_of_one(folder: Path) -> None:
    printed = check(folder, "recipe.yaml", "--show", "2").stdout
    assert [line.split(" ·")[0] for line in printed.splitlines() if ", row " in line] == [
        *("sft, row 1", "sft, row 2", "dpo, row 1", "dpo, row 2")
    ]
    assert "«<|im_start|>»a│s│s│i│s│t│a│n│t│↵" in printed.replace("»│", "»")
    assert "\x1b" not in printed
    assert "sft, row" not in check(folder, "recipe.yaml", "--show", "1", "--stage", "dpo").stdout
    assert not (folder / "runs").exists()


def test_check_writes_a_page(folder: Path, tmp_path: Path) -> None:
    done = check(folder, "recipe.yaml", "--show", "2", "--html", str(tmp_path / "rows.html"))
    assert done.exit_code == 0
    assert f"wrote {tmp_path / 'rows.html'}" in done.stdout
    assert "row 1" not in done.stdout
    page = (tmp_path / "rows.html").read_text()
    assert page.count('<div class="row">') == 2 + 2 * 3
    assert [path.name for path in tmp_path.iterdir()] == ["rows.html"]


def test_a_tokenizer_that_does_not_exist_yet_is_said_in_one_line(folder: Path) -> None:
    done = check(folder, "scratch.yaml", "--show", "2")
    assert done.exit_code == 0
    assert "\nsft: no rows yet: its tokenizer is trained by base, which has not run\n" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--html", "a.html"], "does not say how many rows"),
        (["--stage", "sft"], "does not say how many rows"),
        (["--show", "1", "--stage", "sfd"], "did you mean sft"),
        (["--show", "1", "--stage", "instruct"], "is no sft or dpo stage"),
        (["--show", "1", "--html", "/nowhere/a.html"], "its folder does not exist"),
    ],
)
def test_mistakes(folder: Path, words: list[str], message: str) -> None:
    done = check(folder, "recipe.yaml", *words)
    assert done.exit_code != 0
    assert message in str(done.exception)
