"""Names in the files of what adapters name as in the runtime: other prefixes, and mixtures of experts.

A checkpoint of a bare model (GPT-2's on the hub: `h.0.attn`) lacks the prefix that the model with its head gives all
names (`transformer.h.0.attn`); transformers adds it when it loads.

Of a mixture the runtime has one parameter for all experts of a layer, the files one tensor for each. transformers 5
stacks them when it loads a model: `mlp.experts.gate_up_proj` (experts, 2 * width, in) is each expert's
gate above its up projection, `mlp.experts.down_proj` (experts, in, width) its down projection. peft names the
runtime's parameters. With A (experts * r, in) and B (out, r * experts), expert e's delta is

    scale * B[:, e::experts] @ A[e * r : (e + 1) * r]

and each of its tensors in the files takes the rows of it that are its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace

from posttrain.errors import CheckpointError
from posttrain.merging.adapter import EXPERT_PARAMETERS, Adapter, LowRank, targets_parameter
from posttrain.merging.checkpoint import Checkpoint
from posttrain.merging.header import BYTES, TensorInfo

_OTHER_BASE = "use the base that this adapter was trained on"
_RUNTIME = "mlp"
_EXPERT = re.compile(r"(?P<holder>.+\.experts)\.(?P<number>\d+)\.(?P<part>.+)")


@dataclass(frozen=True)
class Layout:
    """How a family's files name its experts: `BLOCK.experts.NUMBER.PART.weight`."""

    block: str
    """What the files call the layer's module that the runtime calls `mlp`."""
    parts: dict[str, tuple[str, ...]]
    """Parameter of the runtime -> the files' parts it is stacked from, first rows first."""


_MIXTRAL = Layout("block_sparse_moe", dict(zip(EXPERT_PARAMETERS, (("w1", "w3"), ("w2",)), strict=True)))
_QWEN = Layout("mlp", dict(zip(EXPERT_PARAMETERS, (("gate_proj", "up_proj"), ("down_proj",)), strict=True)))
LAYOUTS = {
    "mixtral": _MIXTRAL,
    "qwen2_moe": _QWEN,
    "qwen3_moe": _QWEN,
    "olmoe": _QWEN,
    "deepseek_v3": _QWEN,
    "glm4_moe": _QWEN,
}
"""By a config's `model_type`; the tests compare each with transformers' own table."""


def name_by_files(adapter: Adapter, base: Checkpoint) -> Adapter:
    """Turns edits of the runtime's parameters into edits of the tensors that the base's files hold.

    Raises:
        CheckpointError: a family that is not known, experts that the base does not have, or factors for some of
            the experts only, naming the key.
    """
    model_type = base.config.get("model_type")
    layout = LAYOUTS.get(str(model_type))
    if adapter.fused and layout is None:
        raise CheckpointError(
            str(adapter.folder),
            f"{next(iter(adapter.fused.values())).key} is LoRA on the stacked experts of model_type {model_type!r}, "
            "whose files this merge does not know",
            f"known are {', '.join(LAYOUTS)}; merge it with peft",
        )
    edits = {_with_or_without_prefix(name, base): chain for name, chain in adapter.edits.items()}
    if layout:
        edits = {_name_in_files(name, layout, base): chain for name, chain in edits.items()}
        for name, edit in adapter.fused.items():
            for tensor, part in _unstacked(name, edit, layout, base, adapter):
                edits.setdefault(tensor, []).append(part)
        _refuse_untouched(adapter, layout, base)
    _refuse_some_of_the_experts(edits.keys(), adapter, base)
    return replace(adapter, edits=edits, fused={})


def stored_tensors(name: str, base: Checkpoint) -> list[list[TensorInfo]]:
    """The tensors of the files that a runtime's parameter is loaded from; none where they have none.

    Returns:
        One list of one tensor; of a parameter of all experts a list for each, to be stacked, of what stands above
        one another in it.
    """
    name = _with_or_without_prefix(name, base)
    if name in base.tensors:
        return [[base.tensors[name]]]
    layout = LAYOUTS.get(str(base.config.get("model_type")))
    if layout is None:
        return []
    holder, _, parameter = _name_in_files(name, layout, base).rpartition(".")
    if f"{holder}.{parameter}" in base.tensors:
        return [[base.tensors[f"{holder}.{parameter}"]]]
    found: list[list[TensorInfo]] = []
    parts = layout.parts.get(parameter, ())
    while parts and f"{holder}.{len(found)}.{parts[0]}.weight" in base.tensors:
        found.append([base.tensors[f"{holder}.{len(found)}.{part}.weight"] for part in parts])
    return found


