"""Tiny two-layer Llamas, GPT-2s and Mixtrals and peft adapters on them, for the tests of merging and certifying."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 48
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
ROWS = [[1, 5, 9, 33, 40, 2, 7, 7, 11], [3, 4, 5, 47, 0, 8]]


def save_base(folder: Path, tied: bool, dtype: torch.dtype, shards: bool, **settings: Any) -> Path:
    """Saves a random Llama in one shard or several."""
    config = LlamaConfig(**{**_SHAPE, "tie_word_embeddings": tied, **settings})
    return _save(LlamaForCausalLM, config, folder, dtype, shards)


def save_gpt2(folder: Path, tied: bool, dtype: torch.dtype, shards: bool) -> Path:
    """Saves a random GPT-2, whose linear layers are Conv1D: weights stored (in, out)."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=16,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(GPT2LMHeadModel, config, folder, dtype, shards)


def save_mixtral(folder: Path, tied: bool, dtype: torch.dtype, shards: bool) -> Path:
    """Saves a random mixture of experts, whose tensors have other names in the files than in memory."""
    config = MixtralConfig(**_SHAPE, tie_word_embeddings=tied, num_local_experts=4, num_experts_per_tok=2)
    return _save(MixtralForCausalLM, config, folder, dtype, shards)


def _save(
    kind: type[PreTrainedModel], config: PreTrainedConfig, folder: Path, dtype: torch.dtype, shards: bool
) -> Path:
    torch.manual_seed(0)
    model = kind(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=9_000 if shards else 10**9)
    return folder


def load_base(folder: Path) -> PreTrainedModel:
    """Loads it in fp32, whatever it is stored in, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tune(base: Path, resize_to: int | None = None, seed: int = 1, **settings: Any) -> PeftModel:
    """A base and a new adapter in memory, in eval mode; no training: random values in every adapter parameter."""
    model = load_base(base)
    if resize_to:
        model.resize_token_embeddings(resize_to, mean_resizing=False)
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    randomise(tuned, seed)
    return tuned.eval()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Adds noise to every parameter that is trained."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def save_adapter(base: Path, folder: Path, resize_to: int | None = None, seed: int = 1, **settings: Any) -> Path:
    """Saves an adapter of random values."""
    tune(base, resize_to, seed, **settings).save_pretrained(folder)
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
