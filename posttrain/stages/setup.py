"""What every stage with a model sets up, and asserts that it got: device, dtype, threads, trainable weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType

from posttrain.errors import StageError
from posttrain.models.attention import missing
from posttrain.models.load import DTYPES
from posttrain.recipe.accelerate import Spread, read_spread
from posttrain.recipe.schema import Runtime
from posttrain.stages.context import Context


@dataclass(frozen=True)
class Machine:
    """Where a stage runs."""

    device: str
    """`cpu` or `cuda`."""
    attn_implementation: str
    """What models are loaded with; a training stage asked for `auto` then takes the fastest that does."""
    dtype: torch.dtype
    """Of frozen weights and of autocast."""
    spread: Spread = "ddp"
    """How a model is spread over the stage's processes."""

    @property
    def loading(self) -> str:
        """Device that a model is loaded on: one that is cut over processes never stands whole on a GPU."""
        return "cpu" if self.spread == "fsdp" else self.device


def set_up(context: Context) -> Machine:
    """Chooses device and attention, sets threads and determinism.

    Raises:
        StageError: the recipe asks for a device, dtype, attention backend or number of processes that is not there.
    """
    runtime = context.runtime
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    device = _device(runtime, context.stage)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    _check_processes(context)
    if context.precision == "bf16" and device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name()
        raise StageError(context.stage, f"{name} has no bf16", "set `precision: fp16` (or fp32)")
    attention = "sdpa" if runtime.attn_implementation == "auto" else runtime.attn_implementation
    dtype = DTYPES[context.precision]
    if reason := missing(attention, device, dtype):
        found = f"{attention} {reason}"
        raise StageError(f"stages.{context.stage}, runtime.attn_implementation", found, "set it to auto, sdpa or eager")
    return Machine(device, attention, dtype, _spread(runtime))


def _device(runtime: Runtime, stage: str) -> str:
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise StageError(stage, "runtime.device is cuda, and torch sees no GPU", "set device: auto or cpu")
    return "cuda" if runtime.device != "cpu" and torch.cuda.is_available() else "cpu"


def _check_processes(context: Context) -> None:
    wanted, got = context.runtime.num_processes, context.rank.world
    if wanted != got:
        todo = "check how it is launched; runtime.num_processes counts the processes of all machines"
        raise StageError(context.stage, f"{got} processes started, the recipe asks for {wanted}", todo)


def _spread(runtime: Runtime) -> Spread:
    return read_spread(Path(runtime.accelerate_config)) if runtime.accelerate_config else "ddp"


def assert_spread(trainer: Any, context: Context) -> None:
    """Checks that the model is spread over the processes as the recipe's Accelerate config says.

    Raises:
        StageError: naming what was asked for and what Accelerate made of it.
    """
    wanted, got = _spread(context.runtime), trainer.accelerator.distributed_type
    found = {DistributedType.FSDP: "fsdp", DistributedType.DEEPSPEED: "deepspeed"}.get(got, "ddp")
    processes = trainer.accelerator.num_processes
    if found != wanted or processes != context.rank.world:
        asks = f"asks for {wanted} over {context.rank.world} processes; Accelerate made {got.value} over {processes}"
        todo = "under your own accelerate launch, name the same config in the recipe"
        raise StageError(f"stages.{context.stage}.runtime.accelerate_config", asks, todo)


def assert_trainable(model: torch.nn.Module, stage: str) -> tuple[int, int]:
    """Returns (trainable, all) parameter counts; StageError when nothing trains or a trained weight is not fp32."""
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trained:
        raise StageError(stage, "no parameter is trainable", "check target_modules")
    for name, param in trained:
        if param.dtype != torch.float32:
            raise StageError(stage, f"{name} would be trained in {param.dtype}, not in fp32", "report this")
    return sum(param.numel() for _, param in trained), sum(param.numel() for param in model.parameters())


def assert_gradients(model: torch.nn.Module) -> None:
    """Checks after the first backward that every trainable parameter got a gradient, and not all are zero.

    A LoRA A factor has a zero gradient while its B is still zero, so single zeros are right.

    Raises:
        StageError: a parameter without a gradient, or none that moves.
    """
    moved = False
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if param.grad is None:
            raise StageError("step 1", f"{name} is trainable and got no gradient", "check checkpointing and modules")
        moved = moved or bool(param.grad.any())
    if not moved:
        raise StageError("step 1", "every gradient is zero", "check that the rows carry loss")
