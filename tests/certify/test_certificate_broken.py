"""Genuine weights, a trained chain, and everything that may go wrong with its merge: each is found, and named."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import tiny
from merging.stories import Chain, train_chain
from safetensors.torch import load_file, save_file

from posttrain.certify.certificate import Limits, default_limits, failures, verify_bytes
from posttrain.certify.logits import compare_logits, load_merged, logits_of
from posttrain.errors import CheckpointError
from posttrain.merging.header import read_header
from posttrain.merging.merge import merge

EXACT = default_limits("float32", quantised=False, base_mode="original")
WIDEST = Limits(relative_error=0.1, mean_kl=0.05, min_top1_agreement=0.7)
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(base's tensor, merged tensor) -> what a wrong merge has in its place."""


@dataclass(frozen=True)
class Merged:
    """A chain, and its merge in several shards."""

    chain: Chain
    folder: Path
    files: dict[str, dict[str, Any]]
    wanted: dict[tuple[int, ...], torch.Tensor]
    """Logits of the adapters in use, by row."""

    def failures(self, model: torch.nn.Module, limits: Limits = EXACT) -> list[str]:
        """What the certificate says of a merged model."""
        rows = [list(row) for row in self.wanted]
        return failures(compare_logits(lambda ids: self.wanted[tuple(ids)], logits_of(model), rows), limits)


