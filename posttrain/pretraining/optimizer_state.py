"""The optimizer of a resume checkpoint: whole, by the names of its parameters, however many processes share it.

An optimizer whose parameters are whole is saved as torch saves it (`optimizer.pt`). One whose parameters are
cut by FSDP2 is gathered one tensor at a time into `optimizer.safetensors`, with its settings in
`optimizer.json`; the whole of it, twice the size of an fp32 model, is in no process's memory. Either is loaded
into either.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from posttrain.artifact import write_atomically
from posttrain.errors import CheckpointError
from posttrain.merging.writer import aligned
from posttrain.models.gather import cut_like, gather, is_first, put_apart, slot_of, write_gathered

WHOLE, CUT, SETTINGS = "optimizer.pt", "optimizer.safetensors", "optimizer.json"
_AGAIN = "remove the checkpoint and rerun"


def save_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Saves an optimizer of a model's parameters; every process calls it, the first writes.

    Raises:
        CheckpointError: it keeps tensors that are not cut as their parameters are.
    """
    params = _params(optimizer)
    if not any(isinstance(param, DTensor) for param in params):
        if is_first():
            torch.save(optimizer.state_dict(), folder / WHOLE)
        return
    put_apart(model)
    names = _names(model, params)
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for name, param in zip(names, params, strict=True):
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, torch.Tensor):
                _check_cut(f"{name}, {key}", value, param)
                tensors[f"{key}/{name}"] = value
            else:
                values.setdefault(name, {})[key] = value
    slots = aligned([slot_of(name, tensors[name]) for name in sorted(tensors)])
    write_gathered(folder / CUT, slots, (gather(tensors[slot.name]) for slot in slots))
    if is_first():
        groups = optimizer.state_dict()["param_groups"]
        settings = {"names": names, "param_groups": groups, "values": values}
        write_atomically(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")


def load_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Gives an optimizer the state that `save_optimizer` left; every process takes its part.

    Raises:
        CheckpointError: it was saved for other parameters.
    """
    params = _params(optimizer)
    if (folder / WHOLE).exists():
        saved = torch.load(folder / WHOLE, map_location="cpu", weights_only=True, mmap=True)
        own = optimizer.state_dict()["param_groups"]
        if [len(group["params"]) for group in saved["param_groups"]] != [len(group["params"]) for group in own]:
            raise CheckpointError(str(folder / WHOLE), "is of other parameters than the model's", _AGAIN)
    else:
        put_apart(model)
        saved = _read_cut(folder, _names(model, params))
    for number, state in saved["state"].items():
        saved["state"][number] = {key: _part(value, params[number]) for key, value in state.items()}
    optimizer.load_state_dict(saved)


def _read_cut(folder: Path, names: list[str]) -> dict[str, Any]:
    """The state as `Optimizer.state_dict` gives it; tensors are those of the file, not read yet."""
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if settings["names"] != names:
        odd = next((name for name in settings["names"] if name not in names), "their order or number")
        raise CheckpointError(str(folder / SETTINGS), f"is of other parameters than the model's (first: {odd})", _AGAIN)
    numbers = {name: number for number, name in enumerate(names)}
    state: dict[int, dict[str, Any]] = {}
    for name, values in settings["values"].items():
        state.setdefault(numbers[name], {}).update(values)
    with safe_open(folder / CUT, framework="pt") as file:
        for key, name, tensor in _tensors(file):
            state.setdefault(numbers[name], {})[key] = tensor
    return {"state": state, "param_groups": settings["param_groups"]}


def _tensors(file: Any) -> Iterator[tuple[str, str, torch.Tensor]]:
    for full in file.keys():  # noqa: SIM118  (not a dict)
        key, _, name = full.partition("/")
        yield key, name, file.get_tensor(full)


def _part(value: Any, param: torch.Tensor) -> Any:
    """This process's part of a value, in its own memory: the file it is read from may be removed while training."""
    if not isinstance(value, torch.Tensor):
        return value
    return (cut_like(value, param) if value.ndim and value.shape == param.shape else value).clone()


def _check_cut(what: str, value: torch.Tensor, param: torch.Tensor) -> None:
    """Refuses what cannot be made whole: state in blocks, 8-bit say, that knows nothing of the cut."""
    if value.ndim and isinstance(param, DTensor) and not isinstance(value, DTensor):
        found = f"the optimizer keeps {what} as {list(value.shape)}, which is not cut as its parameter is"
        raise CheckpointError("optimizer", found, "use optim: adamw_torch where parameters are cut (FSDP2)")


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _names(model: torch.nn.Module, params: list[torch.Tensor]) -> list[str]:
    names: Mapping[int, str] = {id(param): name for name, param in model.named_parameters()}
    return [names[id(param)] for param in params]
