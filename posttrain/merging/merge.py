"""The streaming merge: base and adapters in, a standalone model folder out, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from posttrain.errors import CheckpointError, UserError
from posttrain.merging.adapter import read_adapter
from posttrain.merging.atomic import build_folder
from posttrain.merging.checkpoint import INDEX, check_stamps, open_checkpoint
from posttrain.merging.config import write_configs
from posttrain.merging.edits import BLOCK, merged_blocks, row_blocks
from posttrain.merging.header import FLOATS, TensorInfo
from posttrain.merging.plan import Output, Plan, plan_merge
from posttrain.merging.quantization import QuantSpec, check_modules, is_quantised, torch_dtype
from posttrain.merging.report import MergeReport, Survival, TensorReport
from posttrain.merging.tensors import CODES, TORCH, ReadAhead, byte_blocks, byte_range, read_into, streaming
from posttrain.merging.writer import (
    FileWriter,
    Slot,
    lay_out,
    shard_header,
    write_index,
)

BaseMode = Literal["original", "dequantized"]
Blocks = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""(base rows, merged rows) in fp32."""


def merge(
    base: Path,
    adapters: list[Path],
    out: Path,
    dtype: str,
    base_mode: BaseMode = "original",
    quantization: QuantSpec | None = None,
    max_shard_size: int = 5 * 10**9,
) -> MergeReport:
    """Merges a chain of adapters into a new folder that exists only when it is complete.

    Args:
        base: folder of the base model; only read.
        adapters: adapter folders in the order of the chain; none makes a plain (cast) copy.
        out: must not exist. The work is done in `OUT.merging` beside it; one left by a killed merge is replaced.
        dtype, base_mode, quantization, max_shard_size: as in `merge_into`.

    Raises:
        UserError: `out` exists, or lies inside a folder that is read.
        CheckpointError: as `merge_into`.
    """
    return build_folder(
        out,
        [base, *adapters],
        lambda partial: merge_into(partial, base, adapters, dtype, base_mode, quantization, max_shard_size),
    )


def merge_into(
    folder: Path,
    base: Path,
    adapters: list[Path],
    dtype: str,
    base_mode: BaseMode = "original",
    quantization: QuantSpec | None = None,
    max_shard_size: int = 5 * 10**9,
    block: int = BLOCK,
) -> MergeReport:
    """Writes the merged weights, index, config.json and generation_config.json into a folder that exists.

    Every delta is added in fp32 and the sum rounded once, so the result is bit-identical to
    fp32-add-then-cast. Tensors that no adapter touches are copied as bytes. Tokenizer and template are
    the caller's (`copy_side_files`).

    Args:
        folder: an atomic stage folder; each file gets its name when it is complete.
        dtype: `bfloat16`, `float16` or `float32`: of all float tensors written.
        base_mode: `original` adds to the base's files; `dequantized` to the numbers a 4-bit training saw.
        quantization: how that training quantised; needed for `dequantized` only.
        max_shard_size: bytes of a shard.
        block: most elements of a tensor that are in memory in fp32 at a time.

    Raises:
        CheckpointError: anything in the folders that cannot be merged, naming file and key; no room on disk.
    """
    spec, target = _spec(base_mode, quantization), CODES[torch_dtype(dtype)]
    checkpoint, chain = open_checkpoint(base), [read_adapter(path) for path in adapters]
    if spec:
        check_modules(spec, checkpoint.tensors)
    plan = plan_merge(checkpoint, chain)
    slots = [Slot(output.name, _stored_dtype(output, target), output.source.shape) for output in plan.outputs]
    shards = lay_out(folder, slots, max_shard_size)
    files, reports, copied = _write_shards(folder, plan, shards, spec, block)
    files |= write_configs(folder, checkpoint, dtype, plan.tied, plan.vocabulary)
    check_stamps({**checkpoint.stamps, **{file: seen for adapter in chain for file, seen in adapter.stamps.items()}})
    return MergeReport(
        dtype=dtype,
        base_mode=base_mode,
        quantization=asdict(spec) if spec else None,
        adapters=tuple(str(path) for path in adapters),
        tied=plan.tied,
        tensors=tuple(reports),
        copied=copied,
        cast=len(slots) - copied - len(reports),
        parameters=sum(output.source.numel for output in plan.outputs),
        total_bytes=sum(slot.nbytes for slot in slots),
        files=files,
    )


