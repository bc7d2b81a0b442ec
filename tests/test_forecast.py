"""`posttrain check`: what a run needs, as table, as JSON, and as an error where it will not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.errors import UserError

RECIPE = """
name: fits
precision: bf16
runtime: {device: cuda, micro_batch_tokens: 4096}
stages:
  sft:
    kind: sft
    model: meta-llama/Llama-3.1-8B@0123456789012345678901234567890123456789
    chat_template: chatml
    data: {sources: [{path: ./rows.jsonl}], max_length: 2048}
    method: {lora: {r: 16}}
    trainer: {global_batch_size: 4, num_train_epochs: 2}
  dpo:
    kind: dpo
    model: "@sft"
    data: {sources: [{path: ./pairs.jsonl}], max_length: 1024}
    trainer: {global_batch_size: 4, num_train_epochs: 1}
  aligned: {kind: merge, model: "@dpo"}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "rows.jsonl").write_text(10 * (json.dumps({"messages": turns}) + "\n"))
    (tmp_path / "pairs.jsonl").write_text(6 * (json.dumps({"prompt": "q", "chosen": "a", "rejected": "b"}) + "\n"))
    (tmp_path / "fits.yaml").write_text(RECIPE)
    return tmp_path / "fits.yaml"


def checked(recipe: Path, *words: str) -> str:
    made = CliRunner().invoke(app, ["check", str(recipe), "--runs-dir", str(recipe.parent / "runs"), *words])
    if made.exception is not None and not isinstance(made.exception, SystemExit):
        raise made.exception
    return made.stdout


def test_json_is_all_there_is(recipe: Path) -> None:
    told = json.loads(checked(recipe, "--gpu", "h200", "--json"))
    sft, dpo, aligned = told["stages"]
    assert told["fits"] is True
    assert told["device"]["name"] == "h200"
    assert sft["parameters"] == dpo["parameters"] == aligned["parameters"] == 8_030_261_248
    assert sft["trainable"] == dpo["trainable"] == 41_943_040
    assert sft["memory"]["weights"] == 2 * 8_030_261_248
    assert dpo["memory"]["weights"] - sft["memory"]["weights"] == 4 * sft["trainable"]  # the frozen adapter below
    assert (sft["rows"]["rows"], sft["rows"]["steps"], sft["rows"]["source"]) == (20, 5, "upper bound")
    assert sft["piece"]["tokens"] == 4096
    assert sft["seconds"] > 0
    assert aligned["disk"] == 2 * 8_030_261_248


def test_the_table_fits_100_columns(recipe: Path) -> None:
    text = checked(recipe, "--gpu", "h200").partition("\nestimate ")[2]
    assert "on h200, 139.8 GiB" in text
    table = text.splitlines()[1:5]
    assert [line.split()[0] for line in table] == ["stage", "sft", "dpo", "aligned"]
    assert max(map(len, table)) <= 100


def test_what_will_not_fit_is_an_error_that_says_what_would(recipe: Path) -> None:
    with pytest.raises(UserError) as caught:
        checked(recipe, "--gpu", "16GB")
    assert caught.value.exit_code == 2
    assert "sft will not fit" in caught.value.found
    assert "most of it weights" in caught.value.found
    assert "method: qlora" in caught.value.found


def test_the_device_is_refused_before_the_recipe_is_read(recipe: Path) -> None:
    with pytest.raises(UserError, match="no device that is known"):
        checked(recipe.with_name("absent.yaml"), "--gpu", "abacus")


def test_a_plan_is_estimated_without_torch(recipe: Path) -> None:
    words = ["check", str(recipe), "--runs-dir", str(recipe.parent / "runs"), "--gpu", "h200", "--json"]
    heavy = "{'torch', 'transformers', 'peft'} & set(sys.modules)"
    code = (
        f"import sys; from posttrain.cli import app\ntry: app({words!r})\nexcept SystemExit: pass\nassert not {heavy}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_rows_are_cut_as_stages_cut_them() -> None:
    from posttrain.pipeline import forecast
    from posttrain.training.limits import piece_limits

    for device in ("cpu", "cuda"):
        limits = piece_limits(device, None, None, "sdpa")
        assert limits.tokens == forecast._TOKENS[device]
        assert limits.row_tokens == forecast._ROW_OF_DENSE_MASK[device]
