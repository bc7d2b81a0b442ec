"""From a model's config to its architecture: by arithmetic where the family is known, else by its own class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.errors import CheckpointError
from posttrain.estimate.architecture import Architecture, Block, Kind, Tensor
from posttrain.estimate.families import by_arithmetic


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """Returns the architecture of a config; imports torch only for a family that is not known here.

    Args:
        config: `config.json` of a model folder, or the config of a shipped shape. Of a multimodal model the
            language model counts.
        where: the model, for errors.

    Raises:
        CheckpointError: the installed transformers cannot build it.
    """
    text = config.get("text_config")
    part = text if isinstance(text, Mapping) and "model_type" in text else config
    return by_arithmetic(part) or by_class(part, where)


def by_class(config: Mapping[str, Any], where: str) -> Architecture:
    """Builds the transformers class of a config on the meta device and reads its parameters.

    Raises:
        CheckpointError: see `architecture_of`.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        built = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(built)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        todo = "give the config of an architecture that the installed transformers knows"
        raise CheckpointError(where, f"no model can be built from its config ({error})", todo) from None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tensors, seen = [], set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = _kind(module, parameter.dim(), module is embedding, module is head)
            tensors.append(Tensor(f"{prefix}.{name}", tuple(parameter.shape), kind))
    block = _block(built, tensors)
    rows = embedding.weight.shape[0]
    tied = head is None or head.weight is embedding.weight
    positions = getattr(built, "max_position_embeddings", None)
    layers = built.num_hidden_layers
    return Architecture(built.model_type, tuple(tensors), block, layers, rows, tied, positions, known=False)


def _kind(module: Any, dims: int, is_embedding: bool, is_head: bool) -> Kind:
    import torch

    if is_embedding:
        return "embedding"
    if is_head:
        return "head"
    if isinstance(module, torch.nn.Linear):
        return "linear" if type(module) is torch.nn.Linear else "linear_like"
    name = type(module).__name__
    if "Norm" in name:
        return "norm"
    if "Router" in name:
        return "router"
    return "experts" if dims == 3 else "other"


def _block(config: Any, tensors: list[Tensor]) -> Block:
    """Sizes of a Llama-like block from an unknown architecture's config and tensors."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    experts = [tensor for tensor in tensors if tensor.kind == "experts"]
    widest = max((tensor.shape[0] for tensor in tensors if tensor.is_matrix), default=4 * hidden)
    return Block(
        hidden=hidden,
        heads=heads,
        query=heads * head,
        key=key_heads * head,
        mlp=getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None) or widest,
        experts=experts[0].shape[0] if experts else 0,
        experts_per_token=getattr(config, "num_experts_per_tok", 0) if experts else 0,
    )