def _spec(base_mode: str, quantization: QuantSpec | None) -> QuantSpec | None:
    """The 4-bit grid to put the base on, or None to take it as stored."""
    if base_mode == "original":
        return None
    if base_mode != "dequantized":
        raise UserError("base", f"{base_mode!r}", "take original or dequantized")
    if quantization is None:
        raise UserError("base", "dequantized, but the adapter was not trained on a quantised base", "take original")
    return quantization


def _stored_dtype(output: Output, target: str) -> str:
    return target if output.source.dtype in FLOATS else output.source.dtype


def _write_shards(
    folder: Path, plan: Plan, shards: dict[str, list[Slot]], spec: QuantSpec | None, block: int
) -> tuple[dict[str, dict[str, Any]], list[TensorReport], int]:
    """Writes all weights; returns the files' digests, the touched tensors' figures, how many were plain copies."""
    outputs = {output.name: output for output in plan.outputs}
    slots = (slot for shard in shards.values() for slot in shard if not _is_copy(outputs[slot.name], slot, spec))
    pieces = (piece for slot in slots for piece in _pieces(outputs[slot.name].source, block))
    files: dict[str, dict[str, Any]] = {}
    reports: list[TensorReport] = []
    copied = 0
    with streaming(), ReadAhead(pieces) as read:
        for name, shard in shards.items():
            with FileWriter(folder / name) as writer:
                writer.write(shard_header(shard))
                for slot in shard:
                    output = outputs[slot.name]
                    if output.touched:
                        reports.append(_write_merged(writer, output, slot, merged_blocks(output, spec, block, read)))
                    elif _is_copy(output, slot, spec):
                        copied += 1
                        for source, begin, length in byte_blocks(output.source):
                            read_into(writer.room(length), source, begin)
                    else:
                        _write_cast(writer, output, slot, merged_blocks(output, spec, block, read))
            files[name] = writer.describe()
    if len(shards) > 1:
        files[INDEX] = write_index(folder, shards)
    return files, reports, copied


def _pieces(source: TensorInfo, block: int) -> Iterator[tuple[TensorInfo, int, int]]:
    """What is read at once, ahead of the arithmetic: two of its blocks."""
    for start, stop in row_blocks(source.shape, block, together=2):
        yield source, *byte_range(source, start, stop)


def _is_copy(output: Output, slot: Slot, spec: QuantSpec | None) -> bool:
    """Whether a tensor's bytes are the base's."""
    dtype = output.source.dtype
    if output.touched:
        return False
    if dtype != slot.dtype or dtype not in FLOATS:
        return dtype == slot.dtype
    if spec is None:
        return True
    return not is_quantised(output.source, spec) and spec.dtype in (TORCH[dtype], torch.float32)


def _write_merged(writer: FileWriter, output: Output, slot: Slot, blocks: Blocks) -> TensorReport:
    survival = Survival(output.name)
    for base, merged in blocks:
        survival.add(base, merged, writer.write_rounded(merged, slot.dtype))
    keys = tuple(edit.key for edit in output.edits)
    if output.source is not output.base:
        keys = (output.source.name, *keys)
    return survival.report(keys, output.source.shape == output.base.shape)


def _write_cast(writer: FileWriter, output: Output, slot: Slot, blocks: Blocks) -> None:
    for values, _ in blocks:
        rounded = writer.write_rounded(values, slot.dtype)
        if slot.dtype == "F16" and not torch.equal(rounded.isfinite(), values.isfinite()):
            raise CheckpointError(
                str(output.source.file), f"{output.name} overflows float16", "choose bfloat16 or float32"
            )
