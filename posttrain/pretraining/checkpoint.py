"""Resume checkpoints inside a stage: exact, and atomic like every other folder.

A checkpoint holds the trainable parameters by name and in their own dtype (peft would reload adapters
in another), optimizer, scheduler, random states and trainer state. It is written under another name,
synced, and renamed; a folder called `checkpoint-N` is complete.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from posttrain.artifact import publish_folder
from posttrain.errors import CheckpointError

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


def write_checkpoint(folder: Path, step: int, keep: int | None, fill: Callable[[Path], None]) -> Path:
    """Writes `checkpoint-STEP` atomically through `fill`, then removes the oldest beyond `keep`."""
    final = folder / f"{_PREFIX}{step}"
    if final.exists():
        return final  # the same step of the same run holds the same bytes
    partial = folder / f".{_PREFIX}{step}"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    fill(partial)
    publish_folder(partial, final)
    for old in checkpoint_steps(folder)[: -keep if keep else 0]:
        doomed = folder / f".{_PREFIX}{old}"
        (folder / f"{_PREFIX}{old}").rename(doomed)  # a kill while it is removed leaves nothing under its name
        shutil.rmtree(doomed)
    return final


def save_trainable(model: torch.nn.Module, folder: Path) -> None:
    """Saves every parameter that takes a gradient, by name, in its own dtype."""
    tensors = {name: param.detach().contiguous().cpu() for name, param in _trainable(model)}
    save_file(tensors, folder / WEIGHTS)


def load_trainable(model: torch.nn.Module, folder: Path) -> None:
    """Copies saved parameters back in place, dtypes untouched.

    Raises:
        CheckpointError: names, shapes or dtypes are not those of the model.
    """
    saved, live = load_file(folder / WEIGHTS), dict(_trainable(model))
    if saved.keys() != live.keys():
        odd = sorted(saved.keys() ^ live.keys())[0]
        raise CheckpointError(str(folder), f"its parameters are not the model's (first: {odd})", "remove it and rerun")
    with torch.no_grad():
        for name, param in live.items():
            tensor = saved[name]
            if tensor.shape != param.shape or tensor.dtype != param.dtype:
                found = (
                    f"{name} is {list(tensor.shape)} {tensor.dtype}, the model has {list(param.shape)} {param.dtype}"
                )
                raise CheckpointError(str(folder), found, "remove the checkpoint and rerun")
            param.copy_(tensor)


def _trainable(model: torch.nn.Module):
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]
