"""Folders that cannot be merged: each refused with the file and key, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import tiny
from safetensors.torch import load_file, save_file

from posttrain.errors import CheckpointError, UserError
from posttrain.merging import writer
from posttrain.merging.checkpoint import open_checkpoint
from posttrain.merging.header import encode_header, read_header
from posttrain.merging.merge import merge
from posttrain.merging.tensors import read_tensor

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    base = tiny.save_base(folder / "base", True, torch.float32, shards=True)
    tiny.save_adapter(base, folder / "adapter", target_modules=["q_proj", "down_proj"])
    return folder


@pytest.fixture
def work(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return tmp_path


def refusal(work: Path) -> CheckpointError:
    """Merges, expects a refusal, and that nothing but the inputs is there after it."""
    with pytest.raises(CheckpointError) as caught:
        merge(work / "base", [work / "adapter"], work / "out", "float32")
    assert sorted(path.name for path in work.iterdir()) == ["adapter", "base"]
    return caught.value


def rewrite(work: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = work / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def configure(work: Path, **settings: Any) -> None:
    file = work / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_missing_shard(work: Path) -> None:
    shard = sorted((work / "base").glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(work).where


@pytest.mark.parametrize("name", ["base", "adapter"])
def test_truncated_file(work: Path, name: str) -> None:
    file = sorted((work / name).glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-3])
    error = refusal(work)
    assert file.name in error.where
    assert "truncated" in error.found


@pytest.mark.parametrize("keep", [0, 5, 40])
def test_truncated_header(work: Path, keep: int) -> None:
    file = sorted((work / "base").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:keep])
    assert file.name in refusal(work).where


def test_bytes_too_many(work: Path) -> None:
    file = work / "adapter" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    assert "too long" in refusal(work).found


def test_tensor_in_two_shards(work: Path) -> None:
    first, second = sorted((work / "base").glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second, metadata={"format": "pt"})
    assert "is also in" in refusal(work).found


def test_name_twice_in_one_header(tmp_path: Path) -> None:
    header = encode_header([("a", "F32", (1,)), ("b", "F32", (1,))])
    file = tmp_path / "x.safetensors"
    file.write_bytes(header.replace(b'"b"', b'"a"') + bytes(8))
    with pytest.raises(CheckpointError, match="stored twice: a"):
        read_header(file)


def test_index_promises_more_than_the_shards_hold(work: Path) -> None:
    index = work / "base" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    assert "lacks model.extra.weight" in refusal(work).found


def test_index_that_points_out_of_its_folder(work: Path) -> None:
    index = work / "base" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../adapter/adapter_model.safetensors"}}))
    assert "is no file name" in refusal(work).found


def test_no_safetensors(work: Path) -> None:
    for file in (work / "base").glob("model*"):
        file.unlink()
    assert "neither" in refusal(work).found


def test_key_left_over(work: Path) -> None:
    rewrite(work, lambda tensors: tensors.update({f"{LAYER}.lora_C.weight": torch.zeros(2)}))
    assert f"{LAYER}.lora_C.weight" in refusal(work).found


def test_key_without_peft_prefix(work: Path) -> None:
    rewrite(work, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(32)}))
    assert "key model.norm.weight" in refusal(work).found


def test_plain_tensor_that_nobody_asked_for(work: Path) -> None:
    rewrite(work, lambda tensors: tensors.update({"base_model.model.model.norm.weight": torch.zeros(32)}))
    assert "no use for base_model.model.model.norm.weight" in refusal(work).found


@pytest.mark.parametrize("side", ["A", "B"])
def test_missing_factor(work: Path, side: str) -> None:
    rewrite(work, lambda tensors: tensors.pop(f"{LAYER}.lora_{side}.weight"))
    assert f"{LAYER}.lora_{side}.weight is missing" in refusal(work).found


def test_missing_pair(work: Path) -> None:
    rewrite(work, lambda tensors: [tensors.pop(f"{LAYER}.lora_{side}.weight") for side in "AB"])
    assert "no factors for model.layers.0.self_attn.q_proj" in refusal(work).found


def test_missing_magnitude(work: Path) -> None:
    configure(work, use_dora=True)
    assert "lora_magnitude_vector is missing" in refusal(work).found


def test_magnitude_without_dora(work: Path) -> None:
    rewrite(work, lambda tensors: tensors.update({f"{LAYER}.lora_magnitude_vector": torch.ones(32)}))
    assert "no use for" in refusal(work).found


def test_wrong_shape(work: Path) -> None:
    rewrite(work, lambda tensors: tensors.update({f"{LAYER}.lora_B.weight": torch.zeros(31, 4)}))
    error = refusal(work)
    assert "does not fit model.layers.0.self_attn.q_proj.weight [32, 32]" in error.found


def test_rank_that_the_config_does_not_say(work: Path) -> None:
    configure(work, r=8)
    assert "do not have rank 8" in refusal(work).found


def test_target_that_the_base_lacks(work: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for side in "AB":
            tensors[f"base_model.model.model.layers.7.self_attn.q_proj.lora_{side}.weight"] = torch.zeros(4, 4)

    rewrite(work, change)
    assert "which the base does not have" in refusal(work).found


def test_bias_on_a_layer_without_one(work: Path) -> None:
    rewrite(work, lambda tensors: tensors.update({f"{LAYER}.lora_B.bias": torch.zeros(32)}))
    assert f"{LAYER}.lora_B.bias belongs to model.layers.0.self_attn.q_proj.bias" in refusal(work).found


def test_copy_of_another_base(work: Path) -> None:
    copy = read_tensor(open_checkpoint(work / "base").tensors["model.embed_tokens.weight"]) * 1.1
    rewrite(work, lambda tensors: tensors.update({"base_model.model.model.embed_tokens.base_layer.weight": copy}))
    assert "is not the base's model.embed_tokens.weight" in refusal(work).found


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_tied_embedding_hit_twice(work: Path) -> None:
    shutil.rmtree(work / "adapter")
    tiny.save_adapter(
        work / "base", work / "adapter", target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
    )
    assert "would be hit twice" in refusal(work).found


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"peft_type": "VERA"}, "peft_type 'VERA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base itself"),
        ({"use_qalora": True}, "use_qalora is set"),
    ],
)
def test_variants_that_are_not_plain_lora(work: Path, settings: dict[str, Any], found: str) -> None:
    configure(work, **settings)
    assert found in refusal(work).found


def test_quantised_base(work: Path) -> None:
    file = sorted((work / "base").glob("*.safetensors"))[1]
    tensors = {name: tensor.to(torch.uint8) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert "is stored as U8" in refusal(work).found


def test_not_finite(work: Path) -> None:
    rewrite(work, lambda tensors: tensors[f"{LAYER}.lora_B.weight"].__setitem__((0, 0), torch.nan))
    error = refusal(work)
    assert error.where == "model.layers.0.self_attn.q_proj.weight"
    assert "not finite" in error.found


def test_base_that_changes_while_it_is_merged(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = writer.FileWriter.room
    victim = sorted((work / "base").glob("*.safetensors"))[0]

    def touch(self: writer.FileWriter, length: int) -> torch.Tensor:
        victim.write_bytes(victim.read_bytes())
        return original(self, length)

    monkeypatch.setattr(writer.FileWriter, "room", touch)
    assert "changed while it was being read" in refusal(work).found


def test_full_disk(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "are free" in refusal(work).found


def test_out_that_exists_or_lies_inside_a_source(work: Path) -> None:
    (work / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        merge(work / "base", [work / "adapter"], work / "out", "float32")
    with pytest.raises(UserError, match="lies inside"):
        merge(work / "base", [work / "adapter"], work / "base" / "merged", "float32")


def test_shard_order_of_an_index_does_not_matter(pristine: Path) -> None:
    names = set(open_checkpoint(pristine / "base").tensors)
    listed = json.loads((pristine / "base" / "model.safetensors.index.json").read_text())["weight_map"]
    assert names == set(listed)
