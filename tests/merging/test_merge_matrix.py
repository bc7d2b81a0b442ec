"""Every kind of adapter, base, sharding and dtype: merged files against the live peft model that was saved."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import tiny
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from posttrain.certify.weights import compare_weights, units
from posttrain.errors import CheckpointError
from posttrain.merging.merge import merge

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONV1D = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
Q = {"target_modules": ["q_proj"]}
EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": LLAMA},
    "rslora": {"target_modules": LLAMA, "use_rslora": True},
    "dora": {"target_modules": LLAMA, "use_dora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
        "alpha_pattern": {"self_attn.v_proj": 32},
    },
    "output saved": {**Q, "modules_to_save": ["lm_head"]},
    "embedding saved": {**Q, "modules_to_save": ["embed_tokens"]},
    "both saved": {**Q, "modules_to_save": ["lm_head", "embed_tokens"]},
    "both saved as one": {**Q, "modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "norm saved": {**Q, "modules_to_save": ["input_layernorm"]},
    "token rows": {**Q, "trainable_token_indices": [40, 1, 7]},
    "token rows of each": {**Q, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [2]}},
    "same token rows of both": {**Q, "trainable_token_indices": {"embed_tokens": [1, 5], "lm_head": [1, 5]}},
    "token rows and output": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [1, 5]},
    "resized": {**Q, "resize_to": 56},
    "resized, token rows": {**Q, "resize_to": 56, "trainable_token_indices": [50, 55]},
    "resized, embedding": {"target_modules": ["q_proj", "embed_tokens"], "resize_to": 56},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "dora embedding": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "output": {"target_modules": ["q_proj", "lm_head"]},
    "embedding and output": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "all biases": {**Q, "bias": "all"},
    "lora bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "conv1d": CONV1D,
    "conv1d rslora patterns": {**CONV1D, "use_rslora": True, "rank_pattern": {"c_attn": 6}},
    "conv1d dora": {**CONV1D, "use_dora": True},
    "conv1d bias": {**CONV1D, "lora_bias": True},
    "conv1d embedding": {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True},
    "experts": {**Q, **EXPERTS},
    "experts rslora patterns": {
        **EXPERTS,
        "target_modules": ["o_proj"],
        "use_rslora": True,
        "rank_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 2},
    },
    "chain": {"target_modules": LLAMA, "then": {"target_modules": ["down_proj", "k_proj"], "r": 2}},
    "chain of two doras": {**Q, "use_dora": True, "then": {**Q, "use_dora": True}},
}
UNTIES = {
    "output saved",
    "embedding saved",
    "both saved",
    "token rows of each",
    "token rows and output",
    "resized, embedding",
    "embedding",
    "dora embedding",
    "output",
    "embedding and output",
    "conv1d embedding",
}
"""What changes one side of a tied embedding alone, or each side by itself."""
PEFT_MERGES_WRONG = UNTIES - {"output saved", "embedding saved", "both saved"}
"""On a tied base: peft's merge changes the side that its own forward leaves as it was."""
SAVE = {
    "conv1d": tiny.save_gpt2,
    "experts": tiny.save_mixtral,
    "bias": partial(tiny.save_base, attention_bias=True),
    "llama": tiny.save_base,
}
"""Word in a kind's name -> a base that it fits."""
LAST_BIT = {"dora embedding", "conv1d dora", "chain of two doras"}
"""Norms are summed in another order than peft's, so fp32 may differ in its last bit."""
UNIT = 2.0**-8
"""Unit roundoff of bf16: the largest |rounded - x| / |x|."""


@pytest.fixture(autouse=True, scope="module")
def _no_sync() -> Iterator[None]:
    """Waits for no disk: what is tested here are numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(os, "fdatasync", lambda _: None)
        yield


Bases = Callable[[str, bool, torch.dtype], tuple[Path, Path]]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    """(kind of adapter, tied, dtype) -> a base for it in one shard, and the same in several."""

    @cache
    def save(architecture: str, tied: bool, dtype: torch.dtype) -> tuple[Path, Path]:
        folder, save_base = tmp_path_factory.mktemp("base"), SAVE[architecture]
        return save_base(folder / "one", tied, dtype, False), save_base(folder / "several", tied, dtype, True)

    def bases(kind: str, tied: bool, dtype: torch.dtype) -> tuple[Path, Path]:
        return save(next((word for word in SAVE if word in kind), "llama"), tied, dtype)

    return bases


def tune(kind: str, base: Path, folder: Path) -> tuple[PeftModel, list[Path]]:
    """A live model with one adapter or a chain of two, all active, and the folders in which they were saved."""
    settings = dict(KINDS[kind])
    second = settings.pop("then", None)
    tuned = tiny.tune(base, **settings)
    if second:
        tuned.add_adapter("second", LoraConfig(**{"r": 4, "lora_alpha": 8, **second}))
        tuned.set_adapter("second")
        tiny.randomise(tuned, seed=2)
        tuned.base_model.set_adapter(["default", "second"])
    tuned.eval().save_pretrained(folder)
    return tuned, [folder, folder / "second"] if second else [folder]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def of_peft(tuned: PeftModel) -> PreTrainedModel:
    """peft's own merge of everything that is active, in fp32."""
    return copy.deepcopy(tuned).merge_and_unload(adapter_names=list(tuned.base_model.active_adapters))


