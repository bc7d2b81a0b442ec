"""Where and how each stage runs: the recipe's runtime with the stage's own on top."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs_support import Project

from posttrain.errors import UserError
from posttrain.pipeline.runtime import resolve_runtime
from posttrain.recipe.bundled import find_bundled
from posttrain.recipe.load import load_recipe

RECIPE = """\
name: demo
runtime: {device: auto, num_processes: 4, num_machines: 2, accelerate_config: fsdp2}
precision: fp32
stages:
  sft:
    kind: sft
    model: ./base
    data: {sources: [{path: ./chat.jsonl}], max_length: 64}
    method: lora
    runtime: {num_machines: 1, accelerate_config: ./launch/mine.yaml}
  instruct: {kind: merge, model: "@sft"}
  dpo:
    kind: dpo
    model: "@sft"
    data: {sources: [{path: ./pairs.jsonl}], max_length: 64}
    trainer: {beta: 0.1}
  report:
    kind: evaluate
    models: {instruct: "@instruct"}
    runtime: {num_processes: 8}
    suites: [{name: given, kind: bits_per_byte, data: [{path: ./chat.jsonl}]}]
"""
DDP = "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\n"
Resolve = Callable[..., dict[str, Any]]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/mine.yaml").write_text(DDP)
    path = tmp_path / "demo.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def resolve(recipe: Path) -> Resolve:
    """stage, overrides -> its runtime."""
    return lambda stage, *overrides: resolve_runtime(load_recipe(recipe, list(overrides), {}), stage)


def refused(resolve: Resolve, stage: str, *overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        resolve(stage, *overrides)
    assert caught.value.exit_code == 2
    return caught.value


def test_a_stages_own_fields_lie_on_top(resolve: Resolve, recipe: Path) -> None:
    sft, dpo = resolve("sft"), resolve("dpo")
    assert (sft["num_processes"], sft["num_machines"], sft["device"]) == (4, 1, "auto")
    assert (dpo["num_processes"], dpo["num_machines"]) == (4, 2)
    assert sft["accelerate_config"] == str(recipe.parent / "launch/mine.yaml")
    assert dpo["accelerate_config"] == str(find_bundled("recipes/accelerate", "fsdp2"))
    assert resolve("dpo", "stages.dpo.runtime.num_processes=6")["num_processes"] == 6


@pytest.mark.parametrize("stage", ["instruct", "report"])
def test_stages_that_do_not_train_are_one_process(stage: str, resolve: Resolve) -> None:
    found = resolve(stage)
    assert (found["num_processes"], found["num_machines"], found["accelerate_config"]) == (1, 1, None)
    assert found["device"] == "auto"


def test_processes_that_do_not_divide_have_the_place_of_their_number(resolve: Resolve, recipe: Path) -> None:
    error = refused(resolve, "dpo", "runtime.num_machines=3")
    assert error.where == f"{recipe}:2  runtime.num_processes"
    assert error.found == "4 processes do not divide over 3 machines"
    error = refused(resolve, "sft", "runtime.num_machines=1", "stages.sft.runtime.num_machines=3")
    assert error.where == f"{recipe}:2  runtime.num_processes"
    error = refused(resolve, "sft", "stages.sft.runtime.num_processes=5", "stages.sft.runtime.num_machines=3")
    assert error.where == "--set stages.sft.runtime.num_processes"


def test_a_config_that_is_not_there_has_the_place_where_it_is_named(resolve: Resolve, recipe: Path) -> None:
    (recipe.parent / "launch/mine.yaml").unlink()
    error = refused(resolve, "sft")
    assert error.where == f"{recipe}:10  stages.sft.runtime.accelerate_config"
    assert str(recipe.parent / "launch/mine.yaml") in error.found
    assert "ddp, fsdp2" in error.todo


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("distributed_type: [\n", "mine.yaml:"),
        ("distributed_type: TPU\n", "'TPU'"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\n", "not of FSDP2"),
        ("distributed_type: FSDP\ncompute_environment: AMAZON_SAGEMAKER\n", "AMAZON_SAGEMAKER"),
    ],
)
def test_a_config_that_is_broken_has_both_places(text: str, says: str, resolve: Resolve, recipe: Path) -> None:
    (recipe.parent / "launch/mine.yaml").write_text(text)
    error = refused(resolve, "sft")
    assert error.where == f"{recipe}:10  stages.sft.runtime.accelerate_config"
    assert says in error.found
    assert "mine.yaml" in error.found


def test_four_bit_weights_are_not_cut(resolve: Resolve, recipe: Path) -> None:
    error = refused(resolve, "dpo", "stages.dpo.method=qlora")
    assert error.where == f"{recipe}:2  runtime.accelerate_config"
    assert "4-bit weights" in error.found
    assert "ddp" in error.todo
    for allowed in ("stages.dpo.method=lora", "stages.dpo.runtime.accelerate_config=ddp"):
        assert resolve("dpo", allowed)["num_processes"] == 4
    assert resolve("sft", "stages.sft.method=qlora")["accelerate_config"].endswith("mine.yaml")


def test_deepspeed_is_for_gpus(resolve: Resolve, recipe: Path) -> None:
    zero = ("runtime.device=cpu", "stages.dpo.runtime.accelerate_config=zero2")
    error = refused(resolve, "dpo", *zero)
    assert error.where == "--set stages.dpo.runtime.accelerate_config"
    assert "is for GPUs" in error.found
    assert resolve("dpo", zero[1])["accelerate_config"].endswith("zero2.yaml")
    for stage, config in (("dpo", "fsdp2.yaml"), ("sft", "mine.yaml")):
        assert resolve(stage, "runtime.device=cpu")["accelerate_config"].endswith(config)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["runtime.num_processes=3", "runtime.num_machines=2"], "3 processes do not divide over 2 machines"),
        (["runtime.accelerate_config=zero3"], "is for GPUs"),
        (["stages.dpo.runtime={accelerate_config: nowhere.yaml}"], "no file"),
    ],
)
def test_the_command_refuses_before_anything_is_written(project: Project, words: list[str], says: str) -> None:
    done = project.shell(*[part for word in words for part in ("--set", word)])
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not project.runs.exists()
