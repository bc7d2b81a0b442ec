"""Several adapters on one base, added up in one pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merging import tiny
from safetensors.torch import load_file

from posttrain.merging.adapter import read_adapter
from posttrain.merging.checkpoint import open_checkpoint
from posttrain.merging.edits import merged_blocks, row_blocks
from posttrain.merging.merge import merge, merge_into
from posttrain.merging.plan import plan_merge

LORA: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"]}
CHAINS = {
    "lora, lora": (LORA, {"target_modules": ["down_proj", "k_proj"], "r": 2}),
    "dora, dora": ({**LORA, "use_dora": True}, {**LORA, "use_dora": True}),
    "lora, dora": (LORA, {**LORA, "use_dora": True}),
    "rows, lora": ({**LORA, "trainable_token_indices": [3, 7]}, LORA),
    "dora, lora": ({**LORA, "use_dora": True}, LORA),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("chain", CHAINS)
def test_chain_is_both_adapters_in_use(chain: str, tied: bool, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", tied, torch.bfloat16, shards=True)
    adapters = [
        tiny.save_adapter(base, tmp_path / str(number), seed=number, **settings)
        for number, settings in enumerate(CHAINS[chain])
    ]
    in_use = tiny.logits(tiny.live(base, *adapters))
    merge(base, adapters, tmp_path / "out", "float32")
    merge(base, adapters[1:], tmp_path / "last", "float32")
    assert tiny.relative(tiny.logits(tiny.load_base(tmp_path / "out")), in_use) < 1e-6
    assert tiny.relative(tiny.logits(tiny.load_base(tmp_path / "last")), in_use) > 0.1  # the SFT link is not optional


def test_sum_is_added_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", False, torch.bfloat16, shards=False)
    one = tiny.save_adapter(base, tmp_path / "one", **LORA)
    two = tiny.save_adapter(base, tmp_path / "two", seed=2, use_rslora=True, **LORA)
    report = merge(base, [one, two], tmp_path / "out", "bfloat16")
    weights, merged = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    factors = [load_file(folder / "adapter_model.safetensors") for folder in (one, two)]
    touched = 0
    for name, weight in weights.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        expected = weight.float()
        for scale, factor in zip((8 / 4, 8 / 4**0.5), factors, strict=True):
            if key.format("A") in factor:
                expected = expected + (factor[key.format("B")] @ factor[key.format("A")]) * scale
                touched += 1
        assert torch.equal(merged[name], expected.bfloat16()), name
    assert touched == 8
    assert (len(report.tensors), report.copied, report.cast) == (4, len(weights) - 4, 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_blocks_of_rows_give_the_same_model_and_stay_small(dora: bool, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", False, torch.float32, shards=False)
    adapter = tiny.save_adapter(
        base,
        tmp_path / "adapter",
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        use_dora=dora,
        trainable_token_indices={"lm_head": [1, 47]},
    )
    for name, block in (("small", 100), ("whole", 1 << 20)):
        (tmp_path / name).mkdir()
        merge_into(tmp_path / name, base, [adapter], "float32", block=block)
    small, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "whole"))
    for name, tensor in whole.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-6, atol=1e-7)
    for output in plan_merge(open_checkpoint(base), [read_adapter(adapter)]).outputs:
        sizes = [merged.numel() for _, merged in merged_blocks(output, None, block=100)]
        assert max(sizes) <= 100
        assert sum(sizes) == output.source.numel


def test_row_blocks_cover_every_row_once() -> None:
    assert list(row_blocks((10, 4), 12)) == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(row_blocks((2, 100), 10)) == [(0, 1), (1, 2)]  # a row is the smallest block
    assert list(row_blocks((), 10)) == [(0, 1)]
    assert list(row_blocks((0, 4), 10)) == []
    assert list(row_blocks((7,), 3)) == [(0, 3), (3, 6), (6, 7)]
