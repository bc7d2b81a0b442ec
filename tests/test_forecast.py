"""`posttrain check`: what a run needs, as table, as JSON, and as an error where it will not fit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from posttrain.cli import app
from posttrain.errors import UserError
from posttrain.pipeline.plan import plan
from posttrain.recipe.load import load_recipe
from posttrain.stages import expected as expected_module
from posttrain.stages import samples
from posttrain.stages.expected import Expected, expected_rows
from posttrain.stages.nearest import nearest_model
from posttrain.stages.samples import Samples
from tests.in_process import run_in_process
from tests.stages.stage_tiny import chats, preferences, write_lines
from tests.training.spine_tiny import save_base

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
        assert limits.tokens == forecast.PIECE_TOKENS[device]
        assert limits.row_tokens == forecast.ROW_OF_DENSE_MASK[device]


FULL = (
    RECIPE.replace("method: {lora: {r: 16}}", "method: full")
    .replace("global_batch_size: 4", "global_batch_size: 16")
    .replace("micro_batch_tokens: 4096", "num_processes: 8, accelerate_config: fsdp2")
    .replace('  aligned: {kind: merge, model: "@dpo"}\n', "")
)


def test_a_stage_of_eight_processes(recipe: Path) -> None:
    recipe.write_text(FULL)
    told = json.loads(checked(recipe, "--gpu", "h100", "--json"))
    sft, dpo = told["stages"]
    assert told["fits"] is True
    assert (sft["spread"]["kind"], sft["spread"]["processes"]) == ("fsdp", 8)
    assert sft["memory"]["gradients"] == pytest.approx(4 * 8_030_261_248 / 8, rel=1e-4)
    assert (sft["piece"]["tokens"], dpo["piece"]["tokens"]) == (2 * 2048, 2 * 2 * 1024)  # 16 rows over 8 processes
    recipe.write_text(FULL.replace("num_processes: 8, accelerate_config: fsdp2", "num_processes: 1"))
    alone = json.loads(checked(recipe, "--gpu", "200GB", "--json"))["stages"][0]
    assert alone["piece"]["tokens"] > sft["piece"]["tokens"]
    assert alone["rows"] == sft["rows"]
    text = checked(
        recipe, "--gpu", "h200", "--set", "runtime.num_processes=2", "--set", "runtime.accelerate_config=fsdp2"
    )
    assert "memory is that of one of 2 processes (fsdp); time is divided by them" in text


def test_time_is_shared_and_energy_is_not(recipe: Path) -> None:
    one = json.loads(checked(recipe, "--gpu", "h200", "--json"))["stages"][0]
    four = json.loads(checked(recipe, "--gpu", "h200", "--json", "--set", "runtime.num_processes=4"))["stages"][0]
    assert four["seconds"] == pytest.approx(one["seconds"] / 4)
    assert four["watt_hours"] == pytest.approx(one["watt_hours"])
    assert four["memory"]["exchange"] == 4 * one["trainable"]


def test_deepspeed_must_hold_it_whole_first(recipe: Path) -> None:
    recipe.write_text(FULL.replace("fsdp2", "zero3"))
    with pytest.raises(UserError, match="DeepSpeed cuts it after its longest row was tried whole") as caught:
        checked(recipe, "--gpu", "h100")
    assert "accelerate_config: fsdp2" in caught.value.found


TINY = """
name: tiny
seed: 3
precision: fp32
runtime: {device: cpu, threads: 1}
stages:
  base:
    kind: pretrain
    model: ./base
    data: {sources: [{path: ./texts.jsonl, weight: 2}], max_length: 32}
    trainer: {num_train_epochs: 2, global_batch_size: 4}
  sft:
    kind: sft
    model: ./base
    chat_template: chatml
    data:
      sources: [{path: ./chats.jsonl}, {path: ./more.jsonl, rows: 9}]
      max_length: 60
      long_rows: drop
      max_dropped: 0.9
      held_out: 3
    method: {lora: {r: 2}}
    trainer: {num_train_epochs: 1, global_batch_size: 4}
  dpo:
    kind: dpo
    model: "@sft"
    data: {sources: [{path: ./pairs.jsonl}], max_length: 30, max_dropped: 0.5, held_out: 2}
    trainer: {num_train_epochs: 2, global_batch_size: 4}
