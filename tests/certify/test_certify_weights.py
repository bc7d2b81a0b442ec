"""Number by number: what rounding hides from the logits, a wrong delta of one layer, is found in 16 bits too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from merging import tiny
from merging.stories import Chain, train_chain
from safetensors.torch import load_file
from torch import nn

from posttrain.certify.certificate import Limits, default_limits, failures, grid_allowance, stray_numbers
from posttrain.certify.comparison import Comparison, load_exact
from posttrain.certify.layers import stream_merged, stream_policy, streamed_units
from posttrain.certify.logits import compare_logits, load_merged, logits_of
from posttrain.certify.probes import Probe, Probes
from posttrain.certify.weights import COLUMNS, compare_weights, units
from posttrain.merging.merge import merge
from posttrain.merging.quantization import QuantSpec
from posttrain.models.lineage import Lineage, Link, Quantization

BF16 = default_limits("bfloat16", quantised=False, base_mode="original")
Change = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(base's tensor, merged tensor in fp32) -> what a wrong merge has in its place, in fp32."""


@dataclass(frozen=True)
class Work:
    """A trained chain and its merge in bf16; `exact` are its numbers before rounding."""

    chain: Chain
    merged: nn.Module
    before: dict[str, torch.Tensor]
    exact: dict[str, torch.Tensor]

    def off(self) -> list[dict[str, Any]]:
        found = compare_weights(units(self.chain.in_use.get_base_model(), self.merged), torch.bfloat16)
        assert found["tensors"] == len(dict(self.merged.named_parameters(remove_duplicate=False)))
        listed: list[dict[str, Any]] = found["off"]
        return listed

    def changed(self) -> list[str]:
        return [name for name, tensor in self.before.items() if not torch.equal(tensor, self.exact[name])]


