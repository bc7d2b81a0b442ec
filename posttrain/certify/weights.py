"""Every number of the merged files against the adapters in use: it is theirs, rounded once.

Logits hide small mistakes in the noise of rounding; numbers do not. A layer in use is a linear map, so unit vectors
show its weights as its own forward computes them, whatever adapters are made of. What is written must lie between
`round(w - e)` and `round(w + e)`, with w of the layer in use in fp32 and e what two orders of fp32 arithmetic may be
apart. A delta that is a hundredth too large moves every number by a hundredth of its change, and each that crosses a
rounding boundary by that is outside: one in 40 where |delta| is a hundredth of |W|, in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

Unit = tuple[str, nn.Module, nn.Module]
"""(path, module in use, the same module of the merged files), all parameters in memory in fp32."""
COLUMNS = 256
"""Inputs of a linear layer that are looked at, drawn by its name; each shows all of its outputs."""
_NUMBERS = 1 << 24
"""Numbers of a layer's answer that are held at once."""
SLACK = 4e-6
"""e, over the number itself and over the root mean square of all that are looked at: 2^-18, for sums in fp32."""


@dataclass(frozen=True)
class _Pair:
    """A part of one tensor, as it is in use and as the files have it."""

    name: str
    in_use: torch.Tensor
    merged: torch.Tensor
    computed: bool
    """Whether the one in use was computed: read from the base, it has no slack."""


def units(
    in_use: nn.Module, merged: nn.Module, path: str = "", without: frozenset[int] = frozenset()
) -> Iterator[Unit]:
    """Walks two models side by side and yields what holds parameters; what adapters wrap is one unit.

    Args:
        in_use: a base with peft's layers in it, not the `PeftModel` around it.
        without: ids of modules in use that are left out, with all below them.
    """
    if id(in_use) in without:
        return
    if isinstance(in_use, ModulesToSaveWrapper) and list(merged.children()):  # a block saved whole
        yield from units(in_use.modules_to_save[in_use.active_adapters[0]], merged, path)
        return
    if isinstance(in_use, (LoraLayer, AuxiliaryTrainingWrapper)):
        yield path, in_use, merged
        return
    if next(in_use.parameters(recurse=False), None) is not None:
        yield path, in_use, merged
    for name, child in in_use.named_children():
        yield from units(child, merged.get_submodule(name), f"{path}.{name}" if path else name, without)


def compare_weights(models: Iterator[Unit], dtype: torch.dtype) -> dict[str, Any]:
    """Compares two models number by number.

    Args:
        dtype: of the merged files.

    Returns:
        `tensors`, `numbers`: what was looked at.
        `off`: of each tensor with numbers that are not those in use, rounded: `name`, `share` of the numbers
            looked at, `largest` distance over the tensor's root mean square; largest share first.
    """
    off: list[dict[str, Any]] = []
    tensors = numbers = 0
    for path, in_use, merged in models:
        seen: dict[str, list[tuple[int, int, float]]] = {}
        with torch.no_grad():
            for pair in _pairs(path, in_use, merged):
                seen.setdefault(pair.name, []).append((pair.merged.numel(), *_outside(pair, dtype)))
        for name, parts in seen.items():
            looked_at, wrong = (sum(part[place] for part in parts) for place in (0, 1))
            tensors, numbers = tensors + 1, numbers + int(looked_at)
            if wrong:
                off.append({"name": name, "share": wrong / looked_at, "largest": max(part[2] for part in parts)})
    return {"tensors": tensors, "numbers": numbers, "off": sorted(off, key=lambda one: (-one["share"], one["name"]))}


def _outside(pair: _Pair, dtype: torch.dtype) -> tuple[int, float]:
    """Returns (numbers that are not those in use, rounded; the largest distance over their root mean square)."""
    in_use, merged = pair.in_use.float(), pair.merged.float()
    size = in_use.square().mean().sqrt()
    slack = SLACK * (in_use.abs() + size) if pair.computed else 0.0
    least, most = ((in_use + sign * slack).to(dtype).float() for sign in (-1, 1))
    inside = (least <= merged) & (merged <= most)  # so that NaN is outside
    wrong = int(inside.numel() - inside.sum())
    if not wrong:
        return 0, 0.0
    distance = (merged - in_use).abs()[~inside].max() / size.clamp(min=1e-30)
    return wrong, distance.item()


