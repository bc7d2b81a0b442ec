"""Saves what a stage trained, reloads it from disk, and proves that it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from posttrain.artifact import write_atomically
from posttrain.errors import StageError
from posttrain.models.files import read_json, verify_adapter_files, verify_model_files
from posttrain.models.load import TRAINED


def save_full(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Saves a whole model in `dtype`; the live model keeps its own. Tied weights are written once."""
    model.save_pretrained(folder, state_dict=_cast(model.state_dict(), dtype))
    config = read_json(folder / "config.json")
    config["dtype"] = str(dtype).removeprefix("torch.")  # transformers writes the live model's
    if "output_router_logits" in config:
        config["output_router_logits"] = False  # on while a balance loss trains; generation with a cache fails with it
    write_atomically(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    readable(folder)


def _cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Casts a state dict; names that share one tensor share its cast, by which transformers knows a tie."""
    cast: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    for tensor in state.values():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in cast:
            cast[key] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
    return {name: cast[tensor.data_ptr(), tuple(tensor.shape)] for name, tensor in state.items()}


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Saves the trained adapter alone (no parents, no base) in peft's own format."""
    model.save_pretrained(folder, selected_adapters=[TRAINED], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; ours comes with `publish`
    readable(folder)


def readable(folder: Path) -> None:
    """Gives files the usual mode: safetensors writes shards that only their owner can read."""
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o644)


def verify_saved_model(model: PreTrainedModel, folder: Path) -> None:
    """Checks a saved model against the live one: every tensor there, right shape, finite.

    Raises:
        StageError: naming the tensor.
    """
    verify_model_files(folder)
    live = _shapes_on_disk(model)
    seen: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                tensor = file.get_tensor(name)
                _check(tensor, name, path)
                if tuple(tensor.shape) != live.get(name):
                    raise StageError(str(path), f"{name} was saved as {tuple(tensor.shape)}, not {live.get(name)}")
                seen.add(name)
    if missing := sorted(live.keys() - seen - set(model.all_tied_weights_keys)):
        raise StageError(str(folder), f"{missing[0]} was not saved")


def _shapes_on_disk(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by the name it has in a checkpoint: transformers fuses experts in memory only."""
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    return {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, state).items()}


def verify_saved_adapter(folder: Path) -> None:
    """Checks a saved adapter: readable, finite, and its second factors are not all zero.

    Raises:
        StageError: naming the tensor.
    """
    verify_adapter_files(folder)
    path, moved = folder / "adapter_model.safetensors", False
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            tensor = file.get_tensor(name)
            _check(tensor, name, path)
            moved |= "lora_B" in name and bool(tensor.any())
    if not moved:
        raise StageError(str(path), "every lora_B is zero: the adapter changes nothing", "check the learning rate")


def _check(tensor: torch.Tensor, name: str, path: Path) -> None:
    if not tensor.numel():
        raise StageError(str(path), f"{name} is empty")
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise StageError(str(path), f"{name} holds values that are not finite")
