"""Exact bytes of weights, gradients and optimizer state of a training stage."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from posttrain.estimate.adapters import AdapterShape, Trained, adapter_tensors
from posttrain.estimate.architecture import Architecture, Tensor
from posttrain.estimate.spread import ALONE, Spread

Precision = Literal["bf16", "fp16", "fp32"]
ITEM = {"bf16": 2, "fp16": 2, "fp32": 4}

_BLOCK, _NESTED_BLOCK = 64, 256
_CODE, _NESTED_CODE, _OFFSET = 16 * 4, 256 * 4, 4
_SMALL = 4096
"""bitsandbytes keeps the state of tensors below it in 32 bits (`min_8bit_size`)."""
_PAGED_FROM = 100_000
"""And pages only tensors from this size on."""
_MAPS = 2 * 256 * 4


@dataclass(frozen=True)
class Method:
    """What a stage trains, on what."""

    adapter: AdapterShape | None = None
    """None: every weight is trained."""
    parents: tuple[AdapterShape, ...] = ()
    """Frozen adapters below."""
    four_bits: bool = False
    double_quant: bool = True

    @property
    def is_full(self) -> bool:
        """Whether every weight is trained."""
        return self.adapter is None


@dataclass(frozen=True)
class Static:
    """Bytes that stay from step to step, of one process."""

    weights: int
    """The base as it lies in memory, and frozen adapters."""
    trainable: int
    """What an adapter adds; 0 in full training, whose weights are all in `weights`."""
    gradients: int
    optimizer: int
    """Its state; under ZeRO the fp32 weights as well, which DeepSpeed keeps there."""
    paged: int
    """Of the optimizer state, in memory that CUDA moves to the host when the GPU is full."""
    trainable_parameters: int
    """Of the whole model, as the next one."""
    parameters: int
    """Of the base; a tied head counts once."""

    @property
    def total(self) -> int:
        """All bytes that torch allocates on the device; paged ones lie elsewhere."""
        return self.weights + self.trainable + self.gradients + self.optimizer - self.paged


def static_bytes(
    model: Architecture, method: Method, precision: Precision, optim: str, spread: Spread = ALONE
) -> Static:
    """Counts the bytes of weights, gradients and optimizer state, wherever they lie.

    Trained tensors are fp32 whatever the precision; frozen ones have the precision's dtype, or 4 bits where
    bitsandbytes quantises them. DeepSpeed holds model and gradients in the precision's dtype, and fp32 copies of
    what trains in its optimizer.

    Args:
        optim: `trainer.optim`.
        spread: how it lies over processes; the first one's part is counted.
    """
    trained, item = trained_tensors(model, method), ITEM[precision]
    apart = spread.low
    size = item if apart else 4

    def held(shape: tuple[int, ...]) -> int:
        return spread.part_numel(shape) if spread.cuts_weights else math.prod(shape)

    added = 0
    if method.is_full:
        weights = sum(size * held(tensor.shape) for tensor in model.tensors)
    else:
        weights = sum(
            four_bit_bytes(tensor.numel, method.double_quant)
            if method.four_bits and tensor.kind == "linear" and tensor.is_matrix
            else item * held(tensor.shape)
            for tensor in model.tensors
        )
        below = (tensor for parent in method.parents for tensor in adapter_tensors(model, parent))
        weights += sum(size * held(tensor.shape) for tensor in below)
        added = sum(size * held(tensor.shape) for tensor in trained)
    parts = trained_parts(model, method, spread)
    own = sum(part.numel for part in parts)
    state, paged = optimizer_bytes(parts, optim)
    count = sum(tensor.numel for tensor in trained)
    gradients = size * (own if spread.cuts_gradients else count)
    return Static(weights, added, gradients, state + (4 * own if apart else 0), paged, count, model.parameters)


def trained_tensors(model: Architecture, method: Method) -> list[Trained]:
    """Every tensor that takes a gradient."""
    if method.adapter is not None:
        return adapter_tensors(model, method.adapter)
    return [Trained(one.name, one.shape, one.numel, one.kind == "embedding") for one in model.tensors]


def trained_parts(model: Architecture, method: Method, spread: Spread) -> list[Trained]:
    """The first process's parts of the tensors that take gradients: what its optimizer moves."""
    return [
        replace(one, shape=spread.part(one.shape), numel=spread.part_numel(one.shape))
        for one in trained_tensors(model, method)
    ]