def in_files(model: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """A model's tensors under the names that they have in files."""
    model.save_pretrained(folder)
    return tensors(folder)


def rounding_noise(merged: torch.nn.Module, wanted: torch.Tensor) -> float:
    """Relative error of the logits when every weight is off by up to bf16's unit roundoff, either way."""
    torch.manual_seed(3)
    noisy = copy.deepcopy(merged)
    for parameter in noisy.parameters():
        parameter.data *= 1 + UNIT * (2 * torch.rand_like(parameter) - 1)
    return tiny.relative(tiny.logits(noisy), wanted)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore:The following .* keys did not match:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("kind", "tied"),
    [(kind, tied) for kind in KINDS for tied in (False, True) if tied or kind != "resized, embedding"],
    ids=lambda value: value if isinstance(value, str) else "tied" if value else "untied",
)
def test_merged_files_are_the_live_model(
    kind: str, tied: bool, dtype: torch.dtype, bases: Bases, tmp_path: Path
) -> None:
    """Saved, merged from one shard and from several, and reloaded by plain transformers: the same logits."""
    sources = dict(zip((10**9, 9_000), bases(kind, tied, dtype), strict=True))
    tuned, chain = tune(kind, sources[10**9], tmp_path / "adapter")
    wanted = tiny.logits(tuned)
    names = set()
    for size, base in sources.items():
        report = merge(base, chain, tmp_path / f"fp32-{size}", "float32", max_shard_size=size)
        merged = tiny.load_base(tmp_path / f"fp32-{size}")
        assert tiny.relative(tiny.logits(merged), wanted) <= 1e-6
        assert report.tied is ((kind not in UNTIES) if tied else None)
        assert merged.config.tie_word_embeddings is bool(report.tied)
        assert merged.config.vocab_size == KINDS[kind].get("resize_to", tiny.VOCABULARY)
        names.add(len(list((tmp_path / f"fp32-{size}").glob("*.safetensors"))))
        assert off(tuned, merged, torch.float32) == []
    assert min(names) == 1 < max(names)
    exact = tensors(tmp_path / "fp32-1000000000")
    same(tensors(tmp_path / "fp32-9000"), exact)
    if tied and kind in PEFT_MERGES_WRONG:
        assert tiny.relative(tiny.logits(of_peft(tuned)), wanted) > 0.1
    elif kind not in LAST_BIT:
        same(exact, in_files(of_peft(tuned), tmp_path / "peft"))
    if dtype == torch.bfloat16:
        noise = rounding_noise(merged, wanted)
        for size, base in sources.items():
            merge(base, chain, tmp_path / f"bf16-{size}", "bfloat16", max_shard_size=size)
            same(tensors(tmp_path / f"bf16-{size}"), {name: tensor.bfloat16() for name, tensor in exact.items()})
            rounded = tiny.load_base(tmp_path / f"bf16-{size}")
            assert tiny.relative(tiny.logits(rounded), wanted) <= noise
            assert off(tuned, rounded, torch.bfloat16) == []


def off(tuned: PeftModel, merged: torch.nn.Module, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What a certificate says of the numbers."""
    found: list[dict[str, Any]] = compare_weights(units(tuned.get_base_model(), merged), dtype)["off"]
    return found


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Asserts that both hold the same tensors, to the bit."""
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_resized_output_layer_that_peft_leaves_out_is_refused(bases: Bases, tmp_path: Path) -> None:
    """LoRA on a resized embedding: peft saves the new rows of the embedding, not those of its own output layer."""
    base, _ = bases("lora", False, torch.float32)
    tiny.save_adapter(base, tmp_path / "adapter", 56, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(CheckpointError, match="only one of them was resized"):
        merge(base, [tmp_path / "adapter"], tmp_path / "out", "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
