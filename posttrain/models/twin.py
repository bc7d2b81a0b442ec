"""Tiny random twins of models: the same architecture class, small enough for every stage to run on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAD_DIM = 16
LAYERS = 2
_MULTIPLE = 8  # rows of the embedding matrix, as in a real model

# Sizes that no architecture ties to another one; a field that a config does not have is left out.
_SMALL = {
    "num_hidden_layers": LAYERS,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def tiny_config(config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Shrinks a model's config: two layers, heads of 16 dimensions, queries per key head as in the original.

    Args:
        config: `model_type` and the fields of the real one; aliases such as `n_head` are not known here.
        vocab_size: tokens of the twin's tokenizer; rounded up to a multiple of 8.
    """
    heads, key_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    queries = heads // (key_heads or heads)
    small_heads = queries * max(1, 4 // queries)
    tiny = {**config, **{name: size for name, size in _SMALL.items() if name in config}}
    tiny |= {"num_attention_heads": small_heads, "hidden_size": small_heads * HEAD_DIM}
    if key_heads is not None:
        tiny["num_key_value_heads"] = small_heads // queries
    if config.get("head_dim") is not None:
        tiny["head_dim"] = HEAD_DIM
    if config.get("layer_types"):  # one layer of each type first: a hybrid stays one
        kinds = list(dict.fromkeys(config["layer_types"]))
        tiny["layer_types"] = (kinds * LAYERS)[:LAYERS]
    tiny["vocab_size"] = -(-vocab_size // _MULTIPLE) * _MULTIPLE
    return tiny


def save_twin(config: Mapping[str, Any], tokenizer: Any, folder: Path, seed: int) -> int:
    """Builds a tiny random model for a config and saves it with its tokenizer; returns its parameter count.

    Weights are fp32 and fixed by the seed; ids of special tokens are the tokenizer's.

    Args:
        config: of the real model, with `model_type`.
        tokenizer: a `PreTrainedTokenizerFast`.
        folder: where model and tokenizer go; created.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed
    from transformers.utils import logging

    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tiny = AutoConfig.for_model(**{**tiny_config(config, len(tokenizer)), **ids})
    logging.disable_progress_bar()  # a blink long, and in the way of the display
    set_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny, dtype=torch.float32)
    model.generation_config.update(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
