"""Several models become one, tensor by tensor: scaled deltas, means, SLERP, task arithmetic, TIES, DARE.

The formulas are in `methods`. Everything is read and written in row blocks, as a merge is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.errors import CheckpointError, UserError
from posttrain.merging.align import Aligned, Alignment, Model, align, is_untouched, open_model
from posttrain.merging.atomic import build_folder
from posttrain.merging.checkpoint import INDEX, check_stamps
from posttrain.merging.config import write_configs
from posttrain.merging.edits import BLOCK, merged_blocks, row_blocks
from posttrain.merging.header import FLOATS
from posttrain.merging.methods import Method, check_method, plan_change
from posttrain.merging.quantization import torch_dtype
from posttrain.merging.report import SURVIVES, Survival
from posttrain.merging.tensors import CODES, byte_blocks, read_into, read_rows, streaming
from posttrain.merging.writer import (
    FileWriter,
    Slot,
    lay_out,
    shard_header,
    write_index,
)


@dataclass(frozen=True)
class Input:
    """One model to combine: a full checkpoint, adapters on the common base, or adapters on another checkpoint."""

    model: Path | None = None
    """None: the common base."""
    adapters: tuple[Path, ...] = ()
    """In the order of their chain."""


@dataclass(frozen=True)
class CombinedTensor:
    """One tensor in which the inputs differ."""

    name: str
    norms: tuple[float, ...]
    """|d_i| of each input, Frobenius."""
    kept: tuple[float, ...] | None
    """ties, dare: share of each input's elements that went into the result; None for methods that keep all."""
    relative_change: float | None
    """|change| / |W_0| before rounding; W_0 is the base, or the first input where there is none."""
    cosine: float | None
    """Between the change after rounding and the wanted one."""
    norm_ratio: float | None
    """|change after rounding| / |wanted change|."""


@dataclass(frozen=True)
class CombineReport:
    """What was combined, and what was written."""

    method: dict[str, Any]
    dtype: str
    base: str | None
    inputs: tuple[str, ...]
    tied: bool | None
    """Whether embedding and output layer are one tensor; None where they were two in all files."""
    tensors: tuple[CombinedTensor, ...]
    copied: int
    """Tensors equal in all inputs, copied as bytes."""
    cast: int
    """Tensors equal in all inputs that only changed their dtype."""
    parameters: int
    total_bytes: int
    files: dict[str, dict[str, Any]]
    """Name -> {"sha256", "bytes"} of every file written."""

    def advice(self) -> list[str]:
        """Warnings for people: changes that rounding ate, inputs that do not differ."""
        eaten = [tensor for tensor in self.tensors if tensor.cosine is not None and tensor.cosine < SURVIVES]
        lines = []
        if eaten:
            lines.append(
                f"{len(eaten)} of {len(self.tensors)} changes did not survive rounding to {self.dtype}; "
                "float32 keeps them"
            )
        if not self.tensors:
            lines.append("the inputs do not differ: nothing was combined")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "advice": self.advice()}


def combine(
    base: Path | None,
    inputs: list[Input],
    out: Path,
    method: Method,
    dtype: str,
    max_shard_size: int = 5 * 10**9,
) -> CombineReport:
    """Combines models into a new folder that exists only when it is complete.

    A sweep over the scale a of one delta is one call per a, `Method("scale", (a,))`: what is read comes from
    the page cache after the first.

    Args:
        base, inputs, method, dtype, max_shard_size: as in `combine_into`.
        out: must not exist.

    Raises:
        UserError, CheckpointError: as `build_folder` and `combine_into`.
    """
    check_method(method, len(inputs), base is not None)
    folders = [folder for one in inputs for folder in (one.model, *one.adapters) if folder is not None]
    return build_folder(
        out,
        [*([base] if base else []), *folders],
        lambda folder: combine_into(folder, base, inputs, method, dtype, max_shard_size),
    )


def combine_into(
    folder: Path,
    base: Path | None,
    inputs: list[Input],
    method: Method,
    dtype: str,
    max_shard_size: int = 5 * 10**9,
    block: int = BLOCK,
) -> CombineReport:
    """Writes the combined weights, index, config.json and generation_config.json into a folder that exists.

    Deltas are those of whole weights, so adapters add up exactly, never factor by factor. All arithmetic is
    fp32 with one rounding. Tokenizer and template are the caller's (`copy_side_files`).

    Args:
        folder: an atomic stage folder; each file gets its name when it is complete.
        base: the common base, whose configs the result takes; None (linear, slerp): the first input's.
        inputs: in the order of the method's weights.
        dtype: `bfloat16`, `float16` or `float32`: of all float tensors written.
        max_shard_size: bytes of a shard.
        block: most elements of a tensor that are in memory per input. The result does not depend on it, but for
            the last bit of an adapter's matrix product.

    Raises:
        UserError: a method that does not fit the inputs.
        CheckpointError: inputs that do not fit one another, naming the tensor; values that are not finite.
    """
    check_method(method, len(inputs), base is not None)
    target = CODES[torch_dtype(dtype)]
    models = [_open(one, base) for one in inputs]
    reference = open_model(base) if base else models[0]
    together = align(reference, models)
    slots = [
        Slot(tensor.name, target if tensor.source.dtype in FLOATS else tensor.source.dtype, tensor.source.shape)
        for tensor in together.tensors
    ]
    shards = lay_out(folder, slots, max_shard_size)
    writing = _Writing(folder, method, base is None and method.kind == "slerp", tuple(m.label for m in models), block)
    with streaming():
        files, reports, copied = _write_shards(writing, together, shards)
    files |= write_configs(folder, reference.checkpoint, dtype, together.tied, together.vocabulary)
    check_stamps({file: seen for model in (reference, *models) for file, seen in model.stamps.items()})
    return CombineReport(
        method=asdict(method),
        dtype=dtype,
        base=str(base) if base else None,
        inputs=writing.labels,
        tied=together.tied,
        tensors=tuple(reports),
        copied=copied,
        cast=len(slots) - copied - len(reports),
        parameters=sum(tensor.source.numel for tensor in together.tensors),
        total_bytes=sum(slot.nbytes for slot in slots),
        files=files,
    )


