"""Accelerate configs: the file that a recipe means, and how it spreads a model over processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from posttrain.errors import RecipeError, UserError
from posttrain.recipe import bundled
from posttrain.recipe.yaml12 import decode, parse

Spread = Literal["ddp", "fsdp", "deepspeed"]
"""Whole on every process with gradients averaged; cut by FSDP2; cut by DeepSpeed's ZeRO."""

_SPREADS: dict[str, Spread] = {
    "NO": "ddp",
    "MULTI_GPU": "ddp",
    "MULTI_CPU": "ddp",
    "FSDP": "fsdp",
    "DEEPSPEED": "deepspeed",
}


def find_accelerate_config(name: str, recipe_dir: Path) -> Path:
    """Absolute path of a config, given as a path from the recipe's folder or as the bare name of a bundled one.

    Raises:
        UserError: neither exists.
    """
    path = (recipe_dir / Path(name).expanduser()).resolve()
    if path.is_file():
        return path
    if len(Path(name).parts) > 1 or path.suffix in (".yaml", ".yml"):
        names = ", ".join(bundled.list_bundled("recipes/accelerate"))
        raise UserError(name, f"no file {path}", f"give the path of an Accelerate config, or one of: {names}")
    return bundled.find_bundled("recipes/accelerate", name)


def read_accelerate_config(path: Path) -> dict[str, Any]:
    """A config as plain values.

    Raises:
        RecipeError: no Accelerate config for a machine of one's own, or a way of spreading that no stage knows.
    """
    document = parse(decode(path.read_bytes(), str(path)), str(path))
    if document.problems:
        raise document.problems[0][1]
    config = document.value if isinstance(document.value, dict) else {}
    kind = config.get("distributed_type")
    if not isinstance(kind, str) or kind not in _SPREADS:
        todo = f"write it with `accelerate config`; known: {', '.join(_SPREADS)}"
        raise RecipeError(str(path), f"distributed_type is {kind!r}", todo)
    if config.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise RecipeError(str(path), f"compute_environment is {config['compute_environment']}", "set LOCAL_MACHINE")
    fsdp = config.get("fsdp_config")
    if kind == "FSDP" and not (isinstance(fsdp, dict) and str(fsdp.get("fsdp_version")) == "2"):
        todo = "set fsdp_version: 2 (see recipes/accelerate/fsdp2.yaml)"
        raise RecipeError(str(path), "fsdp_config is not of FSDP2", todo)
    return config


def read_spread(path: Path) -> Spread:
    """How a config spreads a model; raises as `read_accelerate_config` does."""
    return _SPREADS[read_accelerate_config(path)["distributed_type"]]