@pytest.fixture(scope="module")
def merged(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Merged:
    folder = tmp_path_factory.mktemp("broken")
    chain = train_chain(shared_dir, folder)
    report = merge(chain.base, chain.adapters, folder / "out", "float32", max_shard_size=300_000)
    in_use = logits_of(chain.in_use)
    return Merged(chain, folder / "out", report.files, {tuple(row): in_use(row) for row in chain.rows})


@pytest.fixture(scope="module")
def loaded(merged: Merged) -> torch.nn.Module:
    return load_merged(merged.folder, torch.float32)


def test_right_one_passes(merged: Merged, loaded: torch.nn.Module) -> None:
    assert merged.failures(loaded) == []
    assert verify_bytes(merged.folder, merged.files) == []
    assert len(list(merged.folder.glob("*.safetensors"))) == 4


def positions(shard: Path, touched: set[str], dice: random.Random) -> list[int]:
    """Bytes of a shard to flip a bit of: header, tensors that the merge changed or only copied, both ends."""
    tensors = read_header(shard)
    chosen = [0, 7, dice.randrange(8, tensors[0].start), shard.stat().st_size - 1]
    for kind in (True, False):
        there = [info for info in tensors if (info.name in touched) is kind]
        chosen += [info.start + dice.randrange(info.nbytes) for info in dice.sample(there, min(4, len(there)))]
    return chosen


def test_one_flipped_bit_in_any_file_is_found(merged: Merged, tmp_path: Path) -> None:
    dice = random.Random(4)
    copy = shutil.copytree(merged.folder, tmp_path / "copy")
    before = load_file(merged.chain.base / "model.safetensors")
    flipped = 0
    for name in merged.files:
        whole = (copy / name).read_bytes()
        if name.endswith(".safetensors"):
            after = load_file(copy / name)
            touched = {key for key, tensor in after.items() if not torch.equal(tensor, before[key])}
            places = positions(copy / name, touched, dice)
        else:
            places = [dice.randrange(len(whole)) for _ in range(3)]
        for place in places:
            broken = bytearray(whole)
            broken[place] ^= 1 << dice.randrange(8)
            (copy / name).write_bytes(broken)
            assert verify_bytes(copy, merged.files) == [f"{name} does not have the SHA-256 it was written with"], place
            flipped += 1
        (copy / name).write_bytes(whole)
    assert verify_bytes(copy, merged.files) == []
    assert flipped > 40


@pytest.mark.parametrize("name", ["model-00002-of-00004.safetensors", "model.safetensors.index.json", "config.json"])
def test_cut_or_missing_file_is_found(merged: Merged, name: str, tmp_path: Path) -> None:
    copy = shutil.copytree(merged.folder, tmp_path / "copy")
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    size = merged.files[name]["bytes"]
    assert verify_bytes(copy, merged.files) == [f"{name} has {size - 1} bytes instead of {size}"]
    (copy / name).unlink()
    assert verify_bytes(copy, merged.files) == [f"{name} is missing"]


def _one_row(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    found = after.clone()
    found[5] = before[5]
    return found


WRONG: dict[str, Change] = {
    "delta left out": lambda before, after: before,
    "delta of the wrong sign": lambda before, after: 2 * before - after,
    "delta added twice": lambda before, after: 2 * after - before,
    "half of the delta": lambda before, after: (before + after) / 2,
    "delta of one row left out": _one_row,
    "not a number": lambda before, after: after * torch.nan,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_one_wrong_tensor_is_found(wrong: str, merged: Merged, loaded: torch.nn.Module) -> None:
    """Any of the 35 tensors that the chain changes, the others being right."""
    before = load_file(merged.chain.base / "model.safetensors")
    parameters = dict(loaded.named_parameters())
    changed = [name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])]
    unseen = []
    for name in changed:
        right = parameters[name].data
        parameters[name].data = WRONG[wrong](before[name], right)
        if not merged.failures(loaded):
            unseen.append(name)
        parameters[name].data = right
    assert len(changed) == 35
    assert unseen == []
    assert merged.failures(loaded) == []


@pytest.mark.parametrize("change", [{"lora_alpha": 32}, {"use_rslora": True}, {"r": 4}])
def test_adapter_whose_config_was_changed(change: dict[str, Any], merged: Merged, tmp_path: Path) -> None:
    """What the files cannot tell (a scale) the certificate does."""
    adapter = shutil.copytree(merged.chain.adapters[0], tmp_path / "sft")
    config = json.loads((adapter / "adapter_config.json").read_text()) | change
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    chain = [adapter, merged.chain.adapters[1]]
    if "r" in change:
        with pytest.raises(CheckpointError, match="do not have rank 4"):
            merge(merged.chain.base, chain, tmp_path / "out", "float32")
        return
    merge(merged.chain.base, chain, tmp_path / "out", "float32")
    assert len(merged.failures(load_merged(tmp_path / "out", torch.float32), WIDEST)) >= 2


@pytest.mark.parametrize("wrong", ["sft merged already", "one tensor off by a hundredth", "another shape"])
def test_wrong_base(wrong: str, merged: Merged, tmp_path: Path) -> None:
    chain, base = merged.chain, tmp_path / "base"
    if wrong == "another shape":
        tiny.save_base(base, True, torch.float32, shards=False)
        with pytest.raises(
            CheckpointError, match=r"down_proj\.lora_B\.weight \[64, 8\] does not fit model\.layers\.0\."
        ):
            merge(base, chain.adapters, tmp_path / "out", "float32")
        assert not (tmp_path / "out").exists()
        return
    if wrong == "sft merged already":
        merge(chain.base, chain.adapters[:1], base, "float32")
    else:
        base.mkdir()
        tensors = load_file(chain.base / "model.safetensors")
        tensors["model.layers.2.mlp.up_proj.weight"] *= 1.01
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(chain.base / "config.json", base / "config.json")
    merge(base, chain.adapters, tmp_path / "out", "float32")
    assert merged.failures(load_merged(tmp_path / "out", torch.float32))


@pytest.mark.parametrize("number", [0, 1], ids=["sft", "dpo"])
def test_any_key_dropped_from_an_adapter_is_named(number: int, merged: Merged, tmp_path: Path) -> None:
    chain = list(merged.chain.adapters)
    chain[number] = shutil.copytree(chain[number], tmp_path / "adapter")
    file = chain[number] / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        save_file({other: tensor for other, tensor in tensors.items() if other != name}, file)
        with pytest.raises(CheckpointError, match=re.escape(f"{name} is missing")):
            merge(merged.chain.base, chain, tmp_path / "out", "float32")
    for module in {name.rsplit(".lora_", 1)[0] for name in tensors}:
        save_file({other: tensor for other, tensor in tensors.items() if not other.startswith(module)}, file)
        with pytest.raises(CheckpointError, match=f"no factors for {re.escape(module.split('.', 2)[-1])}"):
            merge(merged.chain.base, chain, tmp_path / "out", "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_tensor_dropped_from_the_merged_files_is_named(merged: Merged, tmp_path: Path) -> None:
    copy = shutil.copytree(merged.folder, tmp_path / "copy")
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.layers.3.mlp.up_proj.weight"
    shard = copy / content["weight_map"].pop(name)
    save_file({key: t for key, t in load_file(shard).items() if key != name}, shard, metadata={"format": "pt"})
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"missing_keys.*{re.escape(name)}"):
        load_merged(copy, torch.float32)
    assert [line.split()[0] for line in verify_bytes(copy, merged.files)] == [shard.name, index.name]
