"""Layer by layer from the files: the logits of whole models, for every kind of adapter, with one layer in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merging import tiny

from posttrain.certify.comparison import Comparison, available_memory, load_exact
from posttrain.certify.layers import stream_merged, stream_policy, streamed_logits
from posttrain.certify.logits import Logits, compare_logits, load_merged, logits_of
from posttrain.certify.probes import Probe, Probes
from posttrain.errors import CheckpointError
from posttrain.merging.merge import merge
from posttrain.models.lineage import Lineage, Link, Quantization

ROWS = [*tiny.ROWS, [7], list(range(1, 40))]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "token rows": {"trainable_token_indices": [1, 2]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}


def lineage_of(folder: Path, quantization: Quantization | None = None, tied: bool = True, **kind: Any) -> Lineage:
    base = tiny.save_base(folder / "base", tied, torch.float32, shards=True)
    (base / "tokenizer.json").write_text("{}")
    tiny.save_adapter(base, folder / "one", **{"target_modules": ["q_proj", "down_proj"], **kind})
    tiny.save_adapter(base, folder / "two", target_modules=["q_proj", "up_proj"], seed=4)
    links = (Link(folder / name, name, None) for name in ("one", "two"))
    return Lineage(Link(base, "base", None), tuple(links), quantization)


def layered_policy(lineage: Lineage, rows: list[list[int]]) -> Logits:
    return streamed_logits(stream_policy(lineage, "cpu", "sdpa"), rows)


def layered_merged(folder: Path, rows: list[list[int]]) -> Logits:
    return streamed_logits(stream_merged(folder, "cpu", "sdpa"), rows)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_in_use_are_the_same_layer_by_layer(tmp_path: Path, kind: str, tied: bool) -> None:
    lineage = lineage_of(tmp_path, tied=tied, **KINDS[kind])
    whole = logits_of(load_exact(lineage, "cpu", "sdpa"))
    layers = layered_policy(lineage, ROWS)
    assert compare_logits(whole, layers, ROWS)["relative_error"] < 1e-6


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_vocabulary_that_grew_is_compared_as_well(tmp_path: Path, tied: bool) -> None:
    base = tiny.save_base(tmp_path / "base", tied, torch.float32, shards=True)
    (base / "tokenizer.json").write_text("{}")
    tiny.save_adapter(base, tmp_path / "one", target_modules=["q_proj"], resize_to=tiny.VOCABULARY + 8)
    lineage = Lineage(Link(base, "base", None), (Link(tmp_path / "one", "one", None),))
    merge(base, [tmp_path / "one"], tmp_path / "out", "float32")
    merged = logits_of(load_merged(tmp_path / "out", torch.float32))
    rows = [*ROWS, [3, tiny.VOCABULARY + 2, 5]]
    for in_use in (
        logits_of(load_exact(lineage, "cpu", "sdpa")),
        layered_policy(lineage, rows),
    ):
        assert compare_logits(in_use, merged, rows)["relative_error"] < 1e-6


@pytest.mark.parametrize("quantization", [Quantization("nf4", True, "float32"), Quantization("fp4", False, "float32")])
def test_a_base_in_4_bits_is_the_same_layer_by_layer(tmp_path: Path, quantization: Quantization) -> None:
    lineage = lineage_of(tmp_path, quantization)
    whole = logits_of(load_exact(lineage, "cpu", "sdpa"))
    layers = layered_policy(lineage, ROWS)
    assert compare_logits(whole, layers, ROWS)["relative_error"] < 1e-6
    plain = layered_policy(Lineage(lineage.base, lineage.adapters), ROWS)
    assert compare_logits(whole, plain, ROWS)["relative_error"] > 1e-3  # the grid is really in it


def test_merged_files_are_the_same_layer_by_layer(tmp_path: Path) -> None:
    lineage = lineage_of(tmp_path)
    merge(
        lineage.base.folder,
        [link.folder for link in lineage.adapters],
        tmp_path / "out",
        "bfloat16",
        max_shard_size=9000,
    )
    whole = logits_of(load_merged(tmp_path / "out", torch.float32))
    assert compare_logits(whole, layered_merged(tmp_path / "out", ROWS), ROWS)["relative_error"] < 1e-6


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.save_base(tmp_path / "base", True, torch.float32, shards=False)
    from posttrain.certify import layers

    seen: list[int] = []
    fill = layers._stream

    def watch(layer: torch.nn.Module, streamed: layers.Streamed) -> list[Any]:
        return [*fill(layer, streamed), layer.register_forward_hook(lambda module, *_: seen.append(real(module)))]

    def real(module: torch.nn.Module) -> int:
        return sum(parameter.untyped_storage().nbytes() for parameter in module.parameters())

    monkeypatch.setattr(layers, "_stream", watch)
    layered_merged(base, ROWS)
    assert len(seen) == 2
    assert max(seen) < 100  # after a layer has computed, one number is left of each of its parameters


def test_names_that_the_files_do_not_have_are_named(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", True, torch.float32, shards=False)
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.query.weight"] = weights.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no model\.layers\.0\.self_attn\.q_proj\.weight"):
        layered_merged(base, ROWS)


def test_auto_takes_layers_where_two_models_do_not_fit() -> None:
    how = Comparison(Probes("given", [Probe([1, 2], [1, 2])]), "cpu")
    fits = available_memory("cpu") // 8  # parameters of which two models take all there is
    assert fits > 1e7
    assert how.for_size(fits // 2).mode == "whole"
    assert how.for_size(2 * fits).mode == "layers"
    assert Comparison(how.probes, "cpu", mode="whole").for_size(2 * fits).mode == "whole"
