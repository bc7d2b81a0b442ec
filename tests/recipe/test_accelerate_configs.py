"""Every Accelerate config that is shipped means to Accelerate what it says: no key is unknown, at any depth."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from posttrain.recipe.accelerate import read_spread

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
CONFIGS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
KINDS = {"ddp": "ddp", "fsdp2": "fsdp", "fsdp2-offload": "fsdp", "zero2": "deepspeed", "zero3": "deepspeed"}


def test_the_five_ways_are_there() -> None:
    assert sorted(KINDS) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys of the first level
    assert config.distributed_type in (DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED)
    assert read_spread(path) == KINDS[name]
    known = {action.dest for action in launch_command_parser()._actions}
    for field in ("fsdp_config", "deepspeed_config"):  # Accelerate sets what stands there without a look
        assert set(getattr(config, field)) <= known, field


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_recipe_says_is_left_to_it(name: str) -> None:
    """Clipping, accumulation and checkpointing come from the recipe; a config that said otherwise would win."""
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert "gradient_clipping" not in config.get("deepspeed_config", {})
    assert config.get("deepspeed_config", {}).get("gradient_accumulation_steps", 1) == 1
    assert config.get("fsdp_config", {}).get("fsdp_activation_checkpointing", False) is False
