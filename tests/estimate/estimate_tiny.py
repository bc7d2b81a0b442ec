"""Tiny models of every architecture that the estimate is held to, and what they really keep."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from posttrain.models.load import Adapter, add_adapter

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "olmo2", "olmoe", "falcon", "gpt_neox", "phi")
VOCABULARY = 512


def tiny_config(kind: str, layers: int = 2) -> PretrainedConfig:
    """A small config of an architecture; no two sizes are the same where it lets them differ."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": layers, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1}
    if kind not in ("gpt_neox", "falcon"):
        sizes["num_key_value_heads"] = 2
    if kind == "falcon":
        sizes |= {"multi_query": True, "parallel_attn": True, "bias": False, "new_decoder_architecture": False}
    else:
        sizes["intermediate_size"] = 160
    if kind in ("gemma", "qwen3"):
        sizes["head_dim"] = 16
    if kind == "olmoe":
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2}
    return AutoConfig.for_model(kind, **sizes)


def tiny_model(config: PretrainedConfig, method: str, precision: str, attention: str, dropout: float = 0.0) -> Any:
    """The model as a stage would train it: fp32 where every weight trains, else frozen with an adapter of rank 4."""
    config._attn_implementation = attention
    dtype = torch.float32 if method == "full" or precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if method != "full":
        model.requires_grad_(False)
        adapter = Adapter(
            r=4, lora_alpha=4, lora_dropout=dropout, target_modules="all-linear", use_dora=method == "dora"
        )
        model = add_adapter(model, adapter, [])
    return model.train()


def saved_bytes(model: Any, tokens: int, precision: str, packed: bool) -> int:
    """Bytes of all storages that one forward keeps for its backward, parameters and their 16-bit copies left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(parameter.shape) for parameter in model.parameters()}
    shapes |= {shape[::-1] for shape in shapes}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place and place not in weights and tuple(tensor.shape) not in shapes:
            kept.setdefault(place, tensor)
        return tensor

    ids = torch.randint(2, VOCABULARY, (1, tokens))
    half = tokens // 2
    positions = torch.cat([torch.arange(half), torch.arange(tokens - half)]) if packed else torch.arange(tokens)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        output = model(input_ids=ids, position_ids=positions[None], use_cache=False)
    assert output.logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