"""


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    unusable = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}
    write_lines(tmp_path / "texts.jsonl", [{"text": "kaixo mundua " * (1 + number % 5)} for number in range(15)])
    write_lines(tmp_path / "chats.jsonl", [*chats(40), unusable])
    write_lines(tmp_path / "more.jsonl", chats(12))
    write_lines(tmp_path / "pairs.jsonl", preferences(30))
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path / "tiny.yaml"


def expected(recipe: Path, stage: str) -> Expected:
    loaded = load_recipe(recipe, [], os.environ)
    jobs = {one.stage: one.job for one in plan(loaded, recipe.parent / "runs" / "tiny").stages}
    given, template = nearest_model(jobs[stage], jobs, lambda hub: None)
    found = expected_rows(jobs[stage], given, template, Samples())
    assert found is not None
    return found


def rows_of(recipe: Path) -> dict[str, Any]:
    return {stage["stage"]: stage["rows"] for stage in json.loads(checked(recipe, "--json"))["stages"]}


def test_what_is_expected_is_what_the_run_records(tiny: Path) -> None:
    before = {stage: expected(tiny, stage) for stage in ("base", "sft", "dpo")}
    told = rows_of(tiny)
    left = run_in_process(load_recipe(tiny, [], os.environ), tiny.parent / "runs" / "tiny")
    for stage, found in before.items():
        record = left[stage].record
        assert (found.source, found.exact) == ("sample", True)
        assert found.ledger == record.ledger
        assert told[stage]["steps"] == record.summary["metrics"]["steps"]
    assert told["sft"]["dropped"] == sum(before["sft"].ledger["total"]["rows"]["dropped"].values()) > 1
    pairs = left["dpo"].record.summary["metrics"]["pairs"]
    assert before["dpo"].pairs[0] == pairs["plain_tokens"]  # type: ignore[index]
    assert 0 < told["dpo"]["shared"] < told["dpo"]["tokens"] == 2 * pairs["plain_tokens"]
    same = {"steps", "rows", "tokens", "dropped", "rows_in", "reasons", "supervised", "dropped_share"}
    finished = rows_of(tiny)
    for stage, rows in told.items():
        assert finished[stage]["source"] == "record"
        assert {key: rows[key] for key in same} == {key: finished[stage][key] for key in same}
    for stage in ("dpo", "sft", "base"):  # each while the stage that it reads is there
        shutil.rmtree(left[stage].folder)
        again = expected(tiny, stage)
        assert (again.source, again.exact, again.sampled) == ("store", True, None)
        assert (again.ledger, again.longest, again.pairs) == (
            before[stage].ledger,
            before[stage].longest,
            before[stage].pairs,
        )


def test_of_many_rows_some_are_tokenised(tiny: Path) -> None:
    write_lines(tiny.parent / "chats.jsonl", chats(3000))
    write_lines(tiny.parent / "pairs.jsonl", preferences(2000))
    sampled = {stage: expected(tiny, stage) for stage in ("sft", "dpo")}
    run = tiny.parent / "runs" / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "MOST", 5000)
        counted = {stage: expected(tiny, stage) for stage in ("sft", "dpo")}
    for stage, found in sampled.items():
        one, all_ = found.ledger["total"], counted[stage].ledger["total"]
        assert (found.exact, counted[stage].exact, found.sampled) == (False, True, {"sft": 268, "dpo": 256}[stage])
        assert one["rows"]["in"] == all_["rows"]["in"]
        assert one["tokens"]["trained"] == pytest.approx(all_["tokens"]["trained"], rel=0.15)
        assert one["tokens"]["masked"] == pytest.approx(all_["tokens"]["masked"], rel=0.15)
        assert one["rows"]["dropped"].keys() == all_["rows"]["dropped"].keys()
        assert one["rows"]["dropped"] == pytest.approx(all_["rows"]["dropped"], rel=0.15)
    assert sampled["dpo"].ledger["total"]["rows"]["held_out"] == 2
    assert sampled["dpo"].pairs == pytest.approx(counted["dpo"].pairs, rel=0.05)
    assert not run.exists()
    text = checked(tiny)
    assert "sft: tokens of a sample of 268 rows" in text
    assert "more than max_dropped" not in text
    tiny.write_text(TINY.replace("max_dropped: 0.9", "max_dropped: 0.1"))
    assert "of its rows will be dropped, more than max_dropped allows (0.1)" in checked(tiny)
    assert "longer than max_length (~" in text


def test_the_stores_of_some_sources_are_scaled_with_the_samples_of_others(tiny: Path) -> None:
    run_in_process(load_recipe(tiny, [], os.environ), tiny.parent / "runs" / "tiny")
    shutil.rmtree(tiny.parent / "runs" / "tiny" / "sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expected_module, "_EXACT", 0)
        about = expected(tiny, "sft")
        assert (about.source, about.exact) == ("store", False)
    ledger = expected(tiny, "sft").ledger
    assert about.ledger["total"]["rows"] == ledger["total"]["rows"]
    assert about.ledger["total"]["tokens"]["in"] == ledger["total"]["tokens"]["in"]
    write_lines(tiny.parent / "more.jsonl", chats(300))
    mixed = expected(tiny, "sft")
    assert (mixed.source, mixed.exact, mixed.sampled) == ("sample", False, 256)
    assert mixed.ledger["sources"]["chats.jsonl"]["rows"]["in"] == 41


def test_the_first_rows_of_a_large_file_are_sampled(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_WHOLE", 1000)
    monkeypatch.setattr(samples, "_FIRST", 1000)
    write_lines(tiny.parent / "chats.jsonl", chats(4000))
    found = expected(tiny, "sft")
    assert not found.exact
    assert found.ledger["sources"]["chats.jsonl"]["rows"]["in"] == pytest.approx(4000, rel=0.02)


def test_a_row_that_a_template_refuses_is_named(tiny: Path) -> None:
    refuses = "{% for m in messages %}{{ raise_exception('no') if 'forbidden' in m.content }}<|im_start|>{{ m.role }}"
    refuses += "{{ '\\n' }}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    (tiny.parent / "refuses.jinja").write_text(refuses)
    tiny.write_text(TINY.replace("chat_template: chatml", "chat_template: ./refuses.jinja"))
    turns = [{"role": "user", "content": "a forbidden word"}, {"role": "assistant", "content": "a"}]
    write_lines(tiny.parent / "more.jsonl", [*chats(3), {"messages": turns}])
    with pytest.raises(UserError, match=r"more\.jsonl:4"):
        checked(tiny)


def test_rows_are_sampled_without_torch(tiny: Path) -> None:
    words = ["check", str(tiny), "--runs-dir", str(tiny.parent / "runs"), "--json"]
    code = f"import sys; from posttrain.cli import app\ntry: app({words!r})\nexcept SystemExit: pass\n"
    code += "assert 'transformers' in sys.modules and not {'torch', 'peft', 'trl'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {stage["rows"]["source"] for stage in json.loads(done.stdout)["stages"]} == {"sample"}


def test_without_a_tokenizer_tokens_are_bounded(tiny: Path) -> None:
    told = "base: {kind: pretrain, init: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2,"
    told += " intermediate_size: 32}, tokenizer: {vocab_size: 300}, data: {sources: [{path: ./texts.jsonl}],"
    told += " max_length: 32}, trainer: {num_train_epochs: 1, global_batch_size: 4}}\n  sft:"
    whole = TINY[: TINY.index("  base:")] + "  " + told + TINY[TINY.index("  sft:") + 6 :]
    tiny.write_text(whole.replace("model: ./base", 'model: "@base"'))
    rows = rows_of(tiny)
    assert rows["base"]["source"] == "unknown"
    assert rows["sft"]["source"] == rows["dpo"]["source"] == "upper bound"
