"""Every kind of adapter peft can save, merged from files and reloaded, against the adapter in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merging import tiny
from safetensors.torch import load_file

from posttrain.errors import CheckpointError
from posttrain.merging.merge import merge

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ALL_LINEAR},
    "rslora": {"target_modules": ALL_LINEAR, "use_rslora": True},
    "dora": {"target_modules": ALL_LINEAR, "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
        "alpha_pattern": {"self_attn.v_proj": 32},
    },
    "output saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "both saved, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "embed_tokens"],
        "ensure_weight_tying": True,
    },
    "norm saved": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "token rows": {"target_modules": ["q_proj"], "trainable_token_indices": [40, 1, 7]},
    "token rows of each": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]},
    },
    "same token rows of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]},
    },
    "token rows, output": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [1, 5]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "output": {"target_modules": ["q_proj", "lm_head"]},
    "embedding and output": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "lora bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "resized": {"target_modules": ["q_proj"], "resize_to": 56},
    "resized, token rows": {"target_modules": ["q_proj"], "resize_to": 56, "trainable_token_indices": [50, 55]},
    "resized, embedding": {"target_modules": ["q_proj", "embed_tokens"], "resize_to": 56},
}
UNTIES = {
    "output saved",
    "embedding saved",
    "both saved",
    "token rows of each",
    "token rows, output",
    "embedding",
    "dora embedding",
    "output",
    "embedding and output",
    "resized, embedding",
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shards", [False, True], ids=["one shard", "several"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_files_are_the_adapter_in_use(
    kind: str, tied: bool, shards: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    settings = dict(KINDS[kind])
    resize_to = settings.pop("resize_to", None)
    base = tiny.save_base(tmp_path / "base", tied, dtype, shards, attention_bias="bias" in kind)
    adapter = tiny.save_adapter(base, tmp_path / "adapter", resize_to, **settings)
    in_use = tiny.live(base, adapter, resize_to=resize_to)

    if kind == "resized, embedding" and not tied:  # peft leaves the resized output layer out of the adapter
        with pytest.raises(CheckpointError, match="only one of them was resized"):
            merge(base, [adapter], tmp_path / "fp32", "float32")
        return
    size = 9_000 if shards else 10**9
    exact = merge(base, [adapter], tmp_path / "fp32", "float32", max_shard_size=size)
    rounded = merge(base, [adapter], tmp_path / "bf16", "bfloat16", max_shard_size=size)

    merged = tiny.load_base(tmp_path / "fp32")
    assert tiny.relative(tiny.logits(merged), tiny.logits(in_use)) < 1e-6
    assert exact.tied is ((kind not in UNTIES) if tied else None)
    assert merged.config.tie_word_embeddings is bool(exact.tied)
    assert merged.config.vocab_size == (resize_to or tiny.VOCABULARY)
    fp32, bf16 = tensors(tmp_path / "fp32"), tensors(tmp_path / "bf16")
    assert fp32.keys() == bf16.keys()
    assert all(torch.equal(tensor.bfloat16(), bf16[name]) for name, tensor in fp32.items())  # rounded once
    assert {tensor.name for tensor in rounded.tensors} == {tensor.name for tensor in exact.tensors}
