"""Where and how each stage runs: the recipe's `runtime` with the stage's own on top, checked and made absolute."""

from __future__ import annotations

from typing import Any

from posttrain.errors import RecipeError, UserError
from posttrain.recipe.accelerate import find_accelerate_config, read_spread
from posttrain.recipe.load import LoadedRecipe
from posttrain.recipe.schema import AnyStage, Dpo, Sft
from posttrain.stages import KINDS

_ONE_PROCESS = {"num_processes": 1, "num_machines": 1, "accelerate_config": None}


def resolve_runtime(loaded: LoadedRecipe, name: str) -> dict[str, Any]:
    """Returns the runtime of a stage as plain values; one that does not train runs as one process.

    Raises:
        RecipeError: processes that machines cannot share out, or an Accelerate config that is not there, not one,
            or not for this stage.
    """
    stage = loaded.recipe.stages[name]
    own = {} if stage.runtime is None else stage.runtime.model_dump(mode="json", exclude_unset=True)
    runtime = loaded.recipe.runtime.model_dump(mode="json") | own
    if not KINDS[stage.kind].trains:
        return runtime | _ONE_PROCESS

    def at(key: str) -> str:
        return loaded.where("stages", name, "runtime", key) if key in own else loaded.where("runtime", key)

    processes, machines = runtime["num_processes"], runtime["num_machines"]
    if processes % machines:
        found = f"{processes} processes do not divide over {machines} machines"
        raise RecipeError(at("num_processes"), found, "it counts the processes of all machines, one per GPU")
    if runtime["accelerate_config"] is not None:
        where = at("accelerate_config")
        try:
            path = find_accelerate_config(runtime["accelerate_config"], loaded.folder)
            spread = read_spread(path)
        except UserError as error:
            raise error.at(where) from None
        runtime["accelerate_config"] = str(path)
        if spread != "ddp":
            _check_sharding(stage, runtime, spread, where)
    return runtime


def _check_sharding(stage: AnyStage, runtime: dict[str, Any], spread: str, where: str) -> None:
    """Refuses what cannot be cut over processes."""
    if runtime["device"] == "cpu" and spread == "deepspeed":
        raise RecipeError(where, "asks for DeepSpeed, which is for GPUs", "set ddp or fsdp2, or device: cuda")
    if isinstance(stage, (Sft, Dpo)) and stage.method is not None and stage.method.kind == "qlora":
        found = f"asks for {spread}, and 4-bit weights are not cut over processes"
        raise RecipeError(where, found, "set ddp: every process holds the base in 4 bits")
