"""What every tensor of the merged model is made of, known from headers before the weights are read."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from posttrain.errors import CheckpointError
from posttrain.merging.adapter import CONFIG, EMBEDDINGS, HEADS, Adapter, Add, Edit, LowRank, Replace, Rows
from posttrain.merging.checkpoint import Checkpoint
from posttrain.merging.experts import is_expert, name_by_files
from posttrain.merging.header import FLOATS, TensorInfo
from posttrain.merging.tensors import read_rows

_OTHER_BASE = "use the base that this adapter was trained on"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Output:
    """One tensor of the merged model."""

    name: str
    source: TensorInfo
    """Where its values come from: the base, or the adapter that replaces it."""
    edits: tuple[Edit, ...]
    """What is then done to them, in the order of the chain."""
    base: TensorInfo
    """The base's own tensor."""

    @property
    def touched(self) -> bool:
        """Whether an adapter has a part in it."""
        return bool(self.edits) or self.source is not self.base


@dataclass(frozen=True)
class Plan:
    """The whole merged model."""

    outputs: tuple[Output, ...]
    """In the order of the base's files, so that reading is sequential."""
    tied: bool | None
    """Whether embedding and output layer stay one tensor; None where they were two already."""
    vocabulary: int | None
    """Rows of the embedding; None where no embedding is known by its name."""


@dataclass(frozen=True)
class _Tie:
    """One tensor that is both embedding and output layer."""

    stored: str
    alias: str


def plan_merge(base: Checkpoint, adapters: list[Adapter]) -> Plan:
    """Adds up a chain of adapters that were active together on one base.

    As peft's forward with all of them active; a replaced tensor or row takes the value of the last
    adapter that has it. What hits only one side of a tied embedding unties it.

    Raises:
        CheckpointError: a quantised base, or an adapter that does not fit this base, naming its key.
    """
    _refuse_quantised(base)
    tie = _find_tie(base)
    originals = dict(base.tensors)
    if tie:
        originals[tie.alias] = base.tensors[tie.stored]
    sources, edits, tied = dict(originals), {name: list[Edit]() for name in originals}, True
    for adapter in (name_by_files(adapter, base) for adapter in adapters):
        own = {name: _without_stale_copies(name, own, sources, adapter) for name, own in adapter.edits.items()}
        _check_coverage(sources, adapter)
        if tie:
            one, other = own.get(tie.stored, []), own.get(tie.alias, [])
            _refuse_tied_factors(one + other, adapter)
            own[tie.stored], own[tie.alias] = one, _edits_of_alias(one, other)
            tied = tied and own[tie.stored] == own[tie.alias]
        for name, chain in own.items():
            for edit in chain:
                _check_fit(edit, name, sources.get(name), adapter)
                if isinstance(edit, Replace):
                    sources[name], edits[name] = edit.values, []
                else:
                    edits[name].append(edit)
    names = [name for name in originals if not (tie and tied and name == tie.alias)]
    outputs = tuple(Output(name, sources[name], tuple(edits[name]), originals[name]) for name in names)
    return Plan(outputs, tied if tie else None, _vocabulary(outputs))


def _vocabulary(outputs: tuple[Output, ...]) -> int | None:
    """Rows of the embedding; refuses an output layer that does not have as many."""
    sources = {output.name: output.source for output in outputs}
    embedding, head = _named(sources, EMBEDDINGS), _named(sources, HEADS)
    if embedding is None:
        return None
    rows = sources[embedding].rows
    if head is not None and sources[head].rows != rows:
        raise CheckpointError(
            str(sources[embedding].file),
            f"{embedding} has {rows} rows, {head} has {sources[head].rows}: only one of them was resized",
            "resize the base first, save it, and train the adapter on that",
        )
    return rows


def _refuse_quantised(base: Checkpoint) -> None:
    quantised = base.config.get("quantization_config") is not None
    for info in base.tensors.values():
        if info.dtype not in FLOATS and (quantised or info.name.endswith(".weight")):
            raise CheckpointError(
                str(info.file), f"{info.name} is stored as {info.dtype}", "give the base before it was quantised"
            )


def _find_tie(base: Checkpoint) -> _Tie | None:
    """Tells from config and files whether embedding and output layer are one tensor, as transformers does."""
    nested = base.config.get("text_config")
    inner = nested.get("tie_word_embeddings") if isinstance(nested, dict) else None
    flag = base.config.get("tie_word_embeddings", inner)
    embedding, head = _named(base.tensors, EMBEDDINGS), _named(base.tensors, HEADS)
    if embedding is None or flag is False:
        return None
    if head is None:  # no output layer in the files: it can only be the embedding
        return _Tie(embedding, "lm_head.weight")
    if flag and _same_values(base.tensors[embedding], base.tensors[head]):
        return _Tie(embedding, head)
    return None  # both stored, and different: transformers does not tie them either


def _named(tensors: dict[str, TensorInfo], modules: tuple[str, ...]) -> str | None:
    found = [name for name in tensors if name.endswith(tuple(f"{module}.weight" for module in modules))]
    found = [name for name in found if name.rsplit(".", 2)[-2] in modules]
    return found[0] if len(found) == 1 else None