def is_expert(name: str) -> bool:
    """Whether a tensor of the files belongs to one expert of several."""
    return _EXPERT.fullmatch(name) is not None


def _with_or_without_prefix(name: str, base: Checkpoint) -> str:
    bare = name.partition(".")[2]
    return bare if name not in base.tensors and bare in base.tensors else name


def _name_in_files(name: str, layout: Layout, base: Checkpoint) -> str:
    return name if name in base.tensors else name.replace(f".{_RUNTIME}.", f".{layout.block}.")


def _unstacked(
    name: str, edit: LowRank, layout: Layout, base: Checkpoint, adapter: Adapter
) -> Iterator[tuple[str, LowRank]]:
    """Yields (tensor of the files, what is added to it) for every expert."""
    holder, _, parameter = name.rpartition(".")
    holder = _name_in_files(holder + ".", layout, base).removesuffix(".")
    rank = edit.a.rows // edit.step
    for expert in range(edit.step):
        tensors = [f"{holder}.{expert}.{part}.weight" for part in layout.parts[parameter]]
        infos = [base.tensors[tensor] for tensor in tensors if tensor in base.tensors]
        if len(infos) != len(tensors) or sum(info.rows for info in infos) != edit.b.rows:
            shape = [edit.step, edit.b.rows, *edit.a.shape[1:]]
            raise CheckpointError(
                str(adapter.folder), f"{edit.key} is for experts {shape}, not {' and '.join(tensors)}", _OTHER_BASE
            )
        a, first = _rows_of(edit.a, expert * rank, rank), 0
        for info in infos:
            yield info.name, replace(edit, a=a, b=_rows_of(edit.b, first, info.rows), column=expert)
            first += info.rows


def _rows_of(info: TensorInfo, first: int, count: int) -> TensorInfo:
    """Some rows of a tensor as a tensor of their own."""
    rest = info.shape[1:]
    return replace(info, shape=(count, *rest), start=info.start + first * math.prod(rest) * BYTES[info.dtype])


def _refuse_untouched(adapter: Adapter, layout: Layout, base: Checkpoint) -> None:
    """Refuses an adapter that lacks experts which its target_parameters name."""
    parameters = {part: parameter for parameter, parts in layout.parts.items() for part in parts}
    for name in base.tensors:
        found = _EXPERT.fullmatch(name)
        parameter = parameters.get(found["part"].removesuffix(".weight")) if found else None
        if found is None or parameter is None:
            continue
        stacked = f"{found['holder'].replace(f'.{layout.block}.', f'.{_RUNTIME}.')}.{parameter}"
        edit = adapter.fused.get(stacked)
        if edit is None and targets_parameter(stacked, adapter.config):
            raise CheckpointError(
                str(adapter.folder), f"no factors for {stacked}, which target_parameters names", _OTHER_BASE
            )
        if edit is not None and int(found["number"]) >= edit.step:
            raise CheckpointError(
                str(adapter.folder), f"{edit.key} is for {edit.step} experts, the base has {name}", _OTHER_BASE
            )


def _refuse_some_of_the_experts(edited: Container[str], adapter: Adapter, base: Checkpoint) -> None:
    """Refuses factors for a part of some experts that other experts of the layer lack."""
    matches = {name: found for name in base.tensors if (found := _EXPERT.fullmatch(name))}
    touched = {(found["holder"], found["part"]): name for name, found in matches.items() if name in edited}
    for name, found in matches.items():
        other = touched.get((found["holder"], found["part"]))
        if other and name not in edited:
            raise CheckpointError(str(adapter.folder), f"factors for {other}, but none for {name}", _OTHER_BASE)
