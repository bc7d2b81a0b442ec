"""A tokenizer of bytes and random models over it, made in a moment."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = 257
"""Id of `<|im_end|>`."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and the two ChatML tokens (256, 257); no BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=core)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.pad_token, made.eos_token = "<|im_start|>", "<|im_end|>"
    return made


def make_model(seed: int) -> LlamaForCausalLM:
    """A random 2-layer Llama in float32 over the tokenizer's 258 ids."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # large, so that greedy answers differ from token to token
        bos_token_id=None,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


def save(folder: Path, seed: int, template: str | None) -> Path:
    """Writes a standalone model folder, with its chat template unless None."""
    model = make_model(seed)
    model.generation_config = GenerationConfig(eos_token_id=[END], pad_token_id=256)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