def _edits_of_alias(one: list[Edit], other: list[Edit]) -> list[Edit]:
    """What happens to the output layer of a tied model: what it shares with the embedding, then its own.

    peft ties trained rows and resized copies; LoRA and modules_to_save only where both sides say the same.
    """
    own = [edit for edit in other if not any(_same_edit(edit, twin) for twin in one)]
    own_rows = any(isinstance(edit, Rows) for edit in own)
    shared = [
        edit
        for edit in one
        if (isinstance(edit, Rows) and not own_rows)
        or (isinstance(edit, Replace) and edit.of_base)
        or any(_same_edit(edit, twin) for twin in other)
    ]
    return shared + own


def _same_edit(one: Edit, other: Edit) -> bool:
    if isinstance(one, Rows) and isinstance(other, Rows):
        return one.indices == other.indices and _same_values(one.values, other.values)
    return isinstance(one, Replace) and isinstance(other, Replace) and _same_values(one.values, other.values)


def _refuse_tied_factors(edits: list[Edit], adapter: Adapter) -> None:
    """Refuses the one tied case that peft itself does not reload as it was trained."""
    for edit in edits:
        if isinstance(edit, LowRank) and adapter.config.get("ensure_weight_tying"):
            raise CheckpointError(
                str(adapter.folder / CONFIG),
                f"ensure_weight_tying with {edit.key}: the tied embedding would be hit twice",
                "train the rows with trainable_token_indices, or the whole of it with modules_to_save",
            )


def _without_stale_copies(name: str, edits: list[Edit], sources: dict[str, TensorInfo], adapter: Adapter) -> list[Edit]:
    """Drops peft's copies of what the base has anyway; a copy that differs shows another base."""
    kept: list[Edit] = []
    for edit in edits:
        source = sources.get(name)
        if not isinstance(edit, Replace) or not edit.of_base or source is None or source.shape != edit.values.shape:
            kept.append(edit)
        elif not _same_values(source, edit.values, rounded=True):
            raise CheckpointError(str(edit.values.file), f"{edit.key} is not the base's {name}", _OTHER_BASE)
    return kept


def _same_values(one: TensorInfo, other: TensorInfo, rounded: bool = False) -> bool:
    """Whether two tensors are equal; `rounded`: as far as the second one's dtype, or bfloat16, can tell."""
    if one.shape != other.shape or (one.dtype != other.dtype and not rounded):
        return False
    step = max(1, _BLOCK * one.rows // max(one.numel, 1))
    for start in range(0, one.rows, step):
        a, b = (read_rows(info, start, min(start + step, one.rows)) for info in (one, other))
        if not torch.equal(a.to(b.dtype), b) and not (rounded and torch.equal(a.bfloat16(), b.bfloat16())):
            return False
    return True


def _check_coverage(sources: dict[str, TensorInfo], adapter: Adapter) -> None:
    """Refuses an adapter that lacks the factors of a module that its config says it targets."""
    config = adapter.config
    if config.get("layers_to_transform") is not None or config.get("target_modules") in (None, "all-linear"):
        return
    for name, info in sources.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or len(info.shape) != 2 or not _matches(config["target_modules"], module):
            continue
        if is_expert(name):  # no module of its own in the runtime
            continue
        if _matches(config.get("exclude_modules"), module) or _matches(config.get("modules_to_save"), module):
            continue
        if not any(isinstance(edit, LowRank) for edit in adapter.edits.get(name, [])):
            raise CheckpointError(
                str(adapter.folder), f"no factors for {module}, which target_modules names", _OTHER_BASE
            )


def _matches(targets: str | list[str] | None, module: str) -> bool:
    """peft's rule: a string is a pattern for the whole name, a list holds ends of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets or [])


def _check_fit(edit: Edit, name: str, source: TensorInfo | None, adapter: Adapter) -> None:
    where = str(adapter.folder)
    if source is None:
        raise CheckpointError(where, f"{edit.key} belongs to {name}, which the base does not have", _OTHER_BASE)
    if not _fits(edit, name, source):
        shapes = [edit.a, edit.b] if isinstance(edit, LowRank) else [edit.values]
        found = ", ".join(f"{info.name} {list(info.shape)}" for info in shapes)
        raise CheckpointError(where, f"{found} does not fit {name} {list(source.shape)}", _OTHER_BASE)


def _fits(edit: Edit, name: str, source: TensorInfo) -> bool:
    shape = source.shape
    if source.dtype not in FLOATS:
        return False
    if isinstance(edit, LowRank):
        sides = (edit.a.shape[1], edit.b.shape[0])
        outputs = edit.b.shape[0]
        right = shape == (sides if edit.transposed else sides[::-1])
        return right and (edit.magnitude is None or edit.magnitude.numel == outputs)
    if isinstance(edit, Rows):
        inside = all(0 <= index < source.rows for index in edit.indices)
        return inside and len(shape) == 2 and edit.values.shape[1:] == shape[1:]
    if isinstance(edit, Add):
        return edit.values.shape == shape
    resizable = name.rsplit(".", 2)[-2] in (*EMBEDDINGS, *HEADS)
    return edit.values.shape == shape or (resizable and edit.values.shape[1:] == shape[1:])
