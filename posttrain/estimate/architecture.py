"""A model as the estimate sees it: every tensor by name and shape, and what a block computes. No weights, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["embedding", "head", "linear", "linear_like", "norm", "router", "experts", "other"]
"""Of the module that holds a tensor. `linear` is exactly torch's `Linear`; `linear_like` a class derived from it,
which peft adapts and bitsandbytes does not quantise (Falcon has them)."""


@dataclass(frozen=True)
class Tensor:
    """One parameter."""

    name: str
    """As `named_parameters` of the transformers model spells it."""
    shape: tuple[int, ...]
    kind: Kind

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def module(self) -> str:
        """Name of the module that holds it."""
        return self.name.rpartition(".")[0]

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a linear layer, its shape (out, in)."""
        return self.kind in ("linear", "linear_like") and len(self.shape) == 2


@dataclass(frozen=True)
class Block:
    """Sizes and habits of one decoder block that decide what its forward keeps for the backward."""

    hidden: int
    heads: int
    query: int
    """Width of all query heads."""
    key: int
    """Width of all key heads, as of all value heads."""
    mlp: int
    """Width inside the MLP, or inside one expert."""
    norm: Literal["rms", "rms32", "layer"] = "rms"
    """`rms32` multiplies by its weight in fp32 (Gemma, OLMo-2); `layer` is torch's LayerNorm."""
    norms: int = 2
    norm_inputs: int = 2
    """Different tensors that the norms read: parallel blocks share one."""
    head_norm: bool = False
    """Queries and keys have a norm of their own."""
    gated: bool = True
    activation_copies: int = 1
    """Tensors that an ungated activation keeps; four where it is written out in torch (`gelu_new`)."""
    fused_qkv: bool = False
    """Queries, keys and values come from one layer, and values stay a view of its output."""
    copied_heads: bool = False
    """Rotation copies the heads into another layout, so that attention's output is copied once more."""
    math_attention: bool = False
    """Key heads are broadcast, which no fused kernel takes: scores are materialised in fp32."""
    experts: int = 0
    experts_per_token: int = 0


@dataclass(frozen=True)
class Architecture:
    """A causal language model by its config."""

    model_type: str
    tensors: tuple[Tensor, ...]
    """Every parameter once: a tied head is not among them."""
    block: Block
    layers: int
    vocabulary: int
    tied: bool
    positions: int | None
    """Longest sequence, where the config has one."""
    known: bool = True
    """False where the blocks are none of the known ones: activations then go by the formula for Llama's."""

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied head counted once."""
        return sum(tensor.numel for tensor in self.tensors)

    def of_kind(self, *kinds: Kind) -> tuple[Tensor, ...]:
        """The tensors of modules of some kinds."""
        return tuple(tensor for tensor in self.tensors if tensor.kind in kinds)

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Weights of the linear layers, the head left out."""
        return tuple(tensor for tensor in self.tensors if tensor.is_matrix)

    @property
    def matmul_parameters(self) -> int:
        """Parameters that a token is multiplied with: linear layers, head, and the experts that it is sent to."""
        head = self.vocabulary * self.block.hidden
        dense = sum(tensor.numel for tensor in self.tensors if tensor.is_matrix or tensor.kind == "router")
        experts = sum(tensor.numel for tensor in self.of_kind("experts"))
        active = experts * self.block.experts_per_token // self.block.experts if self.block.experts else 0
        return head + dense + active

    def with_vocabulary(self, rows: int) -> Architecture:
        """The same model with another number of embedding and head rows."""
        moved = tuple(
            Tensor(tensor.name, (rows, *tensor.shape[1:]), tensor.kind)
            if tensor.kind in ("embedding", "head") and tensor.shape[0] == self.vocabulary
            else tensor
            for tensor in self.tensors
        )
        return Architecture(
            self.model_type, moved, self.block, self.layers, rows, self.tied, self.positions, self.known
        )
