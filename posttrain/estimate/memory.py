"""Peak memory of one training step, from a model's shape and how it is trained; and the largest piece that fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from posttrain.estimate.activations import Device, Pass, norm_bytes, saved_by_block
from posttrain.estimate.architecture import Architecture
from posttrain.estimate.spread import Exchange, exchange
from posttrain.estimate.weights import optimizer_scratch, static_bytes, trained_parts, trained_tensors

GIB = 1 << 30
_TILE_TOKENS, _TILE_COLUMNS = 4096, 32768
"""TRL's fused head computes logits in tiles of this size (trl 1.16), however small the vocabulary."""
_PLAIN_LOGITS = 1 << 26
"""Logits up to which our head on a CPU holds them all (`posttrain.training.head`)."""
_FRAGMENTED = 0.05
"""Part of what comes and goes within a step that the allocator loses between blocks."""
_CONTEXT: dict[Device, int] = {"cuda": 600 << 20, "cpu": 700 << 20}
"""What a process takes before it holds a tensor: CUDA context and cuBLAS workspaces; torch and its libraries."""
FEWEST, MOST = 256, 65536
"""Tokens of a piece that `largest_micro_batch` tries."""


@dataclass(frozen=True)
class Piece:
    """What goes through the model at once."""

    tokens: int
    row_tokens: int
    """Length of a packed row: what a dense mask is quadratic in."""
    checkpointing: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step at its peak, by what holds them; of one process and its device."""

    weights: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward at the peak."""
    casts: int
    """16-bit copies of fp32 weights, which autocast keeps until the end of the forward."""
    head: int
    """Logits in tiles, and the gradients at the head."""
    working: int
    """What one block, one weight's gradient or the optimizer needs while it computes."""
    exchange: int
    """Of several processes: buckets, and what is whole for a moment; see `posttrain.estimate.spread.exchange`."""
    margin: int
    """Fragmentation, and the process itself; not part of `allocated`."""

    @property
    def allocated(self) -> int:
        """What torch's allocator holds at the peak: comparable with `torch.cuda.max_memory_allocated`."""
        return sum(asdict(self).values()) - self.margin

    @property
    def device(self) -> int:
        """What the device must have."""
        return self.allocated + self.margin


def predict(model: Architecture, how: Pass, optim: str, piece: Piece) -> Memory:
    """Finds the peak of a training step that is not a run's first: gradients and optimizer state are there.

    The largest moment counts: the head's forward and backward, with everything kept; a block's backward; the
    forward of the last block; the embedding's gradient and the optimizer's step.

    Args:
        optim: `trainer.optim`.
    """
    spread, method = how.spread, how.method
    static = static_bytes(model, method, how.precision, optim, spread)
    sent = exchange(model, spread, how.compute, static.trainable_parameters, method.is_full)
    moments = _moments(model, how, piece, sent)
    scratch = 0 if spread.updates_on_host else optimizer_scratch(trained_parts(model, method, spread), optim)
    moments.append(_Moment(0, 0, 0, scratch, sent.step))
    moments.append(_Moment(0, 0, 0, _embedding_gradient(model, how), sent.embedding))
    worst = max(moments, key=lambda moment: moment.total)
    margin = _CONTEXT[how.device] + round(_FRAGMENTED * worst.total)
    return Memory(
        0 if spread.weights_on_host else static.weights,
        0 if spread.weights_on_host else static.trainable,
        0 if spread.updates_on_host else static.gradients,
        0 if spread.updates_on_host else static.optimizer - static.paged,
        worst.activations,
        worst.casts,
        worst.head,
        worst.working,
        worst.exchange,
        margin,
    )


def host_bytes(model: Architecture, how: Pass, optim: str) -> int:
    """Bytes that one process keeps in the memory of its host instead of its device's."""
    static = static_bytes(model, how.method, how.precision, optim, how.spread)
    weights = static.weights + static.trainable if how.spread.weights_on_host else 0
    return weights + (static.gradients + static.optimizer if how.spread.updates_on_host else 0)


