"""Model and adapter folders are proved whole from their files, before a weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.errors import CheckpointError
from posttrain.models.files import (
    model_tensors,
    tensor_header,
    verify_adapter_files,
    verify_adapter_fits,
    verify_model_files,
)
from posttrain.models.load import Adapter, add_adapter, load_base
from posttrain.models.save import save_adapter
from tests.training.spine_tiny import make_model, save_base

WEIGHTS = "model.safetensors"
UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in one file, one in shards, and an adapter."""
    folder = tmp_path_factory.mktemp("good")
    save_base(folder / "model")
    shutil.copytree(folder / "model", folder / "shards")
    (folder / "shards" / WEIGHTS).unlink()
    make_model().save_pretrained(folder / "shards", max_shard_size="100KB")
    save_adapter(add_adapter(make_model(), Adapter(4, 8, 0.0, ["q_proj"]), []), folder / "adapter")
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "copy")
    return tmp_path / "copy"


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def rewrite(path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_whole_folders_pass(good: Path) -> None:
    for name in ("model", "shards"):
        verify_model_files(good / name)
        assert model_tensors(good / name)[UP] == [96, 64]
    assert len(list((good / "shards").glob("*.safetensors"))) > 2
    verify_adapter_files(good / "adapter")
    verify_adapter_fits(good / "adapter", good / "shards")


def first_shard(folder: Path) -> Path:
    return min((folder / "shards").glob("*.safetensors"))


BROKEN: list[tuple[str, str, Callable[[Path], object], str]] = [
    ("no folder", "model", lambda f: shutil.rmtree(f / "model"), "no such folder"),
    ("no config", "model", lambda f: (f / "model/config.json").unlink(), r"config.json: is missing"),
    ("config cut", "model", lambda f: cut(f / "model/config.json", 40), "config.json: is not JSON"),
    ("config a list", "model", lambda f: (f / "model/config.json").write_text("[]"), "holds a list, not an object"),
    ("config empty", "model", lambda f: (f / "model/config.json").write_text("{}"), "has no model_type"),
    ("no weights", "model", lambda f: (f / "model" / WEIGHTS).unlink(), "model.safetensors: is missing"),
    ("weights cut", "model", lambda f: cut(f / "model" / WEIGHTS, -1), "bytes where its header promises"),
    ("header cut", "model", lambda f: cut(f / "model" / WEIGHTS, 100), "less than its header"),
    ("empty file", "model", lambda f: cut(f / "model" / WEIGHTS, 0), "holds 0 bytes"),
    ("no header", "model", lambda f: (f / "model" / WEIGHTS).write_bytes(bytes(64)), "no readable header"),
    ("header a list", "model", lambda f: rewrite(f / "model" / WEIGHTS, []), "no readable header"),
    ("header of nothing", "model", lambda f: rewrite(f / "model" / WEIGHTS, {"a": {}}), "no readable header"),
    ("no tokenizer", "model", lambda f: (f / "model/tokenizer.json").unlink(), "tokenizer.json: is missing"),
    ("tokenizer cut", "model", lambda f: cut(f / "model/tokenizer.json", 99), "tokenizer.json: is not JSON"),
    ("shard missing", "shards", lambda f: first_shard(f).unlink(), r"model-00001-of-\d+.safetensors: is missing"),
    ("shard cut", "shards", lambda f: cut(first_shard(f), -8), "model-00001-of-.* its header promises"),
    (
        "shard lacks a tensor",
        "shards",
        lambda f: edit(first_shard(f), lambda tensors: tensors.popitem()),
        "which the index promises",
    ),
]


@pytest.mark.parametrize(("name", "damage", "found"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_a_damaged_model_is_refused_by_name(
    folder: Path, name: str, damage: Callable[[Path], object], found: str
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=found):
        verify_model_files(folder / name)
    if "tokenizer" in found:  # weights are loaded without one
        load_base(folder / name, torch.float32, "cpu", "sdpa")
        return
    with pytest.raises(CheckpointError, match=found):
        load_base(folder / name, torch.float32, "cpu", "sdpa")


def test_a_tensor_of_another_length_than_its_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS
    rewrite(path, {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8]}})
    path.write_bytes(path.read_bytes() + bytes(8))
    with pytest.raises(CheckpointError, match=r"a does not have the bytes of its shape \[2, 2\]"):
        tensor_header(path)


def test_an_empty_tensor_is_refused(folder: Path) -> None:
    edit(folder / "model" / WEIGHTS, lambda tensors: tensors.update({UP: torch.empty(0, 64)}))
    with pytest.raises(CheckpointError, match="is empty"):
        verify_model_files(folder / "model")


def test_a_weight_that_is_not_there_is_never_made_up(folder: Path) -> None:
    edit(folder / "model" / WEIGHTS, lambda tensors: tensors.pop(UP))
    with pytest.raises(CheckpointError, match=f"{UP} is missing from its weights"):
        load_base(folder / "model", torch.float32, "cpu", "sdpa")


def test_weights_of_another_shape_than_the_config_are_refused(folder: Path) -> None:
    edit(folder / "model" / WEIGHTS, lambda tensors: tensors.update({UP: torch.zeros(96, 32)}))
    with pytest.raises(CheckpointError, match=rf"{UP} is \[96, 32\], the config asks for \[96, 64\]"):
        load_base(folder / "model", torch.float32, "cpu", "sdpa")


def test_a_kernel_named_in_a_config_is_not_fetched(folder: Path) -> None:
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text()) | {"_attn_implementation": "owner/kernel", "attn_implementation": "owner/k"}
    path.write_text(json.dumps(config))
    assert load_base(folder / "model", torch.float32, "cpu", "sdpa").config._attn_implementation == "sdpa"


def test_a_damaged_adapter_is_refused_by_name(folder: Path) -> None:
    adapter = folder / "adapter"
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    cut(adapter / "adapter_model.safetensors", -4)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: holds"):
        verify_adapter_files(adapter)
    save_file({}, adapter / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensor"):
        verify_adapter_files(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(weights)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"peft_type": "IA3"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="peft_type 'IA3'"):
        verify_adapter_files(adapter)


@pytest.mark.parametrize(
    ("base", "found"),
    [
        (
            {"hidden_size": 32, "intermediate_size": 96},
            r"was made for another base: .*q_proj.lora_A.weight is \[4, 64\]",
        ),
        ({"num_hidden_layers": 1}, r"changes model.layers.1.self_attn.q_proj, which .* does not have"),
        ({"num_attention_heads": 8, "head_dim": 16}, r"q_proj.lora_B.weight is \[64, 4\]"),
    ],
)
def test_an_adapter_for_another_base_is_refused(folder: Path, tmp_path: Path, base: dict, found: str) -> None:
    other = save_base(tmp_path / "other", make_model(**base))
    with pytest.raises(CheckpointError, match=found):
        verify_adapter_fits(folder / "adapter", other)
