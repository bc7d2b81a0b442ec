"""Odd folders, odd configs, odd names, another process: a right merge, or one clear error and nothing left behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import tiny
from safetensors.torch import load_file, save_file

from posttrain.certify.layers import stream_merged, stream_policy, streamed_units
from posttrain.certify.logits import load_merged
from posttrain.certify.weights import compare_weights
from posttrain.errors import CheckpointError, UserError
from posttrain.merging.atomic import build_folder
from posttrain.merging.checkpoint import open_checkpoint, stamp
from posttrain.merging.header import read_header
from posttrain.merging.merge import merge
from posttrain.models.files import verify_adapter_fits
from posttrain.models.lineage import Lineage, Link


@pytest.fixture(autouse=True)
def _no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `adapter`, and `right`: what their merge is."""
    folder = tmp_path_factory.mktemp("hostile")
    base = tiny.save_base(folder / "base", True, torch.bfloat16, shards=True)
    tiny.save_adapter(base, folder / "adapter", target_modules=["q_proj", "down_proj"], trainable_token_indices=[1, 2])
    merge(base, [folder / "adapter"], folder / "right", "bfloat16")
    return folder


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    for name in ("base", "adapter"):
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


SPOILT: dict[str, list[Any]] = {
    "r": [None, 0, "16", {}, 4.5],
    "lora_alpha": [None, "16", [], float("nan"), float("inf")],
    "rank_pattern": [1, "x", ["q_proj"], {"(": 4}, {"q_proj": "a"}, {"q_proj": None}, {"q_proj": 0}],
    "alpha_pattern": [1, "x", ["q_proj"], {"(": 4}, {"q_proj": "a"}, {"q_proj": float("nan")}],
    "target_modules": [1, "(", [1], {"q_proj": 4}],
    "exclude_modules": [1, "(", [None]],
    "target_parameters": [1, "mlp.experts.down_proj", [1]],
    "modules_to_save": [1, "(", [1]],
    "trainable_token_indices": [1, "16", [None], {"embed_tokens": 3}],
    "peft_type": [None, "IA3"],
}


@pytest.mark.parametrize("setting", SPOILT)
def test_a_setting_that_peft_would_not_write_is_named(setting: str, work: Path) -> None:
    file = work / "adapter" / "adapter_config.json"
    good = json.loads(file.read_text())
    for value in SPOILT[setting]:
        file.write_text(json.dumps(good | {setting: value}))
        with pytest.raises(CheckpointError, match=setting) as caught:
            merge(work / "base", [work / "adapter"], work / "out", "bfloat16")
        assert caught.value.where == str(file)
    assert {path.name for path in work.iterdir()} == {"base", "adapter"}


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_a_setting_that_is_not_there_is_named(name: str, work: Path) -> None:
    file = work / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    del config[name]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{name} is None"):
        merge(work / "base", [work / "adapter"], work / "out", "bfloat16")


@pytest.mark.parametrize("value", [1, "x", [1], True])
def test_a_nested_config_that_is_none_is_no_config(value: Any, work: Path, made: Path) -> None:
    file = work / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"text_config": value}))
    merge(work / "base", [work / "adapter"], work / "out", "bfloat16")
    assert weights(work / "out") == weights(made / "right")


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a\0b", 1, None, ["a"]])
def test_an_index_names_files_of_its_folder_only(name: Any, work: Path) -> None:
    (work / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="is no file name"):
        open_checkpoint(work / "base")


