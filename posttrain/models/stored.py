"""How a live model stands in its files: which tensors, under which names, in which file; no values are touched."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from posttrain.merging.header import BYTES
from posttrain.merging.writer import Slot
from posttrain.models.gather import slot_of, whole_shape

_FILES = "model{suffix}.safetensors"
_LAYER = re.compile(r"^.*?\.\d+\.")
_Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Stored:
    """What the files of a model will hold, and which live tensors that is made of."""

    live: _Tensors
    """Live tensors by their names in memory; of tied ones the one that is saved."""
    groups: list[list[str]]
    """Names in memory that have to be whole at the same time."""
    parts: list[list[str]]
    """Names on disk that each group becomes."""
    files: dict[str, list[Slot]]
    """Tensors of each file, in the order of their bytes."""


def plan_files(model: PreTrainedModel, dtype: torch.dtype, max_shard_size: int | str) -> Stored:
    """Lays out the files that `save_pretrained` would write of a model whose floats are cast to `dtype`."""
    live = model.state_dict(keep_vars=True)
    for name in model._keys_to_ignore_on_save or ():
        live.pop(name, None)
    shapes = {name: _shape_alone(tensor, dtype) for name, tensor in live.items()}
    shapes = remove_tied_weights_from_state_dict(shapes, model)
    stored = to_disk(model, shapes)
    groups, parts = _group(model, shapes, stored)
    split = split_torch_state_dict_into_shards(stored, filename_pattern=_FILES, max_shard_size=max_shard_size)
    files = {
        file: _in_file([slot_of(name, stored[name]) for name in names])
        for file, names in split.filename_to_tensors.items()
    }
    return Stored({name: live[name] for name in shapes}, groups, parts, files)


def stored_whole(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a live model by the name it has in a checkpoint, tied ones under each of theirs."""
    shapes = {name: _shape_alone(tensor, None) for name, tensor in model.state_dict(keep_vars=True).items()}
    return {name: tuple(tensor.shape) for name, tensor in to_disk(model, shapes).items()}


def to_disk(model: PreTrainedModel, tensors: Any) -> _Tensors:
    """Renames and takes apart tensors as files have them: transformers fuses experts in memory only."""
    return dict(revert_weight_conversion(model, tensors))


def _shape_alone(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return torch.empty(whole_shape(tensor), dtype=cast, device="meta")


def _in_file(slots: list[Slot]) -> list[Slot]:
    """The order of safetensors' own writer: widest elements first, then by name."""
    return sorted(slots, key=lambda slot: (-BYTES[slot.dtype], slot.name))


def _group(model: PreTrainedModel, live: _Tensors, stored: _Tensors) -> tuple[list[list[str]], list[list[str]]]:
    """The smallest groups of live tensors that become, each on its own, what all of them become together."""
    wanted = {name: tensor.shape for name, tensor in stored.items()}
    for key in (_by_name, _by_layer):
        groups = _gathered_by(key, live)
        parts = [_alone(model, {name: live[name] for name in group}) for group in groups]
        if sum(map(len, parts)) == len(wanted) and {n: s for part in parts for n, s in part.items()} == wanted:
            return groups, [list(part) for part in parts]
    return [list(live)], [list(stored)]


def _alone(model: PreTrainedModel, tensors: _Tensors) -> dict[str, torch.Size]:
    """Shapes that a group becomes; none where a conversion lacks others."""
    try:
        return {name: tensor.shape for name, tensor in to_disk(model, tensors).items()}
    except (KeyError, IndexError, ValueError, RuntimeError):
        return {}


def _by_name(name: str) -> str:
    return name


def _by_layer(name: str) -> str:
    found = _LAYER.match(name)
    return found.group() if found else name


def _gathered_by(key: Callable[[str], str], names: Iterable[str]) -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(key(name), []).append(name)
    return list(groups.values())
