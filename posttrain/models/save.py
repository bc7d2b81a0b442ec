"""Saves what a stage trained, reloads it from disk, and proves that it is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel

from posttrain.artifact import write_atomically
from posttrain.errors import StageError
from posttrain.merging.writer import write_index
from posttrain.models.files import read_json, verify_adapter_files, verify_model_files
from posttrain.models.gather import digest, gather, is_first, put_apart, write_gathered
from posttrain.models.load import TRAINED
from posttrain.models.stored import Stored, plan_files, stored_whole, to_disk

SHARD = "50GB"
"""Most bytes of a file of weights, as transformers has it."""


def save_full(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype, max_shard_size: int | str = SHARD
) -> dict[str, int]:
    """Saves a whole model in `dtype`, as `save_pretrained` would; the live model keeps its own.

    Every process calls it, the first writes. Parameters that are cut over processes are made whole a few at a
    time and written as they come: no process ever holds the model.

    Returns:
        Digest of every tensor as it was gathered, by its name on disk, for `verify_saved_model`; empty on all
        processes but the first.

    Raises:
        CheckpointError: the disk is full, or does not take what is written; no weights are left in the folder.
    """
    put_apart(model)
    stored = plan_files(model, dtype, max_shard_size)
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
    digests: dict[str, int] = {}
    tensors = _stream(model, stored, dtype)
    try:
        for name, slots in stored.files.items():
            digests |= write_gathered(folder / name, slots, islice(tensors, len(slots)))
        if is_first():
            _write_configs(model, stored, folder, dtype)
    except BaseException:
        if is_first():
            for name in stored.files:
                (folder / name).unlink(missing_ok=True)
        raise
    return digests


def _stream(model: PreTrainedModel, stored: Stored, dtype: torch.dtype) -> Iterator[torch.Tensor | None]:
    """Yields the tensors of all files in the order of their bytes; None on processes that do not write.

    Held at a time is what one group of live tensors becomes, until the last of it is written.
    """
    group_of = {name: number for number, parts in enumerate(stored.parts) for name in parts}
    ready: dict[str, torch.Tensor | None] = {}
    for slots in stored.files.values():
        for slot in slots:
            if slot.name not in ready:
                number = group_of[slot.name]
                whole = {name: gather(stored.live[name], dtype) for name in stored.groups[number]}
                ready |= to_disk(model, whole) if is_first() else dict.fromkeys(stored.parts[number])
            yield ready.pop(slot.name)


def _write_configs(model: PreTrainedModel, stored: Stored, folder: Path, dtype: torch.dtype) -> None:
    """Writes what stands beside the weights: index, config, generation config."""
    if len(stored.files) > 1:
        write_index(folder, stored.files)
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # FSDP2 puts it before a class's name
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    config = read_json(folder / "config.json")
    config["dtype"] = str(dtype).removeprefix("torch.")  # transformers writes the live model's
    if "output_router_logits" in config:
        config["output_router_logits"] = False  # on while a balance loss trains; generation with a cache fails with it
    write_atomically(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    readable(folder)


def save_adapter(model: PeftModel, folder: Path) -> dict[str, int]:
    """Saves the trained adapter alone (no parents, no base) in peft's own format.

    Every process calls it, the first writes.

    Returns:
        Digest of every tensor as it was gathered, by its name on disk, for `verify_saved_adapter`; empty on all
        processes but the first.
    """
    put_apart(model)
    whole = _gather_adapter(model)
    if not is_first():
        return {}
    model.save_pretrained(folder, state_dict=whole, selected_adapters=[TRAINED], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; ours comes with `publish`
    readable(folder)
    named = get_peft_model_state_dict(model, whole, TRAINED, save_embedding_layers=False)
    return {name: digest(tensor) for name, tensor in named.items()}


def _gather_adapter(model: PeftModel) -> dict[str, torch.Tensor | None]:
    """Everything of the trained adapter, whole, by its names in the live model; what is shared stays shared."""
    found = [
        (name, tensor) for name, tensor in model.named_parameters(remove_duplicate=False) if TRAINED in name.split(".")
    ]
    gathered: dict[int, torch.Tensor | None] = {}
    for _, tensor in found:
        if id(tensor) not in gathered:
            gathered[id(tensor)] = gather(tensor)
    return {name: gathered[id(tensor)] for name, tensor in found}


def readable(folder: Path) -> None:
    """Gives files the usual mode: safetensors writes shards that only their owner can read."""
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o644)


def verify_saved_model(model: PreTrainedModel, folder: Path, digests: Mapping[str, int] | None = None) -> None:
    """Checks a saved model against the live one: every tensor there once, right shape, finite, as it was gathered.

    One process is enough: nothing is gathered, and no more than a tensor is in memory.

    Args:
        digests: as `save_full` returned them.

    Raises:
        StageError: naming the tensor.
    """
    verify_model_files(folder)
    live = stored_whole(model)
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in _tensors_of(path):
            if name in found:
                raise StageError(str(path), f"{name} was saved twice, in {found[name].name} as well")
            _check(tensor, name, path, digests)
            if tuple(tensor.shape) != live.get(name):
                raise StageError(str(path), f"{name} was saved as {tuple(tensor.shape)}, not {live.get(name)}")
            found[name] = path
    if missing := sorted(live.keys() - found.keys() - set(model.all_tied_weights_keys)):
        raise StageError(str(folder), f"{missing[0]} was not saved")


def verify_saved_adapter(folder: Path, digests: Mapping[str, int] | None = None) -> None:
    """Checks a saved adapter: readable, finite, as it was gathered, and its second factors are not all zero.

    Args:
        digests: as `save_adapter` returned them.

    Raises:
        StageError: naming the tensor.
    """
    verify_adapter_files(folder)
    path, found, moved = folder / "adapter_model.safetensors", set(), False
    for name, tensor in _tensors_of(path):
        _check(tensor, name, path, digests)
        found.add(name)
        moved |= ("lora_B" in name or "lora_embedding_B" in name) and bool(tensor.any())
    if missing := sorted((digests or {}).keys() - found):
        raise StageError(str(path), f"{missing[0]} was not saved")
    if not moved:
        raise StageError(str(path), "every lora_B is zero: the adapter changes nothing", "check the learning rate")


def _tensors_of(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            yield name, file.get_tensor(name)


def _check(tensor: torch.Tensor, name: str, path: Path, digests: Mapping[str, int] | None) -> None:
    if not tensor.numel():
        raise StageError(str(path), f"{name} is empty")
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise StageError(str(path), f"{name} holds values that are not finite")
    if digests and digests.get(name) != digest(tensor):
        raise StageError(str(path), f"{name} on disk is not what was trained", "check the disk, and rerun")