def predict_peak(model: Architecture, how: Pass, optim: str, piece: Piece) -> int:
    """Bytes that torch's allocator will hold at the peak of a training step; see `predict`."""
    return predict(model, how, optim, piece).allocated


def largest_micro_batch(
    model: Architecture,
    how: Pass,
    optim: str,
    device_bytes: int,
    checkpointing: bool,
    longest: int,
    row_tokens: int | None = None,
) -> int | None:
    """Most tokens of a piece that fit a device, in steps of 256; None where not even the longest row does.

    Args:
        device_bytes: memory of the device.
        longest: tokens of the longest row, or of the longer sequence of a pair: no piece is smaller.
        row_tokens: capacity of a packed row where a dense mask keeps rows short; None: a piece is one row.
    """

    def fits(tokens: int) -> bool:
        row = tokens if row_tokens is None else min(tokens, max(row_tokens, longest))
        return predict(model, how, optim, Piece(tokens, row, checkpointing)).device <= device_bytes

    low = max(longest, FEWEST)
    if not fits(low):
        return longest if longest < low and fits(longest) else None
    high = max(MOST, low)
    while high - low > FEWEST:
        middle = (low + high) // 2 // FEWEST * FEWEST
        middle = middle if middle > low else low + FEWEST
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def needs_checkpointing(
    model: Architecture, how: Pass, optim: str, device_bytes: int, tokens: int, row_tokens: int
) -> bool:
    """Whether a piece fits a device only if its activations are recomputed."""
    piece = Piece(tokens, row_tokens, checkpointing=False)
    return predict(model, how, optim, piece).device > device_bytes


@dataclass(frozen=True)
class _Moment:
    activations: int
    casts: int
    head: int
    working: int
    exchange: int

    @property
    def total(self) -> int:
        return self.activations + self.casts + self.head + self.working + self.exchange