def test_a_file_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path) -> None:
    loop = tmp_path / "model.safetensors"
    loop.symlink_to(loop)
    for read in (read_header, stamp):
        with pytest.raises(CheckpointError, match="cannot be read: Too many levels of symbolic links"):
            read(loop)
    (tmp_path / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(tmp_path)


def test_a_file_that_cannot_get_its_name_is_an_error_of_ours(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def refused(path: Path, target: Path) -> Path:
        if Path(target).name == "model.safetensors":
            raise PermissionError(1, "Operation not permitted")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(CheckpointError, match="cannot be written: Operation not permitted"):
        merge(work / "base", [work / "adapter"], work / "out", "bfloat16")
    assert {path.name for path in work.iterdir()} == {"base", "adapter"}


def cached(folder: Path, cache: Path) -> Path:
    """A folder as the hub's cache holds it: every file a link into a folder of blobs."""
    snapshot, blobs = cache / "snapshots" / "0123abc", cache / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, blobs / f"{number:040x}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"{number:040x}")
    return snapshot


def test_a_base_in_the_hubs_cache_is_read_through_its_links(made: Path, tmp_path: Path) -> None:
    base = cached(made / "base", tmp_path / "models--some--base")
    adapter = cached(made / "adapter", tmp_path / "models--some--adapter")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    merge(base, [adapter], tmp_path / "out", "bfloat16")
    assert weights(tmp_path / "out") == weights(made / "right")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(UserError, match="lies inside"):
        merge(base, [adapter], base / "out", "bfloat16")


@pytest.mark.parametrize("name", ["two words", "país-ñ-日本", "-x", "a" * 200, "%s{}\\n", "x.partial"])
def test_any_name_will_do(name: str, made: Path, tmp_path: Path) -> None:
    for part in ("base", "adapter"):
        shutil.copytree(made / part, tmp_path / name / part)
    merge(tmp_path / name / "base", [tmp_path / name / "adapter"], tmp_path / name / name, "bfloat16")
    assert weights(tmp_path / name / name) == weights(made / "right")


def test_files_have_the_modes_of_the_umask(work: Path) -> None:
    for name in ("base", "adapter"):
        for path in (work / name).iterdir():
            path.chmod(0o400)
    before = os.umask(0o027)
    try:
        merge(work / "base", [work / "adapter"], work / "out", "bfloat16", max_shard_size=9000)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (work / "out").iterdir()} == {0o640}
    assert stat.S_IMODE((work / "out").stat().st_mode) == 0o750


def test_a_link_to_nothing_is_not_written_over(work: Path) -> None:
    (work / "out").symlink_to(work / "elsewhere")
    with pytest.raises(UserError, match="exists already"):
        merge(work / "base", [work / "adapter"], work / "out", "bfloat16")
    assert {path.name for path in work.iterdir()} == {"base", "adapter", "out"}


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_stands_in_the_place_of_the_partial_folder_is_left_alone(kind: str, work: Path) -> None:
    mine = work / "mine"
    mine.mkdir()
    (mine / "keep").write_text("kept")
    place = work / "out.merging"
    place.write_text("kept") if kind == "file" else place.symlink_to(mine)
    with pytest.raises(CheckpointError, match="cannot be written"):
        merge(work / "base", [work / "adapter"], work / "out", "bfloat16")
    assert place.read_text() == "kept" if kind == "file" else (mine / "keep").read_text() == "kept"


def test_a_second_merge_into_the_same_folder_waits_for_nothing_and_breaks_nothing(work: Path, made: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "mine").write_text("being written")
        with pytest.raises(UserError, match="is being written by another process"):
            merge(work / "base", [work / "adapter"], work / "out", "bfloat16")
        assert [path.name for path in folder.iterdir()] == ["mine"]

    build_folder(work / "out", [], write)
    assert (work / "out" / "mine").read_text() == "being written"
    shutil.rmtree(work / "out")
    left = work / "out.merging"
    left.mkdir()
    (left / "of a killed process").mkdir()
    merge(work / "base", [work / "adapter"], work / "out", "bfloat16")
    assert weights(work / "out") == weights(made / "right")
    assert not left.exists()


def test_a_folder_that_came_to_exist_meanwhile_is_left_alone(work: Path) -> None:
    with pytest.raises(UserError, match="has come to exist meanwhile"):
        build_folder(work / "out", [], lambda folder: (work / "out").mkdir())
    assert list((work / "out").iterdir()) == []
    assert not (work / "out.merging").exists()


def test_the_lock_ends_with_the_work(work: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build_folder(work / "out", [], _interrupt)
    assert {path.name for path in work.iterdir()} == {"base", "adapter"}
    build_folder(work / "out", [], lambda folder: None)
    descriptor = os.open(work / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def _interrupt(_: Path) -> None:
    raise KeyboardInterrupt


Rewrite = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
KEYS: dict[str, tuple[Rewrite, str]] = {
    "name of an adapter in it": (
        lambda t: {k.replace("lora_A.", "lora_A.default."): v for k, v in t.items()},
        "no use",
    ),
    "no prefix": (lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()}, "not understood"),
    "prefix twice": (lambda t: {f"base_model.model.{k}": v for k, v in t.items()}, "does not have|no factors"),
    "one more": (lambda t: t | {"base_model.model.x": torch.ones(1)}, "not understood"),
    "empty module": (lambda t: t | {"base_model.model..lora_A.weight": torch.ones(4, 4)}, "not understood|no use"),
    "integers": (lambda t: t | {A: t[A].int()}, "not understood"),
    "no elements": (lambda t: t | {A: t[A][:0]}, "do not have rank"),
    "a number": (lambda t: t | {A: torch.tensor(1.0)}, "do not have rank"),
    "one dimension more": (lambda t: t | {A: t[A][None]}, "do not have rank"),
    "infinite": (lambda t: t | {A: t[A] * torch.inf}, "not finite"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_odd_keys_of_an_adapter_are_named(kind: str, work: Path) -> None:
    change, found = KEYS[kind]
    file = work / "adapter" / "adapter_model.safetensors"
    save_file({name: t.contiguous() for name, t in change(load_file(file)).items()}, file)
    with pytest.raises(CheckpointError, match=found):
        merge(work / "base", [work / "adapter"], work / "out", "bfloat16")
    assert {path.name for path in work.iterdir()} == {"base", "adapter"}


def test_dtypes_may_be_mixed(work: Path) -> None:
    """A bf16 base with fp32 norms and a number and an empty tensor of its own; factors in fp16, fp64 and bf16."""
    base = tiny.save_base(work / "whole", True, torch.float32, shards=False)
    tensors = load_file(base / "model.safetensors")
    mixed = {name: t if "norm" in name else t.bfloat16() for name, t in tensors.items()}
    mixed |= {"a.number": torch.tensor(2.5), "nothing": torch.zeros(0, 4), "counts": torch.arange(3)}
    save_file(mixed, base / "model.safetensors", metadata={"format": "pt"})
    file = work / "adapter" / "adapter_model.safetensors"
    dtypes = (torch.float16, torch.float64, torch.bfloat16)
    factors = {name: t.to(dtypes[number % 3]) for number, (name, t) in enumerate(load_file(file).items())}
    save_file(factors, file)
    merge(base, [work / "adapter"], work / "out", "float32")
    found = load_file(work / "out" / "model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (torch.int64 if name == "counts" else torch.float32, t.shape) for name, t in mixed.items()
    }
    assert found["a.number"] == 2.5
    name = "model.layers.0.self_attn.q_proj"
    a, b = (factors[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
    torch.testing.assert_close(found[f"{name}.weight"], mixed[f"{name}.weight"].float() + 2 * (b @ a))


GPT2: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    "embedding": {"target_modules": ["c_attn", "wte"]},
    "output saved": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
    "pattern": {"target_modules": r"transformer\.h\.0\.attn\.c_attn"},
    "token rows": {"target_modules": ["c_attn"], "trainable_token_indices": [1, 2]},
}


def of_the_hub(base: Path) -> Path:
    """Turns a GPT-2 into what the hub has: no prefix in names, masks among the weights, no word of ties."""
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(base / "model.safetensors").items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 16, 16).tril() for layer in range(2)}
    save_file(tensors | masks, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    if "lm_head.weight" not in tensors:
        config.pop("tie_word_embeddings", None)
    (base / "config.json").write_text(json.dumps(config))
    return base


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def gpt2(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return of_the_hub(tiny.save_gpt2(tmp_path / "base", request.param, torch.float32, shards=False))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", GPT2)
def test_gpt2_as_the_hub_has_it(kind: str, gpt2: Path, tmp_path: Path) -> None:
    tuned = tiny.tune(gpt2, fan_in_fan_out=True, **GPT2[kind])
    tuned.save_pretrained(tmp_path / "adapter")
    verify_adapter_fits(tmp_path / "adapter", gpt2)
    merge(gpt2, [tmp_path / "adapter"], tmp_path / "out", "float32")
    assert tiny.relative(tiny.logits(load_merged(tmp_path / "out", torch.float32)), tiny.logits(tuned)) <= 1e-6
    lineage = Lineage(Link(gpt2, "base", None), (Link(tmp_path / "adapter", "adapter", None),))
    found = compare_weights(
        streamed_units(stream_policy(lineage, "cpu", "sdpa"), stream_merged(tmp_path / "out", "cpu", "sdpa")),
        torch.float32,
    )
    assert found["off"] == []
