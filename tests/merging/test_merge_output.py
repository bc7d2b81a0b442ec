"""What a merge leaves on disk, and what it reports."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from merging import tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posttrain.artifact import sha256
from posttrain.errors import CheckpointError
from posttrain.merging.config import copy_side_files, merged_config
from posttrain.merging.merge import merge
from posttrain.merging.report import Survival
from posttrain.merging.writer import FileWriter, Slot, aligned, assign_shards, shard_names


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.save_base(tmp_path / "base", False, torch.bfloat16, shards=True)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    folder = tiny.save_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "down_proj"])
    (folder / "ref").mkdir()  # TRL leaves its frozen copy there; were it read, this would be an error
    (folder / "ref" / "adapter_model.safetensors").write_bytes(b"broken")
    return folder


def test_folder_is_complete_hashed_and_readable_by_others(base: Path, adapter: Path, tmp_path: Path) -> None:
    before = contents(base) | contents(adapter)
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    before["config.json"] = (base / "config.json").read_bytes()
    umask = os.umask(0o022)
    try:
        report = merge(base, [adapter], tmp_path / "out", "bfloat16", max_shard_size=12_000)
    finally:
        os.umask(umask)
    out = tmp_path / "out"
    assert contents(base) | contents(adapter) == before | contents(adapter)
    assert {path.name for path in out.iterdir()} == set(report.files)
    for name, described in report.files.items():
        assert described == {"sha256": sha256(out / name), "bytes": (out / name).stat().st_size}
        assert (out / name).stat().st_mode & 0o777 == 0o644
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = 0
    for shard in set(index["weight_map"].values()):
        with safe_open(out / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            stored = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
        assert sum(stored.values()) <= 12_000 or len(stored) == 1
        assert {name for name, where in index["weight_map"].items() if where == shard} == set(stored)
        sizes += sum(stored.values())
    assert index["metadata"]["total_size"] == sizes == report.total_bytes
    saved = json.loads((out / "config.json").read_text())
    assert (saved["dtype"], saved["torch_dtype"]) == ("bfloat16", "bfloat16")
    assert "quantization_config" not in saved
    assert json.loads((out / "generation_config.json").read_text())


def test_untouched_tensors_are_the_base_s_bytes(base: Path, adapter: Path, tmp_path: Path) -> None:
    report = merge(base, [adapter], tmp_path / "out", "bfloat16")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    weights = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    changed = {name for name, weight in weights.items() if not torch.equal(merged[name], weight)}
    assert changed == {tensor.name for tensor in report.tensors}
    assert (len(changed), report.copied, report.cast) == (4, len(weights) - 4, 0)
    assert report.parameters == sum(weight.numel() for weight in weights.values())


def test_merge_left_by_a_kill_is_replaced(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out.merging").mkdir()
    (tmp_path / "out.merging" / "model-00009-of-00009.safetensors").write_bytes(b"half")
    merge(base, [adapter], tmp_path / "out", "bfloat16")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == ["model.safetensors"]
    assert not (tmp_path / "out.merging").exists()


def test_rounding_that_eats_a_delta_is_reported(base: Path, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(base, tmp_path / "small", target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: t * 3e-3 if "lora_B" in name else t for name, t in tensors.items()}, file)
    rounded = merge(base, [adapter], tmp_path / "bf16", "bfloat16")
    exact = merge(base, [adapter], tmp_path / "fp32", "float32")
    for coarse, fine in zip(rounded.tensors, exact.tensors, strict=True):
        assert fine.cosine == pytest.approx(1, abs=1e-6)
        assert fine.norm_ratio == pytest.approx(1, abs=1e-6)
        assert coarse.cosine is not None
        assert coarse.cosine < 0.9
        assert coarse.relative_change == pytest.approx(fine.relative_change)
    assert "2 of 2 deltas did not survive rounding to bfloat16" in rounded.advice()[0]
    assert exact.advice() == []
    json.dumps(rounded.as_dict(), allow_nan=False)


def test_adapter_that_changes_nothing_is_reported(base: Path, tmp_path: Path) -> None:
    adapter = tiny.save_adapter(base, tmp_path / "zero", target_modules=["q_proj"])
    file = adapter / "adapter_model.safetensors"
    save_file({name: t * 0 if "lora_B" in name else t for name, t in load_file(file).items()}, file)
    report = merge(base, [adapter], tmp_path / "out", "bfloat16")
    assert report.advice() == ["the adapters change nothing: every delta is zero"]


def test_survival_of_known_blocks() -> None:
    base = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    survival = Survival("w")
    wanted = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    applied = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    for row in (0, 1):
        block = slice(row, row + 1)
        survival.add(base[block], (base + wanted)[block], (base + applied)[block])
    report = survival.report(("k",), same_shape=True)
    assert report.relative_change == pytest.approx(1 / 5)
    assert report.cosine == pytest.approx(1 / math.sqrt(2))
    assert report.norm_ratio == pytest.approx(math.sqrt(2))


def test_overflow_of_float16_is_refused(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", False, torch.float32, shards=False)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = 1e5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight overflows float16"):
        merge(base, [], tmp_path / "out", "float16")
    assert not (tmp_path / "out").exists()


def test_shards_keep_order_and_size() -> None:
    slots = [Slot(name, "F32", (size,)) for name, size in zip("abcde", (1, 2, 9, 1, 1), strict=True)]
    cut = [[slot.name for slot in shard] for shard in assign_shards(slots, 12)]
    assert cut == [["a", "b"], ["c"], ["d", "e"]]
    assert shard_names(1) == ["model.safetensors"]
    assert shard_names(2) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    mixed = [Slot("byte", "U8", (3,)), Slot("long", "I64", (1,)), Slot("half", "BF16", (1,))]
    assert [slot.name for slot in aligned(mixed)] == ["long", "half", "byte"]


def test_file_appears_only_when_complete(tmp_path: Path) -> None:
    def fail() -> None:
        with FileWriter(tmp_path / "x") as writer:
            writer.write(b"half")
            assert not (tmp_path / "x").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_config_of_a_nested_model() -> None:
    base = {"text_config": {"vocab_size": 8, "dtype": "float32", "tie_word_embeddings": True}, "model_type": "x"}
    config = merged_config(base, "bfloat16", False, 10)
    assert config["text_config"] == {"vocab_size": 10, "dtype": "bfloat16", "tie_word_embeddings": False}
    assert config["tie_word_embeddings"] is False
    assert base["text_config"]["vocab_size"] == 8  # the base's own config is not changed


def test_side_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "adapter_config.json", "training_args.bin"):
        (source / name).write_text(name)
    (source / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (source / "tokenizer.json").chmod(0o600)
    assert copy_side_files(source, target) == [
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "tokenizer.json",
    ]
    assert (target / "tokenizer.json").read_text() == "tokenizer.json"
    assert not (target / "adapter_config.json").exists()