def _moments(model: Architecture, how: Pass, piece: Piece, sent: Exchange) -> list[_Moment]:
    one = saved_by_block(model, how).bytes(piece.tokens, piece.row_tokens)
    inputs = model.layers * how.stream * model.block.hidden * piece.tokens
    kept = inputs if piece.checkpointing else model.layers * one
    outside = _outside(model, how, piece)
    casts = _casts(model, how)
    forward, backward = _working(model, how, piece.tokens)
    before, head = _head(model, how, piece.tokens)
    if piece.checkpointing:
        cached = casts // model.layers if how.spread.kind == "fsdp" else casts  # its stages switch autocast's cache off
        return [
            _Moment(kept + outside, 0, head, 0, sent.head),
            _Moment(kept + outside, cached, before, 0, sent.head),
            _Moment(kept + one, casts // model.layers, 0, backward, sent.backward),
            _Moment(kept, cached, 0, forward, sent.forward),
            _Moment(one, casts // model.layers, 0, forward, sent.begin),
        ]
    return [
        _Moment(kept + outside, casts, head, 0, sent.head),
        _Moment(one, casts // model.layers, 0, forward, sent.begin),
        _Moment(kept, casts, 0, forward, sent.forward),
        _Moment(kept, casts, 0, backward, sent.backward),
    ]


def _outside(model: Architecture, how: Pass, piece: Piece) -> int:
    """Bytes kept outside the blocks: final norm and its output, rotations, ids, one mask."""
    block, tokens = model.block, piece.tokens
    shared = how.stream * block.hidden if block.norm == "layer" else 0
    rotations = 2 * how.stream * block.query // block.heads
    mask = 0 if how.attention == "fused" else min(piece.row_tokens, tokens)
    return round(tokens * (norm_bytes(block, how) + shared + how.stream * block.hidden + rotations + 24 + mask))


def _casts(model: Architecture, how: Pass) -> int:
    """Autocast's copies of trained weights; the head casts its own, tile by tile, and stacked experts none.

    None where layers see their weights in the compute dtype anyway.
    """
    if how.compute == 4 or how.spread.low:
        return 0
    if how.method.is_full:
        return how.compute * sum(tensor.numel for tensor in model.matrices)
    return how.compute * sum(tensor.numel for tensor in trained_tensors(model, how.method))


def _head(model: Architecture, how: Pass, tokens: int) -> tuple[int, int]:
    """Bytes of the head's forward and of its backward, every token taken for one with loss."""
    hidden, rows, item = model.block.hidden, model.vocabulary, how.compute
    columns = min(rows, _TILE_COLUMNS)
    adapter = how.method.adapter
    moved = adapter is not None and adapter.token_rows > 0
    trained = how.method.is_full or (adapter is not None and any("lm_head" in one for one in adapter.modules_to_save))
    weight = (4 if trained else 0) * rows * hidden
    if moved:  # the rows are put into a copy of the whole matrix, which gets a gradient of its own
        weight += (4 + 2 * how.stream) * rows * hidden
    if how.device == "cpu" and tokens * rows <= _PLAIN_LOGITS:
        logits = (15 if item == 2 else 16) * rows * tokens + item * hidden * tokens
        if trained and how.spread.low:
            weight -= (4 - item) * rows * hidden  # the gradient in the dtype of the gathered weight alone
        return logits, weight + logits + 4 * hidden * tokens
    if trained and how.spread.low:
        weight += item * rows * hidden  # summed up in fp32, then given in the dtype of the gathered weight
    tile_tokens = min(tokens, _TILE_TOKENS)
    tile = item * tile_tokens * _TILE_COLUMNS
    folded = 24 * tile_tokens * columns if how.device == "cpu" else 0  # torch folds a tile in fp32, Triton in place
    copies = (item * (columns + tile_tokens) * hidden) if trained and item == 2 and not how.spread.low else 0
    forward = tile + folded + copies + (how.stream * hidden * rows if moved else 0)
    return forward, weight + tile + folded + copies + (4 + 2 * how.stream) * hidden * tokens


def _working(model: Architecture, how: Pass, tokens: int) -> tuple[int, int]:
    """What the forward and the backward of one block need beyond what is kept.

    Bytes of a token as multiples of the MLP's and the model's width, fitted to the live storages of real
    blocks (`tests/estimate/test_estimate_peak.py` holds them to it).
    """
    block, adapter = model.block, how.method.adapter
    mask = 0 if adapter is None or not adapter.dropout else 4 if how.device == "cpu" else 1
    if how.compute == 4:
        forward, backward = (16.0, 9.0), (8.0, 9.0 if adapter is None else 5.0)
    elif adapter is None:
        forward, backward = (5.5, 9.0), (3.5, 9.0)
    else:
        forward, backward = (8.0 + (mask + 2 if mask else 0), 9.0), (6.0 + mask, 12.6)
    inner = block.mlp * (block.experts_per_token if block.experts else 1)
    spans = [round(tokens * (mlp * inner + wide * block.hidden)) for mlp, wide in (forward, backward)]
    largest = max((tensor.numel for tensor in model.matrices), default=0)
    if how.method.four_bits:
        spans = [span + how.compute * largest for span in spans]
    if adapter is None and not how.spread.low:
        made = 0 if how.spread.kind == "fsdp" else 4 * largest  # those of a whole block are part of the exchange
        spans[1] += (how.compute if how.compute == 2 else 0) * largest + made
    return spans[0], spans[1]


def _embedding_gradient(model: Architecture, how: Pass) -> int:
    """The embedding's gradient comes last, as a whole, and is added to what is there."""
    adapter = how.method.adapter
    if adapter is None and how.spread.kind != "ddp":
        return 0  # part of what is exchanged
    if adapter is None or any("embed" in name for name in adapter.modules_to_save):
        return 4 * model.vocabulary * model.block.hidden
    return 0


def with_eight_bits(optim: str) -> str:
    """The 8-bit form of an Adam or Lion; others stay as they are."""
    if optim.startswith("adamw") or optim == "paged_adamw_32bit":
        return "adamw_bnb_8bit"
    return "lion_8bit" if optim.startswith("lion") else optim