@dataclass(frozen=True)
class _Writing:
    folder: Path
    method: Method
    from_zero: bool
    """slerp without a base: its deltas are the weights themselves."""
    labels: tuple[str, ...]
    block: int


def _open(one: Input, base: Path | None) -> Model:
    if one.model is None and not one.adapters:
        raise UserError("inputs", "one has neither a model nor adapters", "name the base itself to have it combined")
    if one.model is None and base is None:
        raise UserError("inputs", f"{one.adapters[0]} without a base", "give the base of the adapters")
    model = one.model or base
    assert model is not None
    return open_model(model, one.adapters)


def _write_shards(
    writing: _Writing, together: Alignment, shards: dict[str, list[Slot]]
) -> tuple[dict[str, dict[str, Any]], list[CombinedTensor], int]:
    """Writes all weights; returns the files' digests, the combined tensors' figures, how many were plain copies."""
    tensors = {tensor.name: tensor for tensor in together.tensors}
    files: dict[str, dict[str, Any]] = {}
    reports: list[CombinedTensor] = []
    copied = 0
    for name, shard in shards.items():
        with FileWriter(writing.folder / name) as writer:
            writer.write(shard_header(shard))
            for slot in shard:
                tensor = tensors[slot.name]
                if not is_untouched(tensor):
                    reports.append(_write_combined(writer, tensor, slot, writing))
                elif tensor.source.dtype == slot.dtype:
                    copied += 1
                    for source, begin, length in byte_blocks(tensor.source):
                        read_into(writer.room(length), source, begin)
                else:
                    _write_cast(writer, tensor, slot, writing.block)
        files[name] = writer.describe()
    if len(shards) > 1:
        files[INDEX] = write_index(writing.folder, shards)
    return files, reports, copied


def _write_combined(writer: FileWriter, tensor: Aligned, slot: Slot, writing: _Writing) -> CombinedTensor:
    count = len(tensor.inputs)
    change = plan_change(
        writing.method, tensor.name, tensor.source.numel, lambda: (deltas for _, deltas in _blocks(tensor, writing))
    )
    survival, squares, kept, position = Survival(tensor.name), [0.0] * count, [0] * count, 0
    for reference, deltas in _blocks(tensor, writing):
        part, taken = change(deltas, position)
        combined = part if writing.from_zero else part.add_(reference)
        for index, delta in enumerate(deltas):
            squares[index] += torch.linalg.vector_norm(delta, dtype=torch.float64).item() ** 2
            kept[index] += taken[index]
            if not math.isfinite(squares[index]):  # a method may drop the NaN, and hide it
                raise CheckpointError(writing.labels[index], f"{tensor.name} holds values that are not finite")
        survival.add(reference, combined, writer.write_rounded(combined, slot.dtype))
        position += reference.numel()
    figures = survival.report((), same_shape=True)
    return CombinedTensor(
        name=tensor.name,
        norms=tuple(math.sqrt(square) for square in squares),
        kept=tuple(number / position for number in kept) if writing.method.density is not None else None,
        relative_change=figures.relative_change,
        cosine=figures.cosine,
        norm_ratio=figures.norm_ratio,
    )


def _blocks(tensor: Aligned, writing: _Writing) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Yields (reference rows, each input's delta) in fp32."""
    streams = [merged_blocks(output, None, writing.block) for output in (tensor.reference, *tensor.inputs)]
    for (_, reference), *inputs in zip(*streams, strict=True):
        yield reference, [rows if writing.from_zero else rows - reference for _, rows in inputs]


def _write_cast(writer: FileWriter, tensor: Aligned, slot: Slot, block: int) -> None:
    for start, stop in row_blocks(tensor.source.shape, block):
        values = read_rows(tensor.source, start, stop)
        rounded = writer.write_rounded(values, slot.dtype)
        if not torch.equal(rounded.isfinite(), values.isfinite()):
            raise CheckpointError(tensor.name, f"overflows {slot.dtype}", "choose bfloat16 or float32")
