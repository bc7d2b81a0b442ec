"""Initialises a Llama-architecture model from a size block."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, set_seed

_MULTIPLE = 8  # rows of the embedding matrix: tensor cores want a multiple of 8


def init_model(size: dict, tokenizer: PreTrainedTokenizerBase, seed: int) -> LlamaForCausalLM:
    """Builds a randomly initialised Llama in fp32, its special token ids taken from the tokenizer.

    Args:
        size: `hidden_size`, `num_hidden_layers`… as in `LlamaConfig`.
        seed: fixes every weight.
    """
    rows = -(-len(tokenizer) // _MULTIPLE) * _MULTIPLE
    config = LlamaConfig(
        vocab_size=rows,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        **size,
    )
    set_seed(seed)
    model = LlamaForCausalLM(config).to(torch.float32)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