def quantised(model: Architecture) -> list[Tensor]:
    """The matrices that transformers turns into 4 bits.

    Only modules that are exactly torch's `Linear`, the head left out (and with it the last module and what is
    tied): stacked experts, routers and classes derived from `Linear` stay as they are.
    """
    return [tensor for tensor in model.tensors if tensor.kind == "linear" and tensor.is_matrix]


def four_bit_bytes(numel: int, double_quant: bool) -> int:
    """Bytes of one matrix in NF4 or FP4, its quantisation state included (bitsandbytes 0.50, blocks of 64).

    Codes: half a byte a weight. Statistics: one fp32 a block; double quantisation makes it one byte, with an
    fp32 for every 256 of them, their code book and the mean that was taken off (Dettmers et al. 2023, 3).
    """
    blocks = math.ceil(numel / _BLOCK)
    codes = math.ceil(numel / 2) + _CODE
    if not double_quant:
        return codes + 4 * blocks
    return codes + blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) + _NESTED_CODE + _OFFSET


def optimizer_bytes(trained: Iterable[Trained], optim: str) -> tuple[int, int]:
    """Bytes of an optimizer's state over fp32 tensors, and how many of them are paged.

    An optimizer that is not known here is counted as Adam with state in 32 bits: see `is_known_optimizer`.
    """
    total, paged = 0, 0
    eight = is_eight_bit(optim)
    for tensor in trained:
        size = _state(tensor, optim)
        total += size
        if "paged" in optim and tensor.numel >= _PAGED_FROM:
            paged += size
    return total + (_MAPS if eight and total else 0), paged


def is_eight_bit(optim: str) -> bool:
    """Whether an optimizer's state has 8 bits."""
    return "8bit" in optim


def is_known_optimizer(optim: str) -> bool:
    """Whether the size of an optimizer's state is known here."""
    return optim in ("adafactor", "sgd", "adagrad") or (
        optim.startswith(
            (
                "adamw_torch",
                "adamw_bnb",
                "adamw_8bit",
                "adamw_hf",
                "paged_adamw",
                "lion",
                "paged_lion",
                "rmsprop",
                "ademamix",
            )
        )
        and "npu" not in optim
        and "4bit" not in optim
        and "ademamix" not in optim
    )


def _state(tensor: Trained, optim: str) -> int:
    numel = tensor.numel
    if optim == "sgd":
        return 0
    if optim == "adafactor":
        return 4 * (numel // tensor.shape[-1] + numel // tensor.shape[-2] if len(tensor.shape) > 1 else numel)
    moments = 1 if any(name in optim for name in ("lion", "adagrad", "rmsprop")) else 2
    if is_eight_bit(optim) and numel >= _SMALL and not tensor.embedding:
        return moments * (numel + 4 * math.ceil(numel / 256))
    step = 4 if optim.startswith("adamw_torch") or optim == "adagrad" else 0  # torch counts steps in a tensor each
    return moments * 4 * numel + step


def optimizer_scratch(trained: Iterable[Trained], optim: str) -> int:
    """Bytes that an optimizer needs while it steps, beyond its state.

    Fused and bitsandbytes kernels need none; torch's grouped ones (`foreach`) hold a root of every second
    moment at once, Adafactor the update of one tensor, twice.
    """
    sizes = [tensor.numel for tensor in trained]
    if not sizes or optim == "sgd" or "fused" in optim or "8bit" in optim or "bnb" in optim or "paged" in optim:
        return 0
    if optim.startswith("adamw_torch"):
        return 4 * sum(sizes)
    return 8 * max(sizes)