def _pairs(path: str, in_use: nn.Module, merged: nn.Module) -> Iterator[_Pair]:
    if type(in_use) is type(merged):
        for leaf, parameter in in_use.named_parameters(recurse=False):
            yield _Pair(f"{path}.{leaf}", parameter, merged.get_parameter(leaf), computed=False)
    elif isinstance(merged, (nn.Linear, Conv1D)):
        yield from _linear(path, in_use, merged)
    elif isinstance(merged, nn.Embedding):
        yield from _embedding(path, in_use, merged)
    elif isinstance(in_use, ParamWrapper):
        yield from _parameters(path, in_use, merged)
    else:
        for leaf, parameter in merged.named_parameters(recurse=False):
            yield _Pair(f"{path}.{leaf}", getattr(in_use, leaf), parameter, computed=False)  # the wrapper's active copy


def _linear(path: str, in_use: nn.Module, merged: nn.Linear | Conv1D) -> Iterator[_Pair]:
    """Unit vectors in, columns of the weights out; zeros in, the bias out."""
    weight = merged.weight.T if isinstance(merged, Conv1D) else merged.weight
    outputs, inputs = weight.shape
    zeros = torch.zeros(2, inputs, device=weight.device)  # two rows: bitsandbytes treats one by itself
    constant = in_use(zeros)[0]
    if merged.bias is not None:
        yield _Pair(f"{path}.bias", constant, merged.bias, computed=True)
    elif constant.any():
        yield _Pair(f"{path}.bias", constant, torch.zeros_like(constant), computed=True)
    generator = torch.Generator().manual_seed(sum(path.encode()))
    chosen = torch.randperm(inputs, generator=generator)[:COLUMNS].sort().values if inputs > COLUMNS else None
    columns = (torch.arange(inputs) if chosen is None else chosen).to(weight.device)
    for part in columns.split(max(2, _NUMBERS // max(inputs, outputs))):
        vectors = torch.zeros(max(2, len(part)), inputs, device=weight.device)
        vectors[range(len(part)), part] = 1
        answers = in_use(vectors)[: len(part)] - constant
        yield _Pair(f"{path}.weight", answers, weight[:, part].T, computed=True)


def _embedding(path: str, in_use: nn.Module, merged: nn.Embedding) -> Iterator[_Pair]:
    """All tokens in, their rows out; the factor by which some architectures multiply them is taken out again."""
    rows, width = merged.weight.shape
    for ids in torch.arange(rows, device=merged.weight.device).split(max(1, _NUMBERS // width)):
        wanted = merged.weight[ids]
        factor = (merged(ids) * wanted).sum() / wanted.square().sum() if type(merged) is not nn.Embedding else 1.0
        yield _Pair(f"{path}.weight", in_use(ids) / factor, wanted, computed=True)


def _parameters(path: str, in_use: ParamWrapper, merged: nn.Module) -> Iterator[_Pair]:
    """Parameters that adapters target by name, through all wrappers of their module."""
    base = in_use.get_base_layer()
    deltas: dict[str, list[ParamWrapper]] = {}
    wrapper: nn.Module = in_use
    while isinstance(wrapper, ParamWrapper):
        deltas.setdefault(wrapper.parameter_name, []).append(wrapper)
        wrapper = wrapper.base_layer
    for leaf, parameter in base.named_parameters(recurse=False):
        values = parameter.detach()
        for one in deltas.get(leaf, []):
            for name in one.active_adapters:
                if name in one.lora_A:
                    values = values + one.get_delta_weight(name)
        yield _Pair(f"{path}.{leaf}", values, merged.get_parameter(leaf), computed=leaf in deltas)
