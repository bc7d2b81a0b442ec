"""Rehearsals: what they substitute, that they say so, and that every stage of every recipe goes through."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest
import torch
import yaml
from in_process import run_in_process
from safetensors.torch import load_file

from posttrain.artifact import Artifact
from posttrain.console import Silent
from posttrain.data.read import SourceSpec, read_source
from posttrain.data.shapes import SHAPES_OF
from posttrain.errors import UserError
from posttrain.models.known_shapes import known_ids, known_shape
from posttrain.models.twin import tiny_config
from posttrain.recipe.bundled import list_bundled
from posttrain.recipe.load import load_recipe
from posttrain.rehearse import prepare, rehearse
from posttrain.rehearse.made_up import ROWS, made_up_questions, made_up_rows

RECIPES = list_bundled("recipes")
QLORA = "zephyr-7b-qlora"
RECIPE = """
name: mine
runtime: {device: cuda, num_processes: 8}
stages:
  sft:
    kind: sft
    model: MODEL
    chat_template: chatml
    data:
      sources:
        - {path: owner/chats, split: train, shape: alpaca, columns: {instruction: question}, rows: 90000}
        - {path: ./rows.jsonl, shape: messages, weight: 3}
    method: lora
    trainer: {optim: adamw_8bit, num_train_epochs: 2, learning_rate: 1e-4}
  instruct: {kind: merge, model: "@sft"}
  report:
    kind: evaluate
    models: {instruct: "@instruct"}
    suites:
      - name: facts
        kind: generate
        data: [{path: owner/questions}]
        prompt_field: q
        max_new_tokens: 500
        checks:
          - {name: right, kind: any_of, field: answers}
          - {name: tongue, kind: language, field: lang}
          - {name: stops, kind: stops}
    require: [{suite: facts, metric: stops, model: instruct, min: 0.9}]
  release: {kind: publish, model: "@instruct", hub: me/model}
