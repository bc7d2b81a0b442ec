"""What `save_full` writes, tensor by tensor, is what transformers writes of the whole model at once: byte for byte."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from posttrain.errors import CheckpointError, StageError
from posttrain.merging.header import read_header
from posttrain.models.load import load_base
from posttrain.models.save import save_full, verify_saved_model
from posttrain.models.stored import plan_files
from tests.training.spine_tiny import make_tokenizer

SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": False},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4},
    "gemma2": {"model_type": "gemma2", "head_dim": 8},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "olmo2": {"model_type": "olmo2"},
    "olmoe": {"model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8},
}
EXPERTS = {"olmoe", "mixtral", "qwen3_moe"}


def make(kind: str) -> PreTrainedModel:
    torch.manual_seed(3)
    config = AutoConfig.for_model(**{**SIZES, **KINDS[kind]})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def save_at_once(model: PreTrainedModel, folder: Path, dtype: torch.dtype, max_shard_size: int | str) -> None:
    """The whole model cast, and handed to transformers: the ties of a state dict are those of its storages."""
    logging.disable_progress_bar()
    own = model.state_dict()
    cast = {tensor.data_ptr(): tensor.to(dtype, copy=True) for tensor in own.values()}
    model.save_pretrained(
        folder,
        state_dict={name: cast[tensor.data_ptr()] for name, tensor in own.items()},
        max_shard_size=max_shard_size,
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_one_file_is_the_one_of_transformers(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = make(kind)
    digests = save_full(model, tmp_path / "ours", dtype)
    save_at_once(model, tmp_path / "theirs", dtype, "50GB")
    ours, theirs = content(tmp_path / "ours"), content(tmp_path / "theirs")
    config = json.loads(theirs.pop("config.json")) | {"dtype": str(dtype).removeprefix("torch.")}
    assert json.loads(ours.pop("config.json")) == config
    assert ours == theirs
    assert digests.keys() == {info.name for info in read_header(tmp_path / "ours" / "model.safetensors")}


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - EXPERTS))
def test_many_files_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    model = make(kind)
    save_full(model, tmp_path / "ours", torch.bfloat16, 9000)
    save_at_once(model, tmp_path / "theirs", torch.bfloat16, 9000)
    ours, theirs = content(tmp_path / "ours"), content(tmp_path / "theirs")
    assert len(ours) > 6
    assert ours.pop("config.json")
    assert theirs.pop("config.json")
    assert ours == theirs


@pytest.mark.parametrize("kind", sorted(EXPERTS))
def test_experts_are_spread_over_files_and_come_back(tmp_path: Path, kind: str) -> None:
    model = make(kind)
    digests = save_full(model, tmp_path, torch.float32, 20_000)
    make_tokenizer().save_pretrained(tmp_path)
    verify_saved_model(model, tmp_path, digests)
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    layer = {file for name, file in files.items() if name.startswith("model.layers.0.") and "expert" in name}
    assert len(layer) > 1  # one group of memory stands in several files
    again = load_base(tmp_path, torch.float32, "cpu", "sdpa").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_than_one_live_tensor_is_whole_at_a_time(kind: str) -> None:
    stored = plan_files(make(kind), torch.bfloat16, "50GB")
    assert all(len(group) == 1 for group in stored.groups)


def test_what_only_a_layer_together_can_become_is_gathered_by_layer(tmp_path: Path) -> None:
    """HRM keeps q, k, v and gate apart in memory, and as one tensor in its files."""
    config = AutoConfig.for_model(**{**SIZES, "model_type": "hrm_text"})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    save_full(model, tmp_path / "ours", torch.float32)
    save_at_once(model, tmp_path / "theirs", torch.float32, "50GB")
    name = "model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    groups = plan_files(model, torch.float32, "50GB").groups
    assert len(groups) > 2
    assert max(map(len, groups)) < len(model.state_dict()) / 2
    assert max(map(len, groups)) > 1


@pytest.mark.parametrize("after", [0, 3])
def test_nothing_is_left_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    synced, real = [], os.fsync

    def full(descriptor: int) -> None:
        if len(synced) == after:
            raise OSError(errno.ENOSPC, "No space left on device")
        synced.append(real(descriptor))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_full(make("llama"), tmp_path, torch.float32, 9000)
    assert list(tmp_path.iterdir()) == []


def test_other_values_on_the_disk_are_found(tmp_path: Path) -> None:
    model = make("llama")
    digests = save_full(model, tmp_path, torch.bfloat16, 9000)
    make_tokenizer().save_pretrained(tmp_path)
    verify_saved_model(model, tmp_path, digests)
    file = sorted(tmp_path.glob("model-*.safetensors"))[1]
    info = read_header(file)[0]
    damaged = bytearray(file.read_bytes())
    damaged[info.start] ^= 1  # the last bit of one number
    file.write_bytes(damaged)
    with pytest.raises(StageError, match=f"{info.name} on disk is not what was trained"):
        verify_saved_model(model, tmp_path, digests)
    verify_saved_model(model, tmp_path)  # a finite number of the right shape