@pytest.fixture(scope="module")
def work(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("weights")
    chain = train_chain(shared_dir, folder)
    for dtype in ("bfloat16", "float32"):
        merge(chain.base, chain.adapters, folder / dtype, dtype)
    merged = load_merged(folder / "bfloat16", torch.float32)
    exact = load_file(folder / "float32" / "model.safetensors")
    return Work(chain, merged, load_file(chain.base / "model.safetensors"), exact)


def test_a_right_merge_has_no_number_off(work: Work) -> None:
    assert work.off() == []
    assert len(work.changed()) == 35


def one_row(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    found = after.clone()
    found[5] = before[5]
    return found


WRONG: dict[str, Change] = {
    "left out": lambda before, after: before,
    "a hundredth too large": lambda before, after: before + 1.01 * (after - before),
    "a hundredth too small": lambda before, after: before + 0.99 * (after - before),
    "of the wrong sign": lambda before, after: 2 * before - after,
    "of one row left out": one_row,
    "rounded before it is added": lambda before, after: before.bfloat16().float() + (after - before).bfloat16().float(),
    "not a number": lambda before, after: after * torch.nan,
}


@pytest.mark.contract(number=10)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_delta_of_one_projection_is_found_in_bf16(wrong: str, work: Work) -> None:
    """In each of the 35 tensors that the chain changes, the others being right."""
    parameters, unseen = dict(work.merged.named_parameters()), []
    for name in work.changed():
        right = parameters[name].data
        parameters[name].data = WRONG[wrong](work.before[name].float(), work.exact[name]).bfloat16().float()
        found = work.off()
        if [one["name"] for one in found] != [name] or not stray_numbers({"off": found}, BF16, "bfloat16"):
            unseen.append(name)
        parameters[name].data = right
    assert unseen == []
    assert work.off() == []


def test_a_transposed_delta_is_found_in_bf16(work: Work) -> None:
    parameters, seen = dict(work.merged.named_parameters()), 0
    for name in work.changed():
        before, after, right = work.before[name], work.exact[name], parameters[name].data
        if before.shape[0] != before.shape[1]:
            continue
        parameters[name].data = (before + (after - before).T).bfloat16().float()
        assert [one["name"] for one in work.off()] == [name]
        parameters[name].data, seen = right, seen + 1
    assert seen == 2 * 5


def test_the_logits_alone_would_have_let_it_pass(work: Work) -> None:
    """Why numbers are compared: with these limits a whole projection may be missing."""
    parameters, in_use, passed = dict(work.merged.named_parameters()), logits_of(work.chain.in_use), 0
    for name in work.changed():
        right = parameters[name].data
        parameters[name].data = WRONG["a hundredth too large"](work.before[name], work.exact[name]).bfloat16().float()
        passed += not failures(compare_logits(in_use, logits_of(work.merged), work.chain.rows[:1]), BF16)
        parameters[name].data = right
    assert passed == 35


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_wide_layer_is_sampled_by_columns_and_a_wrong_row_still_found(dtype: str, tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", True, torch.float32, shards=False, intermediate_size=2 * COLUMNS)
    tiny.save_adapter(base, tmp_path / "adapter", target_modules=["down_proj"])
    merge(base, [tmp_path / "adapter"], tmp_path / "out", dtype)
    in_use, merged = tiny.live(base, tmp_path / "adapter"), load_merged(tmp_path / "out", torch.float32)

    def figures() -> dict[str, Any]:
        return compare_weights(units(in_use.get_base_model(), merged), getattr(torch, dtype))  # type: ignore[operator]

    right = figures()
    assert right["off"] == []
    everything = sum(parameter.numel() for parameter in dict(merged.named_parameters(remove_duplicate=False)).values())
    assert right["numbers"] == everything - 2 * COLUMNS * 32  # a half of each down_proj was not looked at
    weight = merged.get_parameter("model.layers.1.mlp.down_proj.weight")
    weight.data[3] *= 1.1
    assert [one["name"] for one in figures()["off"]] == ["model.layers.1.mlp.down_proj.weight"]


def lineage_of(folder: Path, quantization: Quantization | None) -> Lineage:
    """Two adapters on a base, of which one sees to token rows too."""
    base = tiny.save_base(folder / "base", True, torch.bfloat16, shards=True)
    (base / "tokenizer.json").write_text("{}")
    for number, more in enumerate(({"trainable_token_indices": [3, 9]}, {})):
        tiny.save_adapter(base, folder / str(number), target_modules=["q_proj", "down_proj"], seed=number, **more)
    return Lineage(Link(base, "base", None), tuple(Link(folder / name, name, None) for name in "01"), quantization)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("mode", ["whole", "layers"])
@pytest.mark.parametrize("quantization", [None, Quantization("nf4", True, "bfloat16")], ids=["plain", "4 bits"])
def test_in_memory_and_layer_by_layer_the_same_numbers_are_compared(
    mode: Any, quantization: Quantization | None, tmp_path: Path
) -> None:
    lineage = lineage_of(tmp_path, quantization)
    chain = [link.folder for link in lineage.adapters]
    spec = QuantSpec() if quantization else None
    merge(lineage.base.folder, chain, tmp_path / "right", "bfloat16", "dequantized" if spec else "original", spec)
    merge(lineage.base.folder, chain[:1], tmp_path / "wrong", "bfloat16", "dequantized" if spec else "original", spec)
    how = Comparison(Probes("given", [Probe([1, 2], [1, 2])]), "cpu", mode=mode)
    right = how.weigh(how.in_use(lineage), how.merged(tmp_path / "right"), torch.bfloat16)
    assert right["off"] == []
    assert right["tensors"] == 2 * 9 + 3
    wrong = how.weigh(how.in_use(lineage), how.merged(tmp_path / "wrong"), torch.bfloat16)
    kinds = {one["name"].rsplit(".", 2)[1] for one in wrong["off"]}
    assert (kinds, len(wrong["off"])) == ({"q_proj", "down_proj"}, 4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_mixture_of_experts_layer_by_layer(tmp_path: Path) -> None:
    """Its experts are one parameter in memory and a tensor each in the files."""
    base = tiny.save_mixtral(tmp_path / "base", True, torch.float32, shards=True)
    (base / "tokenizer.json").write_text("{}")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    tiny.save_adapter(base, tmp_path / "0", target_modules=["q_proj"], target_parameters=targets)
    lineage = Lineage(Link(base, "base", None), (Link(tmp_path / "0", "0", None),))
    merge(base, [tmp_path / "0"], tmp_path / "right", "bfloat16")
    right = compare_weights(
        streamed_units(stream_policy(lineage, "cpu", "sdpa"), stream_merged(tmp_path / "right", "cpu", "sdpa")),
        torch.bfloat16,
    )
    assert (right["off"], right["tensors"]) == ([], 2 * 9 + 3)
    merge(base, [], tmp_path / "wrong", "bfloat16")
    wrong = compare_weights(
        units(load_exact(lineage, "cpu", "sdpa").get_base_model(), load_merged(tmp_path / "wrong", torch.float32)),  # type: ignore[operator]
        torch.bfloat16,
    )
    assert {one["name"].rsplit(".", 1)[1] for one in wrong["off"]} == {"weight", "gate_up_proj", "down_proj"}
    how = Comparison(Probes("given", [Probe([1, 5, 9], [1, 5, 9])]), "cpu", mode="layers")
    figures = how.measure(how.in_use(lineage), how.merged(tmp_path / "right"))
    whole = compare_logits(
        logits_of(load_exact(lineage, "cpu", "sdpa")),
        logits_of(load_merged(tmp_path / "right", torch.float32)),
        how.probes.ids,
    )
    assert figures["relative_error"] == pytest.approx(whole["relative_error"], rel=1e-3)


def test_what_may_be_off_is_the_grid_of_another_device_only() -> None:
    off = [{"name": "a.weight", "share": 0.01, "largest": 0.1}, {"name": "b.weight", "share": 1e-6, "largest": 0.1}]
    assert grid_allowance("cpu", "cpu") == 0
    assert 0 < grid_allowance("cuda", "cuda") < grid_allowance("cuda", "cpu") == grid_allowance("cpu", "cuda")
    found = stray_numbers({"off": off}, BF16, "bfloat16", {"a.weight"}, grid_allowance("cuda", "cpu"))
    assert found == [
        "1 tensor is not what the adapters in use have, rounded to bfloat16 (worst: b.weight, 0.0001 % of its numbers)"
    ]
    assert len(stray_numbers({"off": off}, BF16, "bfloat16", {"a.weight"}, grid_allowance("cuda", "cuda"))) == 1
    assert stray_numbers({"off": off}, Limits(), "bfloat16") == []
    assert stray_numbers({"off": off}, BF16.over(Limits(max_share_off=0.02)), "bfloat16") == []
    assert stray_numbers({"off": [{"name": "c", "share": float("nan")}]}, BF16, "bfloat16")
