"""How a model lies over the processes that train it together: what each holds, and what it holds for a moment.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3) cuts optimizer states, gradients and weights over N
processes; FSDP2 (torch's `fully_shard`) cuts all three, layer by layer. What is counted beyond that follows torch
2.13, Accelerate 1.15 and DeepSpeed 0.19 with their default sizes of buckets.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from posttrain.estimate.architecture import Architecture, Tensor

Kind = Literal["ddp", "fsdp", "zero1", "zero2", "zero3"]

BUCKET = 500_000_000
"""Elements of DeepSpeed's buffer for gradients on their way (`reduce_bucket_size`), however small the model is."""
SUB_GROUP = 1_000_000_000
"""Elements that ZeRO-3's optimizer moves at once (`sub_group_size`)."""
_LIVE = 1_050_000_000
"""Elements that ZeRO-3 may keep gathered (`stage3_max_live_parameters`), and fetch ahead of their use
(`stage3_prefetch_bucket_size`)."""
_LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Spread:
    """Processes that train a model together, one for each device."""

    kind: Kind = "ddp"
    processes: int = 1
    machines: int = 1
    weights_on_host: bool = False
    """Weights lie in the host's memory; with FSDP2, gradients and optimizer states do as well."""
    updates_on_host: bool = False
    """Gradients and optimizer states (and ZeRO's fp32 weights) lie in the host's memory."""
    gathered_once: bool = False
    """FSDP2 keeps layers whole from their forward to their backward (`fsdp_reshard_after_forward: false`)."""

    @property
    def low(self) -> bool:
        """Whether the model itself is in the compute dtype, and the optimizer holds fp32 weights: DeepSpeed's way."""
        return self.kind in ("zero1", "zero2", "zero3")

    @property
    def cuts_weights(self) -> bool:
        """Whether each process holds a part of the weights."""
        return self.kind in ("fsdp", "zero3")

    @property
    def cuts_gradients(self) -> bool:
        """Whether each process holds a part of the gradients."""
        return self.kind in ("fsdp", "zero2", "zero3")

    def part(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the first process's part of a tensor: FSDP2 cuts rows, and pads; ZeRO cuts the flat tensor."""
        if self.kind == "ddp" or self.processes == 1 or not shape:
            return shape
        if self.kind == "fsdp":
            return (math.ceil(shape[0] / self.processes), *shape[1:])
        return (math.ceil(math.prod(shape) / self.processes),)

    def part_numel(self, shape: tuple[int, ...]) -> int:
        """Elements of the first process's part of a tensor."""
        return math.prod(self.part(shape))


ALONE = Spread()


@dataclass(frozen=True)
class Exchange:
    """Bytes at some moments of a step that are no part of this process's own: what is whole, or on its way."""

    begin: int = 0
    """While the first block runs forward."""
    forward: int = 0
    """While any other does."""
    head: int = 0
    """While the head runs."""
    backward: int = 0
    """While a block runs backward."""
    embedding: int = 0
    """While the embedding gets its gradient."""
    step: int = 0
    """While the optimizer steps."""


def exchange(model: Architecture, spread: Spread, item: int, trained: int, full: bool) -> Exchange:
    """Counts what processes hold beyond their part of weights, gradients and optimizer states.

    DDP: buckets of the size of all gradients (`gradient_as_bucket_view` is off in Accelerate), for the whole run.

    FSDP2: a group (a block; or all else: embedding, head, last norm) is gathered into a buffer, in the dtype of its
    weights, and copied out of it. In the forward a block's buffer lives until the next one's has been copied; in
    the backward the next block is fetched ahead, and a block's gradients are copied into the input of the
    reduce-scatter, which is kept until the next block's is made. All else is whole from the first block's forward to
    the end of the backward, and so is its gradient from where it is made. With b and r bytes of weights of a block
    and of all else, and g of a block's gradients: 2 b + 2 r at first, 3 b + r forward, b + r at the head, and
    2 b + r + 2 g and the head's gradient backward.

    ZeRO: the bucket for gradients, and one matrix's gradient; ZeRO-3 also what it may keep gathered, which is an
    upper bound.

    Args:
        item: bytes of a value in the compute dtype.
        trained: elements that take gradients.
        full: whether every weight does.
    """
    if spread.kind == "ddp":
        buckets = 4 * trained if spread.processes > 1 else 0
        return Exchange(buckets, buckets, buckets, buckets, buckets, buckets)
    rows = model.vocabulary * model.block.hidden
    if spread.kind == "fsdp":
        return _of_groups(model, spread, item, trained, full)
    gathered = item * min(model.parameters, max(_LIVE, largest_block(model))) if spread.cuts_weights else 0
    largest = max((one.numel for one in model.matrices), default=0)
    passing = gathered + item * BUCKET + (item * largest if full else 0)
    # The optimizer moves fp32 copies of its part of the gradients.
    part = math.ceil(trained / spread.processes)
    masters = 0 if spread.updates_on_host else 4 * (min(part, SUB_GROUP) if spread.kind == "zero3" else part)
    return Exchange(gathered, gathered, passing, passing, passing + (item * rows if full else 0), masters)


def _of_groups(model: Architecture, spread: Spread, item: int, trained: int, full: bool) -> Exchange:
    """`exchange` for FSDP2."""
    size, adapters = (4, 0) if full else (item, 4 * math.ceil(trained / model.layers))
    largest = largest_block(model)
    inside = sum(tensor.numel for tensor in model.tensors if _layer(tensor) is not None)
    block, rest = size * largest + adapters, size * (model.parameters - inside)
    moved, of_head, of_rest = adapters, 0, 0
    if full:
        moved, of_head, of_rest = block, 4 * model.vocabulary * model.block.hidden, rest
    kept = size * (inside - largest) if spread.gathered_once else 0  # blocks that are not let go after their forward
    return Exchange(
        begin=2 * block + 2 * rest,
        forward=3 * block + rest + kept,
        head=block + rest + kept,
        backward=2 * block + rest + 2 * moved + of_head + kept,
        embedding=max(rest, 0) + of_rest + max(of_rest, moved),
    )


def largest_block(model: Architecture) -> int:
    """Elements of the largest decoder block: what is gathered at once."""
    sizes: dict[int, int] = {}
    for tensor in model.tensors:
        number = _layer(tensor)
        if number is not None:
            sizes[number] = sizes.get(number, 0) + tensor.numel
    return max(sizes.values(), default=0)


def _layer(tensor: Tensor) -> int | None:
    """The block that a tensor belongs to; None outside."""
    found = _LAYER.search(tensor.name)
    return None if found is None else int(found[1])
