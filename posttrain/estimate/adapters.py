"""Which parameters an adapter adds to a model, by peft's rules (peft 0.21), from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from posttrain.estimate.architecture import Architecture, Tensor

ALL_LINEAR = "all-linear"
_EXPERT_NAMES = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Experts' tensors -> the layers they were before transformers fused them; peft still goes by those names."""


@dataclass(frozen=True)
class AdapterShape:
    """Settings of a LoRA adapter that decide its size, spelled as in peft."""

    r: int
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    dora: bool = False
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] = ()
    token_rows: int = 0
    """Embedding rows trained beside it."""


@dataclass(frozen=True)
class Trained:
    """A tensor that takes gradients; always fp32."""

    name: str
    shape: tuple[int, ...]
    numel: int
    embedding: bool = False
    """Part of an embedding layer: 8-bit optimizers keep its state in 32 bits."""


@dataclass(frozen=True)
class Target:
    """A layer with a LoRA pair."""

    weight: Tensor
    rank: int


def adapter_targets(model: Architecture, adapter: AdapterShape) -> list[Target]:
    """The matrices (and embeddings, and stacked experts) that an adapter of some settings acts on."""
    found = []
    for tensor in model.tensors:
        if tensor.kind in ("experts", "router"):
            rank = _expert_rank(tensor, adapter)
        elif tensor.name.endswith(".weight") and tensor.kind in ("linear", "linear_like", "embedding", "head"):
            rank = _rank(tensor.module, adapter, adapter.r) if _is_target(tensor, adapter) else 0
        else:
            rank = 0
        if rank:
            found.append(Target(tensor, rank))
    return found


def adapter_tensors(model: Architecture, adapter: AdapterShape) -> list[Trained]:
    """Every tensor that training an adapter moves: A and B, DoRA's magnitudes, saved modules, token rows."""
    found: list[Trained] = []
    for target in adapter_targets(model, adapter):
        found += _pair(target, adapter.dora)
    found += list(_saved(model, adapter))
    if adapter.token_rows:
        shape = (adapter.token_rows, model.block.hidden)
        for number in range(1 if model.tied else 2):
            found.append(Trained(f"token_rows.{number}", shape, shape[0] * shape[1]))
    return found


def _is_target(tensor: Tensor, adapter: AdapterShape) -> bool:
    name, wanted = tensor.module, adapter.target_modules
    if any(re.match(rf"(^|.*\.){saved}($|\..*)", name) for saved in adapter.modules_to_save):
        return False
    if isinstance(wanted, str):
        if wanted.lower() == ALL_LINEAR:
            return tensor.is_matrix
        return re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def _rank(name: str, adapter: AdapterShape, otherwise: int) -> int:
    for pattern, rank in adapter.rank_pattern.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return rank
    return otherwise


def _expert_rank(tensor: Tensor, adapter: AdapterShape) -> int:
    """Rank of a router's or experts' adapter: peft targets them by the names of the layers they were fused from."""
    own = "gate" if tensor.kind == "router" else tensor.name.rpartition(".")[2]
    before = _EXPERT_NAMES.get(own, (own,))
    names = adapter.target_modules
    if isinstance(names, str):
        wanted = names.lower() == ALL_LINEAR or any(re.fullmatch(names, f"{tensor.module}.{one}") for one in before)
    else:
        wanted = any(one.rpartition(".")[2] in before for one in names)
    return _rank(tensor.name, adapter, adapter.r * len(before)) if wanted else 0


def _pair(target: Target, dora: bool) -> Iterator[Trained]:
    weight, rank = target.weight, target.rank
    if weight.kind == "experts":
        experts, out, fan_in = weight.shape
        rank *= experts
    elif weight.kind == "embedding":
        fan_in, out = weight.shape  # A is read by token, B maps to the hidden size
    else:
        out, fan_in = weight.shape
    yield Trained(f"{weight.module}.lora_A", (rank, fan_in), rank * fan_in)
    yield Trained(f"{weight.module}.lora_B", (out, rank), out * rank)
    if dora and weight.kind not in ("experts", "router"):
        yield Trained(f"{weight.module}.lora_magnitude_vector", (out,), out)


def _saved(model: Architecture, adapter: AdapterShape) -> Iterator[Trained]:
    """Whole copies of modules; a tied head is a module of its own for peft."""
    tensors = list(model.tensors)
    if model.tied:
        tensors.append(Tensor("lm_head.weight", (model.vocabulary, model.block.hidden), "head"))
    for tensor in tensors:
        if any(tensor.module == name or tensor.module.endswith(f".{name}") for name in adapter.modules_to_save):
            yield Trained(tensor.name, tensor.shape, tensor.numel, tensor.kind == "embedding")
