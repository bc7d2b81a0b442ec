"""What one forward pass keeps for its backward, per decoder block: a formula, held to measurements by a test.

The terms follow Korthikanti et al. 2022 (Reducing Activation Recomputation in Large Transformer Models, 4.1),
but count what this stack really saves, as `saved_tensors_hooks` shows it on the CPU for every family here:

* trained weights are fp32, so under bf16 autocast the residual stream of full training is fp32 (4 bytes a
  value), and every linear layer keeps its own 16-bit copy of its input;
* an RMSNorm written in torch keeps its input in fp32, and in full training what it multiplies by its weight;
* a frozen linear layer keeps nothing; a LoRA pair keeps a 16-bit copy of its input, and its inner vector;
* dense masks become one additive copy per block; kernels that skip them keep queries, keys, values, their
  output and one fp32 per head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from posttrain.estimate.adapters import AdapterShape, Target, adapter_targets
from posttrain.estimate.architecture import Architecture, Block
from posttrain.estimate.spread import ALONE, Spread
from posttrain.estimate.weights import ITEM, Method, Precision

Backend = Literal["fused", "sdpa", "eager"]
"""`fused`: the flash kernels, FlexAttention, or sdpa without a mask. `sdpa`: with a dense mask."""
Device = Literal["cuda", "cpu"]


def counted_as(attention: str) -> Backend:
    """How the memory of an attention implementation is counted; `auto` takes none that holds a mask."""
    if attention == "sdpa":
        return "sdpa"
    return "eager" if attention == "eager" else "fused"


FULL = Method()


@dataclass(frozen=True)
class Pass:
    """How a forward pass runs."""

    precision: Precision
    device: Device = "cuda"
    attention: Backend = "fused"
    method: Method = FULL
    spread: Spread = ALONE

    @property
    def compute(self) -> int:
        """Bytes of a value inside linear layers."""
        return ITEM[self.precision]

    @property
    def stream(self) -> int:
        """Bytes of a value of the residual stream: those of the embedding that layers see."""
        return 4 if self.method.is_full and not self.spread.low else self.compute


@dataclass(frozen=True)
class Saved:
    """Bytes that one block keeps: `per_token` of each token, `per_pair` of each token and place in its row."""

    per_token: float
    per_pair: float
    fixed: float

    def bytes(self, tokens: int, row_tokens: int) -> int:
        """Bytes of a piece of `tokens` tokens in rows of `row_tokens`."""
        return round(tokens * (self.per_token + self.per_pair * min(row_tokens, tokens)) + self.fixed)


def saved_by_block(model: Architecture, how: Pass) -> Saved:
    """Counts what one block keeps for its backward, whichever block: all have the same layout."""
    block = model.block
    attention, pairs = _attention(block, how)
    per_token = norm_bytes(block, how) * block.norms + _shared_norm_input(block, how) + _head_norms(block, how)
    per_token += attention + _mlp(block, how)
    fixed = 0.0
    if how.method.adapter is None:
        per_token += _inputs_of_trained(block, how)
    else:
        kept, fixed = _inputs_of_adapters(first_block(model, how.method.adapter), how.method.adapter, block, how)
        per_token += kept
    return Saved(per_token, pairs, fixed)


def first_block(model: Architecture, adapter: AdapterShape) -> list[Target]:
    """An adapter's targets in one block."""
    found = adapter_targets(model, adapter)
    return [target for target in found if ".0." in target.weight.name]


def norm_bytes(block: Block, how: Pass) -> float:
    """What a norm over the hidden size keeps of a token, an input that other norms read as well left out."""
    full, width = how.method.is_full, block.hidden
    if block.norm != "layer":
        return 4 * width + 4 + ((4 if block.norm == "rms32" else how.stream) * width if full else 0)
    if how.device == "cuda" and how.stream == 2:
        return 4 * width + 8  # autocast gives LayerNorm an fp32 copy of its own
    return 2 * how.stream


