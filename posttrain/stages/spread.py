"""How a stage's runtime spreads its model over processes, as the estimate counts it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import RecipeError
from posttrain.estimate.spread import Kind, Spread
from posttrain.recipe.accelerate import read_accelerate_config, read_spread

_ZERO: dict[int, Kind] = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}
_HOSTS = ("cpu", "nvme")


def spread_of(runtime: Mapping[str, Any]) -> Spread:
    """Reads what a resolved runtime says of processes, and of its Accelerate config how they share the model.

    Args:
        runtime: with `accelerate_config` as an absolute path, or None.

    Raises:
        RecipeError: no Accelerate config that a stage knows.
    """
    processes, machines = int(runtime.get("num_processes") or 1), int(runtime.get("num_machines") or 1)
    config = runtime.get("accelerate_config")
    if config is None:
        return Spread("ddp", processes, machines)
    path = Path(config)
    kind, settings = read_spread(path), read_accelerate_config(path)
    if kind == "fsdp":
        fsdp = settings["fsdp_config"]
        host = _is_set(fsdp.get("fsdp_offload_params"))
        whole = not _is_set(fsdp.get("fsdp_reshard_after_forward", True))
        return Spread("fsdp", processes, machines, host, host, whole)
    if kind == "deepspeed":
        return _of_deepspeed(path, settings.get("deepspeed_config") or {}, processes, machines)
    return Spread("ddp", processes, machines)


def _of_deepspeed(path: Path, settings: Mapping[str, Any], processes: int, machines: int) -> Spread:
    """ZeRO's stage and what it keeps on the host, from Accelerate's own keys or from the file they name."""
    given = settings.get("deepspeed_config_file")
    if given:
        file = path.parent / Path(given).expanduser()
        try:
            zero = json.loads(file.read_text(encoding="utf-8")).get("zero_optimization", {})
        except (OSError, ValueError) as error:
            found = f"its deepspeed_config_file cannot be read ({error})"
            raise RecipeError(str(path), found, "give the path of a DeepSpeed config in JSON") from None
        stage = zero.get("stage", 0)
        weights, updates = ((zero.get(key) or {}).get("device") for key in ("offload_param", "offload_optimizer"))
    else:
        stage = settings.get("zero_stage", 2)
        weights, updates = (settings.get(f"offload_{key}_device") for key in ("param", "optimizer"))
    if stage not in _ZERO:
        raise RecipeError(str(path), f"zero_stage is {stage!r}", "set 1, 2 or 3")
    return Spread(_ZERO[stage], processes, machines, weights in _HOSTS, updates in _HOSTS)


def _is_set(value: Any) -> bool:
    """A flag as Accelerate's configs spell it: a boolean, or a word."""
    return str(value).lower() in ("true", "1")
