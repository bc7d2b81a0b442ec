"""Tiny two-layer Llamas and peft adapters on them, for the tests of merging and certifying."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 48
ROWS = [[1, 5, 9, 33, 40, 2, 7, 7, 11], [3, 4, 5, 47, 0, 8]]


def save_base(folder: Path, tied: bool, dtype: torch.dtype, shards: bool, **settings: Any) -> Path:
    """Saves a random model in one shard or several."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **settings,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=9_000 if shards else 10**9)
    return folder


def load_base(folder: Path) -> LlamaForCausalLM:
    """Loads it in fp32, whatever it is stored in."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save_adapter(base: Path, folder: Path, resize_to: int | None = None, seed: int = 1, **settings: Any) -> Path:
    """Trains nothing: random values in every adapter parameter."""
    model = load_base(base)
    if resize_to:
        model.resize_token_embeddings(resize_to, mean_resizing=False)
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    torch.manual_seed(seed)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)
    return folder


def live(base: Path, *adapters: Path, resize_to: int | None = None) -> torch.nn.Module:
    """Base and adapters as peft uses them, all active."""
    model = load_base(base)
    if resize_to:
        model.resize_token_embeddings(resize_to, mean_resizing=False)
    # Adapters without trained token rows first: peft 0.21 fails to load one when another with rows is there.
    order = sorted(range(len(adapters)), key=lambda number: "trainable_token" in _targets(adapters[number]))
    tuned = PeftModel.from_pretrained(model, adapters[order[0]], adapter_name=str(order[0]))
    for number in order[1:]:
        tuned.load_adapter(adapters[number], adapter_name=str(number))
    tuned.base_model.set_adapter([str(number) for number in range(len(adapters))])
    return tuned.eval()


def _targets(adapter: Path) -> str:
    config = json.loads((adapter / "adapter_config.json").read_text())
    return "trainable_token" if config["trainable_token_indices"] else ""


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Logits of all rows, one under the other."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in ROWS])


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    return float((found - expected).norm() / expected.norm())
