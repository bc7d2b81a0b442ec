"""What a runtime and its Accelerate config mean for the estimate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.errors import RecipeError
from posttrain.estimate.spread import Spread
from posttrain.recipe.bundled import find_bundled
from posttrain.stages.spread import spread_of

WANTED = {
    "ddp": Spread("ddp", 8, 2),
    "fsdp2": Spread("fsdp", 8, 2),
    "fsdp2-offload": Spread("fsdp", 8, 2, weights_on_host=True, updates_on_host=True),
    "zero2": Spread("zero2", 8, 2),
    "zero3": Spread("zero3", 8, 2),
}


def runtime(config: object) -> dict[str, object]:
    return {"num_processes": 8, "num_machines": 2, "accelerate_config": str(config)}


@pytest.mark.parametrize("name", WANTED)
def test_bundled_configs(name: str) -> None:
    assert spread_of(runtime(find_bundled("recipes/accelerate", name))) == WANTED[name]


def test_none_is_one_process_or_ddp() -> None:
    assert spread_of({}) == Spread()
    assert spread_of({"num_processes": 4, "num_machines": 1, "accelerate_config": None}) == Spread("ddp", 4)


def test_layers_that_are_not_let_go(tmp_path: Path) -> None:
    text = find_bundled("recipes/accelerate", "fsdp2").read_text(encoding="utf-8")
    path = tmp_path / "own.yaml"
    path.write_text(text.replace("fsdp_reshard_after_forward: true", "fsdp_reshard_after_forward: false"))
    assert spread_of(runtime(path)).gathered_once


def test_a_deepspeed_file_says_it(tmp_path: Path) -> None:
    path, file = tmp_path / "own.yaml", tmp_path / "zero.json"
    path.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: zero.json}\n")
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    assert spread_of(runtime(path)) == Spread("zero3", 8, 2, updates_on_host=True)
    file.write_text("no json")
    with pytest.raises(RecipeError, match="cannot be read"):
        spread_of(runtime(path))
    path.write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 7}\n")
    with pytest.raises(RecipeError, match="zero_stage is 7"):
        spread_of(runtime(path))
