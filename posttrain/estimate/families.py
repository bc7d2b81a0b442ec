"""Architectures by arithmetic: parameter names and shapes of the families whose layout is known here.

A test holds every one of them, tensor by tensor, to the transformers class on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from posttrain.estimate.architecture import Architecture, Block, Kind, Tensor

Config = Mapping[str, Any]
_Part = tuple[str, tuple[int, ...], Kind]


@dataclass(frozen=True)
class _Outside:
    """Names around the blocks."""

    embedding: str = "model.embed_tokens"
    blocks: str = "model.layers"
    norm: str = "model.norm"


def by_arithmetic(config: Config) -> Architecture | None:
    """Returns the architecture of a config, or None where its family or one of its sizes is not known here.

    Args:
        config: `config.json` of a model folder, or the config of a shipped shape.
    """
    build = _FAMILIES.get(str(config.get("model_type")))
    try:
        return build(config) if build else None
    except KeyError:
        return None  # a size under another name, or left to the class's default: the class itself is asked


def _assemble(
    config: Config,
    block: Block,
    parts: list[_Part],
    outside: _Outside,
    tied: bool,
    norm_bias: bool = False,
    head_bias: bool = False,
) -> Architecture:
    """Puts blocks, embedding, final norm and head together."""
    hidden, rows, layers = block.hidden, int(config["vocab_size"]), int(config["num_hidden_layers"])
    tensors = [Tensor(f"{outside.embedding}.weight", (rows, hidden), "embedding")]
    for number in range(layers):
        tensors += [Tensor(f"{outside.blocks}.{number}.{name}", shape, kind) for name, shape, kind in parts]
    tensors += [
        Tensor(f"{outside.norm}.{name}", (hidden,), "norm")
        for name in (("weight", "bias") if norm_bias else ("weight",))
    ]
    if not tied:
        tensors.append(Tensor("lm_head.weight", (rows, hidden), "head"))
    if head_bias:
        tensors.append(Tensor("lm_head.bias", (rows,), "head"))
    positions = config.get("max_position_embeddings")
    return Architecture(str(config["model_type"]), tuple(tensors), block, layers, rows, tied, positions)


def _linear(name: str, out: int, fan_in: int, bias: bool = False, kind: Kind = "linear") -> Iterator[_Part]:
    yield f"{name}.weight", (out, fan_in), kind
    if bias:
        yield f"{name}.bias", (out,), kind


def _norm(name: str, width: int, bias: bool = False) -> Iterator[_Part]:
    yield f"{name}.weight", (width,), "norm"
    if bias:
        yield f"{name}.bias", (width,), "norm"


@dataclass(frozen=True)
class _Llama:
    """How a family differs from Llama."""

    qkv_bias: bool | None = False
    """None: as `attention_bias` says, for the output projection as well."""
    tied: bool = False
    """Where the config does not say."""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm: Any = "rms"
    head_norm: str | None = None
    """`head`: over one head; `all`: over all heads together."""
    own_head_dim: bool = False
    """The config must say `head_dim`."""


def _llama_like(family: _Llama) -> Callable[[Config], Architecture]:
    def build(config: Config) -> Architecture:
        block = _llama_block(config, family)
        parts = [*_llama_attention(config, family, block)]
        if config["model_type"] == "olmoe":
            parts += _moe(block)
        else:
            mlp_bias = bool(config.get("mlp_bias", False))
            for name in ("gate_proj", "up_proj"):
                parts += _linear(f"mlp.{name}", block.mlp, block.hidden, mlp_bias)
            parts += _linear("mlp.down_proj", block.hidden, block.mlp, mlp_bias)
        for name in family.norms:
            parts += _norm(name, block.hidden)
        return _assemble(config, block, parts, _Outside(), bool(config.get("tie_word_embeddings", family.tied)))

    return build


def _llama_block(config: Config, family: _Llama) -> Block:
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    head = config["head_dim"] if family.own_head_dim else config.get("head_dim") or hidden // heads
    key_heads = config.get("num_key_value_heads") or heads
    norms = len(family.norms)
    experts = int(config["num_experts"]) if config["model_type"] == "olmoe" else 0
    return Block(
        hidden=hidden,
        heads=heads,
        query=heads * head,
        key=key_heads * head,
        mlp=int(config["intermediate_size"]),
        norm=family.norm,
        norms=norms,
        norm_inputs=norms,
        head_norm=family.head_norm is not None,
        experts=experts,
        experts_per_token=int(config["num_experts_per_tok"]) if experts else 0,
    )


def _llama_attention(config: Config, family: _Llama, block: Block) -> Iterator[_Part]:
    own = bool(config.get("attention_bias", False))
    bias = own if family.qkv_bias is None else family.qkv_bias
    for name, width in (("q_proj", block.query), ("k_proj", block.key), ("v_proj", block.key)):
        yield from _linear(f"self_attn.{name}", width, block.hidden, bias)
    yield from _linear("self_attn.o_proj", block.hidden, block.query, family.qkv_bias is None and own)
    if family.head_norm:
        one = family.head_norm == "head"
        yield from _norm("self_attn.q_norm", block.query // block.heads if one else block.query)
        yield from _norm("self_attn.k_norm", block.query // block.heads if one else block.key)


def _moe(block: Block) -> Iterator[_Part]:
    """A router and all experts of a block in two tensors, as transformers 5 holds them."""
    yield "mlp.gate.weight", (block.experts, block.hidden), "router"
    yield "mlp.experts.gate_up_proj", (block.experts, 2 * block.mlp, block.hidden), "experts"
    yield "mlp.experts.down_proj", (block.experts, block.hidden, block.mlp), "experts"


def _phi3(config: Config) -> Architecture:
    block = _llama_block(config, _Llama())
    block = Block(**{**block.__dict__, "fused_qkv": True, "copied_heads": True})
    parts = [
        *_linear("self_attn.o_proj", block.hidden, block.query),
        *_linear("self_attn.qkv_proj", block.query + 2 * block.key, block.hidden),
        *_linear("mlp.gate_up_proj", 2 * block.mlp, block.hidden),
        *_linear("mlp.down_proj", block.hidden, block.mlp),
        *_norm("input_layernorm", block.hidden),
        *_norm("post_attention_layernorm", block.hidden),
    ]
    return _assemble(config, block, parts, _Outside(), bool(config.get("tie_word_embeddings", False)))


def _plain_block(config: Config, mlp: int, **habits: Any) -> Block:
    """A block with LayerNorms and an MLP of two layers."""
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    key = hidden // heads * int(habits.pop("key_heads", heads))
    return Block(hidden, heads, query=hidden, key=key, mlp=mlp, norm="layer", gated=False, **habits)


def _phi(config: Config) -> Architecture:
    if config.get("qk_layernorm"):
        raise KeyError("qk_layernorm")
    act = str(config["hidden_act"])
    block = _plain_block(
        config,
        int(config["intermediate_size"]),
        key_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        norms=1,
        norm_inputs=1,
        activation_copies=4 if act == "gelu_new" else 1,
        copied_heads=True,
    )
    parts = [
        *_linear("self_attn.q_proj", block.query, block.hidden, True),
        *_linear("self_attn.k_proj", block.key, block.hidden, True),
        *_linear("self_attn.v_proj", block.key, block.hidden, True),
        *_linear("self_attn.dense", block.hidden, block.query, True),
        *_linear("mlp.fc1", block.mlp, block.hidden, True),
        *_linear("mlp.fc2", block.hidden, block.mlp, True),
        *_norm("input_layernorm", block.hidden, True),
    ]
    tied = bool(config.get("tie_word_embeddings", False))
    outside = _Outside(norm="model.final_layernorm")
    return _assemble(config, block, parts, outside, tied, norm_bias=True, head_bias=True)


def _falcon(config: Config) -> Architecture:
    """Falcon-7B's form; the later one (`new_decoder_architecture`) and alibi are left to the class itself."""
    if config.get("new_decoder_architecture") or config.get("alibi") or not config["multi_query"]:
        raise KeyError("new_decoder_architecture")
    if not config["parallel_attn"]:
        raise KeyError("parallel_attn")
    hidden, bias = int(config["hidden_size"]), bool(config["bias"])
    mlp = int(config.get("ffn_hidden_size") or 4 * hidden)
    block = _plain_block(config, mlp, key_heads=1, norms=1, norm_inputs=1, math_attention=True)
    parts = [
        *_linear("self_attention.query_key_value", hidden + 2 * block.key, hidden, bias, "linear_like"),
        *_linear("self_attention.dense", hidden, hidden, bias, "linear_like"),
        *_linear("mlp.dense_h_to_4h", mlp, hidden, bias, "linear_like"),
        *_linear("mlp.dense_4h_to_h", hidden, mlp, bias, "linear_like"),
        *_norm("input_layernorm", hidden, True),
    ]
    outside = _Outside("transformer.word_embeddings", "transformer.h", "transformer.ln_f")
    return _assemble(config, block, parts, outside, bool(config.get("tie_word_embeddings", True)), norm_bias=True)


