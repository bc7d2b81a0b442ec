"""Resume checkpoints inside a stage: exact, and atomic like every other folder.

A checkpoint holds the trainable parameters by name and in their own dtype (peft would reload adapters
in another), optimizer, scheduler, random states and trainer state. It is written under another name,
synced, and renamed; a folder called `checkpoint-N` is complete. Weights and optimizer stand in it whole,
however many processes they were cut over: any other number of them goes on from it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from posttrain.artifact import publish_folder
from posttrain.errors import CheckpointError
from posttrain.merging.writer import aligned
from posttrain.models.gather import cut_like, gather, put_apart, slot_of, write_gathered
from posttrain.pretraining import world

WEIGHTS = "trainable.safetensors"
_PREFIX = "checkpoint-"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    names = [path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None. Half-written ones carry another name and are removed."""
    for torn in folder.glob(f".{_PREFIX}*"):
        shutil.rmtree(torn)
    steps = checkpoint_steps(folder)
    return folder / f"{_PREFIX}{steps[-1]}" if steps else None


def write_checkpoint(
    folder: Path, step: int, keep: int | None, fill: Callable[[Path], None], first: bool = True
) -> Path:
    """Writes `checkpoint-STEP` atomically through `fill`, then removes the oldest beyond `keep`.

    Of several processes all call it, and all fill the folder; the `first` makes and publishes it.
    """
    final, partial = folder / f"{_PREFIX}{step}", folder / f".{_PREFIX}{step}"
    if world.any_of(first and final.exists()):
        return final  # the same step of the same run holds the same bytes
    if first:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    world.wait()
    fill(partial)
    world.wait()
    if first:
        _publish(folder, partial, final, keep)
    world.wait()
    return final


def _publish(folder: Path, partial: Path, final: Path, keep: int | None) -> None:
    publish_folder(partial, final)
    for old in checkpoint_steps(folder)[: -keep if keep else 0]:
        doomed = folder / f".{_PREFIX}{old}"
        (folder / f"{_PREFIX}{old}").rename(doomed)  # a kill while it is removed leaves nothing under its name
        shutil.rmtree(doomed)


def save_trainable(model: torch.nn.Module, folder: Path) -> None:
    """Saves every parameter that takes a gradient, by name, in its own dtype.

    Every process calls it, the first writes; one tensor at a time is whole.
    """
    put_apart(model)
    live = _trainable(model)
    slots = aligned([slot_of(name, param) for name, param in live.items()])
    write_gathered(folder / WEIGHTS, slots, (gather(live[slot.name]) for slot in slots))


def load_trainable(model: torch.nn.Module, folder: Path) -> None:
    """Copies saved parameters back in place, dtypes untouched; every process takes its part.

    Raises:
        CheckpointError: names, shapes or dtypes are not those of the model.
    """
    put_apart(model)
    live = _trainable(model)
    with safe_open(folder / WEIGHTS, framework="pt") as saved, torch.no_grad():
        if odd := sorted(set(saved.keys()) ^ live.keys()):
            found = f"its parameters are not the model's (first: {odd[0]})"
            raise CheckpointError(str(folder), found, "remove it and rerun")
        for name, param in live.items():
            tensor = saved.get_tensor(name)
            if tensor.shape != param.shape or tensor.dtype != param.dtype:
                found = (
                    f"{name} is {list(tensor.shape)} {tensor.dtype}, the model has {list(param.shape)} {param.dtype}"
                )
                raise CheckpointError(str(folder), found, "remove the checkpoint and rerun")
            param.copy_(cut_like(tensor, param))


def _trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}