"""


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network and an empty hub cache, whatever this machine has."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))


def write_recipe(folder: Path, model: str = "Qwen/Qwen2.5-0.5B") -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(3)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "mine.yaml"
    path.write_text(RECIPE.replace("MODEL", model))
    return path


def test_settings_become_small_and_names_stay(tmp_path: Path) -> None:
    rehearsal, _ = prepare(load_recipe(write_recipe(tmp_path)), tmp_path / "out")
    sft, report = rehearsal.recipe.stages["sft"], rehearsal.recipe.stages["report"]
    assert (rehearsal.recipe.precision, rehearsal.recipe.runtime.device) == ("fp32", "cpu")
    assert rehearsal.recipe.runtime.num_processes == 1
    assert sft.trainer["max_steps"] == 3
    assert sft.trainer["learning_rate"] == 1e-4, "what is not too large is rehearsed as it is"
    assert sft.method.kind == "lora"
    assert sft.chat_template == "chatml"
    assert [source.rows for source in sft.data.sources] == [None, ROWS]
    assert report.suites[0].max_new_tokens == 8
    assert report.require == []
    assert rehearsal.recipe.stages["release"].hub is None


def test_everything_substituted_is_said(tmp_path: Path) -> None:
    _, notes = prepare(load_recipe(write_recipe(tmp_path)), tmp_path / "out")
    said = "\n".join(notes)
    for word in (
        "Qwen/Qwen2.5-0.5B",
        "tokenizer",
        "owner/chats",
        "owner/questions",
        "adamw_8bit",
        "gates",
        "upload",
        "fp32",
    ):
        assert word in said
    assert "rows.jsonl" not in said, "local rows are used as they are"


def test_made_up_rows_stand_under_the_columns_of_the_recipe(tmp_path: Path) -> None:
    rehearsal, _ = prepare(load_recipe(write_recipe(tmp_path)), tmp_path / "out")
    source = rehearsal.recipe.stages["sft"].data.sources[0]
    first = json.loads((rehearsal.folder / source.path).read_text().splitlines()[0])
    assert set(first) == {"question", "input", "output"}
    asked = rehearsal.recipe.stages["report"].suites[0].data[0]
    first = json.loads((rehearsal.folder / asked.path).read_text().splitlines()[0])
    assert set(first) == {"q", "answers", "lang"}


def test_the_twin_has_the_architecture_and_the_control_tokens(tmp_path: Path) -> None:
    from posttrain.chat.tokenizer import load_tokenizer

    rehearsal, _ = prepare(load_recipe(write_recipe(tmp_path)), tmp_path / "out")
    twin = rehearsal.folder / rehearsal.recipe.stages["sft"].model
    config = json.loads((twin / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert config["num_attention_heads"] // config["num_key_value_heads"] == 7
    tokenizer = load_tokenizer(twin)
    for token in ("<|im_start|>", "<|im_end|>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1


def test_a_small_local_model_is_itself_its_twin(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    rehearsal, notes = prepare(load_recipe(write_recipe(tmp_path, "./model")), tmp_path / "out")
    assert rehearsal.recipe.stages["sft"].model == str(model)
    assert not any(note.startswith("model") for note in notes)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ("owner/unheard-of", "shape"),
        ("./nothing", "holds no model"),
        ("./adapter", "adapter"),
        ("./strange", "no twin"),
    ],
)
def test_what_cannot_have_a_twin_is_refused(tmp_path: Path, model: str, found: str) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "strange", "num_attention_heads": 4}')
    with (tmp_path / "strange" / "model.safetensors").open("wb") as weights:
        weights.truncate(1 << 30)  # large on paper only
    with pytest.raises(UserError, match=found) as caught:
        prepare(load_recipe(write_recipe(tmp_path, model)), tmp_path / "out")
    assert caught.value.where == "stages.sft.model"


def test_only_a_rehearsal_is_replaced(tmp_path: Path) -> None:
    loaded, out = load_recipe(write_recipe(tmp_path)), tmp_path / "out"
    prepare(loaded, out)
    prepare(loaded, out)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        prepare(loaded, precious)
    assert (precious / "thesis.txt").is_file()


def test_the_same_recipe_gives_the_same_rehearsal(tmp_path: Path) -> None:
    loaded = load_recipe(write_recipe(tmp_path))
    for out in ("one", "two"):
        prepare(loaded, tmp_path / out)
    for path in sorted((tmp_path / "one").rglob("*")):
        if path.is_file() and path.name != "recipe.yaml":
            assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), path


@pytest.mark.parametrize("shape", sorted({shape for shapes in SHAPES_OF.values() for shape in shapes}))
def test_made_up_rows_are_read_without_loss(shape: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made_up_rows(shape, {})))
    want = next(want for want, shapes in SHAPES_OF.items() if shape in shapes)
    for named in (shape, "auto"):
        read = read_source(SourceSpec(path, shape=named), want)
        assert (len(read.rows), read.shape, read.dropped) == (ROWS, shape, [])


def test_no_two_sources_share_a_question() -> None:
    asked = [row["prompt"] for start in (0, ROWS, 2 * ROWS) for row in made_up_questions("prompt", [], start)]
    assert len(set(asked)) == 3 * ROWS


def test_made_up_answers_are_right() -> None:
    for row in made_up_rows("alpaca", {}):
        a, b = (int(word.strip("?")) for word in row["instruction"].split() if word.strip("?").isdigit())
        assert str(a + b) in row["output"].split()[-1] + row["output"]
        assert f"{a + b}" in {word.strip(".") for word in row["output"].split()}


@pytest.mark.parametrize("model_id", known_ids())
def test_twins_keep_queries_per_key_head(model_id: str) -> None:
    shape = known_shape(model_id)
    assert shape is not None
    tiny = tiny_config(shape.config, 300)
    real = shape.config
    if "num_key_value_heads" in real:
        ratio = real["num_attention_heads"] // real["num_key_value_heads"]
        assert tiny["num_attention_heads"] == ratio * tiny["num_key_value_heads"]
    assert tiny["hidden_size"] % tiny["num_attention_heads"] == 0
    assert (tiny["num_hidden_layers"], tiny["vocab_size"] % 8) == (2, 0)


def features(name: str) -> set[tuple[str, str]]:
    """What a recipe rehearses: architectures, methods and kinds of stages."""
    found = set()
    for stage in load_recipe(name, [], {}).recipe.stages.values():
        found.add(("kind", stage.kind))
        if stage.kind in ("sft", "dpo") and stage.method is not None:
            found.add(("method", stage.method.kind))
        if stage.kind == "sft" and (shape := known_shape(stage.model)):
            found.add(("architecture", shape.architecture))
    return found


def one_for_each(names: list[str]) -> list[str]:
    """A few recipes that have between them every feature of all; the one that adds most comes first."""
    left, chosen = {name: features(name) for name in names}, []
    while most := max(left, key=lambda name: len(left[name])) if any(left.values()) else "":
        chosen.append(most)
        covered = left[most]
        left = {name: own - covered for name, own in left.items()}
    return chosen


FAST = one_for_each(RECIPES)


def test_the_fast_rehearsals_miss_nothing() -> None:
    every = set().union(*(features(name) for name in RECIPES))
    assert set().union(*(features(name) for name in FAST)) == every
    assert {value for key, value in every if key == "architecture"} >= {
        "LlamaForCausalLM", "MistralForCausalLM", "GemmaForCausalLM", "Olmo2ForCausalLM", "OlmoeForCausalLM",
        "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    }  # fmt: skip
    assert len(FAST) < len(RECIPES)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_every_stage_of_every_recipe_goes_through(name: str, tmp_path: Path) -> None:
    """One process for all: each architecture, method and stage kind of the bundled recipes, for real."""
    rehearsal, _ = prepare(load_recipe(name, [], {}), tmp_path / "out")
    left = run_in_process(rehearsal, tmp_path / "run")
    assert list(left) == list(rehearsal.recipe.stages)
    for name_of_stage, artifact in left.items():
        assert artifact.record.files, name_of_stage
    assert (tmp_path / "out" / "published" / "config.json").is_file()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_experts_are_trained_and_merged(tmp_path: Path) -> None:
    name = "olmoe-1b-7b-lora"
    rehearsal, _ = prepare(load_recipe(name, ["stages.sft.trainer.learning_rate=1e-2"], {}), tmp_path / "out")
    run_in_process(rehearsal, tmp_path / "run", until="instruct")
    before = tensors(tmp_path / "out" / rehearsal.recipe.stages["sft"].model)
    after = tensors(tmp_path / "run" / "instruct")
    assert before.keys() == after.keys()
    for part in ("gate_proj", "up_proj", "down_proj", "q_proj"):
        own = [key for key in before if part in key]
        assert own
        moved = [key for key in own if not torch.equal(before[key], after[key])]
        assert len(moved) > 0.7 * len(own), f"{part}: an expert that no token was sent to stays as it is"
    routers = [key for key in before if key.endswith("mlp.gate.weight")]
    assert len(routers) == 2
    assert all(torch.equal(before[key], after[key]) for key in routers)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_balance_loss_is_a_setting(weight: float, tmp_path: Path) -> None:
    """Logged where it is on; and the model that is saved generates, which it cannot with the switch left on."""
    given = [f"stages.{stage}.trainer.router_aux_loss_coef={weight}" for stage in ("sft", "dpo")]
    rehearsal, _ = prepare(load_recipe("olmoe-1b-7b-full", given, {}), tmp_path / "out")
    run_in_process(rehearsal, tmp_path / "run", until="report")
    for stage in ("sft", "dpo"):
        folder = tmp_path / "run" / stage
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert all(("aux_loss" in line) == (weight > 0) for line in lines)
        assert json.loads((folder / "config.json").read_text())["output_router_logits"] is False
    first = json.loads((tmp_path / "run" / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(2) + weight * first.get("aux_loss", 0.0), abs=1e-4)


@pytest.mark.slow
def test_the_whole_rehearsal_takes_less_than_three_minutes(tmp_path: Path) -> None:
    began = time.monotonic()
    run_dir = rehearse(load_recipe(QLORA, [], {}), tmp_path / "out", Silent())
    assert time.monotonic() - began < 180
    stages = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["stages"]
    assert all(Artifact.read(run_dir / stage) for stage in stages)