def _gpt_neox(config: Config) -> Architecture:
    hidden, mlp = int(config["hidden_size"]), int(config["intermediate_size"])
    bias = bool(config.get("attention_bias", True))
    parallel = bool(config.get("use_parallel_residual", True))
    block = _plain_block(config, mlp, norm_inputs=1 if parallel else 2, fused_qkv=True, copied_heads=True)
    parts = [
        *_norm("input_layernorm", hidden, True),
        *_norm("post_attention_layernorm", hidden, True),
        *_linear("attention.query_key_value", 3 * hidden, hidden, bias),
        *_linear("attention.dense", hidden, hidden, bias),
        *_linear("mlp.dense_h_to_4h", mlp, hidden, True),
        *_linear("mlp.dense_4h_to_h", hidden, mlp, True),
    ]
    tied = bool(config.get("tie_word_embeddings", False))
    outside = _Outside("gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm")
    return _assemble(config, block, parts, outside, tied, norm_bias=True)


_TWO_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_FOUR = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_FAMILIES: dict[str, Callable[[Config], Architecture]] = {
    "llama": _llama_like(_Llama(qkv_bias=None)),
    "mistral": _llama_like(_Llama()),
    "qwen2": _llama_like(_Llama(qkv_bias=True)),
    "qwen3": _llama_like(_Llama(qkv_bias=None, head_norm="head", own_head_dim=True)),
    "gemma": _llama_like(_Llama(qkv_bias=None, tied=True, norm="rms32", own_head_dim=True)),
    "gemma3_text": _llama_like(
        _Llama(qkv_bias=None, tied=True, norms=_FOUR, norm="rms32", head_norm="head", own_head_dim=True)
    ),
    "olmo2": _llama_like(_Llama(qkv_bias=None, norms=_TWO_AFTER, norm="rms32", head_norm="all")),
    "olmoe": _llama_like(_Llama(qkv_bias=None, head_norm="all")),
    "phi3": _phi3,
    "phi": _phi,
    "falcon": _falcon,
    "gpt_neox": _gpt_neox,
}
