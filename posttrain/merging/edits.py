"""The arithmetic of a merge, in fp32, on blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from posttrain.merging.adapter import Add, Edit, LowRank, Rows
from posttrain.merging.header import TensorInfo
from posttrain.merging.plan import Output
from posttrain.merging.quantization import Grid, QuantSpec, is_quantised
from posttrain.merging.tensors import ReadBytes, read_bytes, read_rows, read_tensor

BLOCK = 1 << 19
"""Elements of a block: 2 MiB in fp32, so that one block's arithmetic stays in the processor's cache."""

Reader = Callable[[int, int], torch.Tensor]
"""(start, stop) -> those rows in fp32."""
Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""(source rows, rows so far, first row) -> rows after the edit; all fp32, the given ones stay as they are."""


def row_blocks(shape: tuple[int, ...], block: int = BLOCK, together: int = 1) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) over a tensor's rows so that no block has more than `block` elements, or one row.

    Args:
        together: so many such blocks as one.
    """
    rows = shape[0] if shape else 1
    step = max(1, block // max(1, math.prod(shape[1:]))) * together
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def reader(info: TensorInfo, spec: QuantSpec | None, read: ReadBytes = read_bytes) -> Reader:
    """Opens a tensor for reading in fp32: as stored, or (with `spec`) as a 4-bit training saw it."""
    if spec is None:
        return lambda start, stop: read_rows(info, start, stop, read).float()
    if is_quantised(info, spec):
        grid = Grid(info, spec)
        return lambda start, stop: grid.rows(start, stop, read)
    return lambda start, stop: read_rows(info, start, stop, read).to(spec.dtype).float()


def merged_blocks(
    output: Output, spec: QuantSpec | None, block: int = BLOCK, read: ReadBytes = read_bytes
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields (base rows, merged rows) of one output in fp32, unrounded, never more than `block` elements at once.

    Base rows are those the change is measured against: the source's own where the shape changed.

    Args:
        read: how the source's bytes are had, row block after row block.
    """
    from_base = output.source is output.base
    source = reader(output.source, spec if from_base else None, read)
    same_shape = output.source.shape == output.base.shape
    base = reader(output.base, spec) if not from_base and same_shape else source
    steps = [_step(edit, output, source, block) for edit in output.edits]
    for start, stop in row_blocks(output.source.shape, block):
        values = rows = source(start, stop)
        for step in steps:
            rows = step(values, rows, start)
        yield (values if base is source else base(start, stop)), rows


def _step(edit: Edit, output: Output, source: Reader, block: int) -> Step:
    if isinstance(edit, LowRank):
        return _low_rank(edit, output, source, block)
    if isinstance(edit, Rows):
        return _rows(edit)
    assert isinstance(edit, Add), "a Replace is a source, not a step"
    added = read_tensor(edit.values).float() * edit.scale
    return lambda values, rows, start: rows + added[start : start + len(rows)]


def _rows(edit: Rows) -> Step:
    new = read_tensor(edit.values).float()

    def step(values: torch.Tensor, rows: torch.Tensor, start: int) -> torch.Tensor:
        rows = rows.clone()
        for index, row in zip(edit.indices, new, strict=True):
            if start <= index < start + len(rows):
                rows[index - start] = row
        return rows

    return step


def _low_rank(edit: LowRank, output: Output, source: Reader, block: int) -> Step:
    """LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353), in the order of operations of peft's own merge.

    DoRA above other adapters, as in peft's forward: the norm is that of the base plus its own delta, the
    factor applies to all rows so far.
    """
    delta = _delta(edit)
    if edit.magnitude is None:
        return lambda values, rows, start: delta(start, start + len(rows)).add_(rows)
    magnitude = read_tensor(edit.magnitude).float().view(-1)
    columns = _column_norms(output, source, delta, block) if edit.transposed else None

    def dora(values: torch.Tensor, rows: torch.Tensor, start: int) -> torch.Tensor:
        change = delta(start, start + len(rows))
        if columns is not None:
            factor = (magnitude / columns).view(1, -1)
        else:
            norms = torch.linalg.vector_norm(values + change, dim=1)
            factor = (magnitude[start : start + len(rows)] / norms).view(-1, 1)
        return change.add_(rows).mul_(factor)

    return dora


def _delta(edit: LowRank) -> Reader:
    """Opens `scale * B A` for reading by rows of the base's layout: the product is rounded, then scaled."""
    a, b, scale = read_tensor(edit.a).float(), read_tensor(edit.b)[:, edit.column :: edit.step].float(), edit.scale
    if math.frexp(scale)[0] == 0.5:  # a power of two changes no digit, so it may as well go first
        b, scale = b * scale, 1.0

    def delta(start: int, stop: int) -> torch.Tensor:
        product = (b @ a[:, start:stop]).T.contiguous() if edit.transposed else b[start:stop] @ a
        return product if scale == 1 else product.mul_(scale)

    return delta


def _column_norms(output: Output, source: Reader, delta: Reader, block: int) -> torch.Tensor:
    """Norms over all rows, for DoRA on a base stored (in, out): one more pass over the source."""
    total = torch.zeros(output.source.shape[1], dtype=torch.float64)
    for start, stop in row_blocks(output.source.shape, block):
        total += (source(start, stop) + delta(start, stop)).double().square().sum(0)
    return total.sqrt().float()