def _shared_norm_input(block: Block, how: Pass) -> float:
    own_copy = how.device == "cuda" and how.stream == 2
    return how.stream * block.hidden * block.norm_inputs if block.norm == "layer" and not own_copy else 0


def _head_norms(block: Block, how: Pass) -> float:
    if not block.head_norm:
        return 0
    trained = (4 if block.norm == "rms32" else how.compute) if how.method.is_full else 0
    return (4 + trained) * (block.query + block.key) + 8


def _attention(block: Block, how: Pass) -> tuple[float, float]:
    """(bytes of a token, bytes of a token and place in its row)."""
    item = how.compute
    if block.math_attention:
        return 4 * (block.query + 2 * block.key), 4 * block.heads
    repeated = how.attention != "fused" and block.key != block.query
    keys = values = item * (block.query if repeated else block.key)
    if block.fused_qkv and not repeated:
        values = item * (block.query + 2 * block.key)  # a view: its storage is the whole output
    kept = item * block.query + keys + values
    if how.attention == "eager":
        return kept, block.heads * (4 + (item if item == 2 else 0))
    return kept + item * block.query + 4 * block.heads, item if how.attention == "sdpa" else 0


def _mlp(block: Block, how: Pass) -> float:
    if block.experts:
        values = block.experts_per_token * how.stream * (2 * block.hidden + 4 * block.mlp)
        return values + 4 * block.experts + 36 * block.experts_per_token
    return how.compute * block.mlp * (3 if block.gated else block.activation_copies)


def _inputs_of_trained(block: Block, how: Pass) -> float:
    """Inputs of linear layers with trained weights; a 16-bit copy each where the stream is fp32."""
    item = how.compute
    apart = how.stream != item
    first = item * block.hidden * ((1 if block.fused_qkv or block.math_attention else 3) if apart else 1)
    attention_out = item * block.query if block.copied_heads or (block.math_attention and apart) else 0
    if block.experts:
        return first + attention_out + item * block.hidden
    inside = item * block.hidden * ((2 if block.gated and not block.fused_qkv else 1) if apart else 1)
    if not apart and block.norm == "layer" and block.norms == 1:
        inside = 0  # both halves of a parallel block read the same tensor
    return first + attention_out + inside + item * block.mlp


def _inputs_of_adapters(targets: list[Target], adapter: AdapterShape, block: Block, how: Pass) -> tuple[float, float]:
    """What LoRA pairs keep: (bytes of a token, bytes whatever the tokens)."""
    item, per_token, fixed = how.compute, 0.0, 0.0
    mask = 0 if not adapter.dropout else 1 if how.device == "cuda" else 4
    inputs: dict[str, float] = {}
    for target in targets:
        weight = target.weight
        if weight.kind == "experts":
            fixed += item * weight.numel  # peft adds the delta to all experts, and the product keeps the sum
            continue
        if weight.kind == "router":
            per_token += item * block.hidden
            continue
        out, fan_in = weight.shape
        per_token += item * target.rank + mask * fan_in
        if item == 2 or adapter.dropout:
            per_token += item * fan_in
        else:
            inputs[_input_of(weight.module)] = item * fan_in
        if adapter.dora:
            per_token += 2 * item * out
            fixed += item * fan_in * fan_in  # peft finds the norm of B A by sending an identity through them
    if "attention_out" in inputs and not block.copied_heads:
        inputs["attention_out"] = 0  # attention's own output, kept already
    return per_token + sum(inputs.values()), fixed


def _input_of(module: str) -> str:
    """Which tensor a linear layer reads, by its name: layers of one name share it."""
    last = module.rpartition(".")[2]
    if last in ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value"):
        return "attention_in"
    if last in ("gate_proj", "up_proj", "gate_up_proj", "fc1", "dense_h_to_4h"):
        return "mlp_in"
    return "attention_out" if last in ("o_proj", "dense") else last
