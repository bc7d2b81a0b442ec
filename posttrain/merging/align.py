"""Models of one architecture side by side: which tensor of each belongs to which."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from posttrain.errors import CheckpointError
from posttrain.merging.adapter import EMBEDDINGS, HEADS, read_adapter
from posttrain.merging.checkpoint import Checkpoint, open_checkpoint
from posttrain.merging.edits import row_blocks
from posttrain.merging.header import FLOATS, TensorInfo
from posttrain.merging.plan import Output, Plan, plan_merge
from posttrain.merging.tensors import read_rows

_SHAPELESS = (
    "model_type",
    "architectures",
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)
"""Settings that give tensors of the same shape another meaning."""
_UNLIKE = "only models that were trained from one base can be combined"


@dataclass(frozen=True)
class Model:
    """A full checkpoint, or adapters on one; no tensor is in memory."""

    label: str
    checkpoint: Checkpoint
    plan: Plan
    stamps: dict[Path, tuple[int, int, int]]


@dataclass(frozen=True)
class Aligned:
    """One tensor in every model; all have its shape, and are floats or equal."""

    name: str
    reference: Output
    inputs: tuple[Output, ...]

    @property
    def source(self) -> TensorInfo:
        """Where the reference's values come from."""
        return self.reference.source


@dataclass(frozen=True)
class Alignment:
    """All tensors of models of one architecture."""

    tensors: tuple[Aligned, ...]
    """In the order of the reference's files."""
    tied: bool | None
    """Whether embedding and output layer are one tensor in all of them; None where they are two in all files."""
    vocabulary: int | None


def open_model(model: Path, adapters: tuple[Path, ...] = ()) -> Model:
    """Reads the headers of a checkpoint and of a chain of adapters on it.

    Raises:
        CheckpointError: as `plan_merge`.
    """
    checkpoint, chain = open_checkpoint(model), [read_adapter(path) for path in adapters]
    stamps = {**checkpoint.stamps, **{file: seen for adapter in chain for file, seen in adapter.stamps.items()}}
    label = " + ".join(str(path) for path in (model, *adapters))
    return Model(label, checkpoint, plan_merge(checkpoint, chain), stamps)


def align(reference: Model, models: list[Model]) -> Alignment:
    """Matches the tensors of `models` to the reference's by name.

    An embedding tied to the output layer is one tensor where it is tied in every model; where one unties
    it, the others' embedding stands for their output layer.

    Raises:
        CheckpointError: a setting that changes what the tensors mean, a tensor that is missing, has another
            shape, or is an integer of another value, naming it.
    """
    for model in models:
        _check_settings(reference, model)
    everything = [reference, *models]
    named = [{output.name: output for output in model.plan.outputs} for model in everything]
    names = dict.fromkeys(name for outputs in named for name in outputs)
    for model, outputs in zip(everything, named, strict=True):
        _untie(model, outputs, names)
        for name in names:
            if name not in outputs:
                holder = next(other.label for other, theirs in zip(everything, named, strict=True) if name in theirs)
                raise CheckpointError(model.label, f"has no {name}, which {holder} has", _UNLIKE)
    tensors = tuple(Aligned(name, named[0][name], tuple(outputs[name] for outputs in named[1:])) for name in names)
    for tensor in tensors:
        for model, output in zip(models, tensor.inputs, strict=True):
            _check_tensor(tensor, reference, output, model)
    ties = {model.plan.tied for model in everything}
    return Alignment(tensors, ties.pop() if len(ties) == 1 else False, reference.plan.vocabulary)


def _check_settings(one: Model, other: Model) -> None:
    for key in _SHAPELESS:
        a, b = one.checkpoint.config.get(key), other.checkpoint.config.get(key)
        if a is not None and b is not None and a != b:
            raise CheckpointError(other.label, f"has {key} {b}, {one.label} has {a}", _UNLIKE)


def _untie(model: Model, outputs: dict[str, Output], names: dict[str, None]) -> None:
    """Gives a tied model the output layer that another one has of its own."""
    missing = [name for name in names if name not in outputs]
    if model.plan.tied and len(missing) == 1 and _module(missing[0]) in HEADS:
        embedding = next(output for name, output in outputs.items() if _module(name) in EMBEDDINGS)
        outputs[missing[0]] = replace(embedding, name=missing[0])


def _module(name: str) -> str:
    return name.removesuffix(".weight").rsplit(".", 1)[-1]


def _check_tensor(tensor: Aligned, reference: Model, output: Output, model: Model) -> None:
    mine, theirs = tensor.source, output.source
    if mine.shape != theirs.shape:
        raise CheckpointError(
            model.label,
            f"{tensor.name} has shape {list(theirs.shape)}, {reference.label} has {list(mine.shape)}",
            "give all of them the same vocabulary first" if _module(tensor.name) in (*EMBEDDINGS, *HEADS) else _UNLIKE,
        )
    floats = mine.dtype in FLOATS and theirs.dtype in FLOATS
    if not floats and (output.edits or not same_bytes(mine, theirs)):
        raise CheckpointError(
            model.label,
            f"{tensor.name} is stored as {theirs.dtype} and is not {reference.label}'s",
            "only floats of 16 bits and more can differ",
        )


def is_untouched(tensor: Aligned) -> bool:
    """Whether every model holds the reference's very bytes."""
    return not any(output.edits for output in (tensor.reference, *tensor.inputs)) and all(
        same_bytes(tensor.source, output.source) for output in tensor.inputs
    )


def same_bytes(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors are stored alike; reads no further than the first difference."""
    if (one.file, one.start) == (other.file, other.start):
        return True
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    for start, stop in row_blocks(one.shape):
        a, b = (read_rows(info, start, stop).view(torch.uint8) for info in (one, other))
        if not torch.equal(a, b):
            return False
    return True
