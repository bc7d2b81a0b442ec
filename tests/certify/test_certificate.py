"""The certificate: passes for the right merge, and fails for each way in which one can be wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from merging import tiny
from safetensors.torch import load_file, save_file

from posttrain.certify.certificate import Limits, default_limits, eaten_deltas, failures, verify_bytes, worst_first
from posttrain.certify.logits import compare_logits, load_merged, logits_of
from posttrain.errors import CheckpointError
from posttrain.merging.merge import merge
from posttrain.merging.report import TensorReport

EXACT = default_limits("float32", quantised=False, base_mode="original")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SFT and a DPO adapter on one base, and their merge."""
    folder = tmp_path_factory.mktemp("certify")
    base = tiny.save_base(folder / "base", True, torch.float32, shards=True)
    for seed, name in enumerate(("sft", "dpo")):
        tiny.save_adapter(base, folder / name, target_modules=["q_proj", "down_proj"], seed=seed)
    report = merge(base, [folder / "sft", folder / "dpo"], folder / "merged", "float32")
    (folder / "files.json").write_text(json.dumps(report.files))
    return folder


@pytest.fixture(scope="module")
def in_use(work: Path) -> torch.nn.Module:
    return tiny.live(work / "base", work / "sft", work / "dpo")


def problems(folder: Path, in_use: torch.nn.Module, limits: Limits) -> list[str]:
    measured = compare_logits(logits_of(in_use), logits_of(load_merged(folder, torch.float32)), tiny.ROWS)
    return failures(measured, limits)


def test_right_merge_passes(work: Path, in_use: torch.nn.Module) -> None:
    candidate = logits_of(load_merged(work / "merged", torch.float32))
    measured = compare_logits(logits_of(in_use), candidate, tiny.ROWS, tiny.ROWS)
    assert failures(measured, EXACT) == []
    assert measured["relative_error"] < 1e-6
    assert measured["top1_agreement"] == 1
    assert measured["tokens"] == sum(map(len, tiny.ROWS))
    json.dumps(measured, allow_nan=False)


def test_bf16_merge_passes_bf16_limits_only(work: Path, in_use: torch.nn.Module, tmp_path: Path) -> None:
    merge(work / "base", [work / "sft", work / "dpo"], tmp_path / "out", "bfloat16")
    coarse = default_limits("bfloat16", quantised=False, base_mode="original")
    assert problems(tmp_path / "out", in_use, coarse) == []
    assert problems(tmp_path / "out", in_use, EXACT)


@pytest.mark.parametrize("chain", [["dpo"], ["sft"], [], ["sft", "dpo", "dpo"]], ids="+".join)
def test_wrong_chain_fails(work: Path, in_use: torch.nn.Module, chain: list[str], tmp_path: Path) -> None:
    merge(work / "base", [work / name for name in chain], tmp_path / "out", "float32")
    limits = Limits(relative_error=0.1, mean_kl=0.05, min_top1_agreement=0.7)  # wider than all of ours
    assert len(problems(tmp_path / "out", in_use, limits)) >= 2


def test_wrong_base_fails(work: Path, in_use: torch.nn.Module, tmp_path: Path) -> None:
    other = tiny.save_base(tmp_path / "other", True, torch.float32, shards=False)
    weights = load_file(other / "model.safetensors")
    torch.manual_seed(5)
    save_file(
        {name: weight + 0.02 * torch.randn_like(weight) for name, weight in weights.items()},
        other / "model.safetensors",
        metadata={"format": "pt"},
    )
    merge(other, [work / "sft", work / "dpo"], tmp_path / "out", "float32")
    assert problems(tmp_path / "out", in_use, EXACT)


def test_one_flipped_bit_is_found(work: Path) -> None:
    files = json.loads((work / "files.json").read_text())
    assert verify_bytes(work / "merged", files) == []
    weights = work / "merged" / "model.safetensors"
    whole = weights.read_bytes()
    try:
        for position in (20, len(whole) // 2, len(whole) - 1):
            flipped = bytearray(whole)
            flipped[position] ^= 1
            weights.write_bytes(flipped)
            assert verify_bytes(work / "merged", files) == [
                "model.safetensors does not have the SHA-256 it was written with"
            ]
        weights.write_bytes(whole[:-1])
        assert "bytes instead of" in verify_bytes(work / "merged", files)[0]
        weights.unlink()
        assert verify_bytes(work / "merged", files) == ["model.safetensors is missing"]
    finally:
        weights.write_bytes(whole)


def test_folder_that_transformers_would_fill_with_noise_is_refused(work: Path, tmp_path: Path) -> None:
    merge(work / "base", [], tmp_path / "out", "float32")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing_keys.*model\.norm\.weight"):
        load_merged(tmp_path / "out", torch.float32)


def test_figures_of_known_logits() -> None:
    p = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    q = torch.tensor([[0.0, math.log(3)], [2.0, 0.0]])
    found = compare_logits(lambda _: p, lambda _: q, [[1, 2]])
    assert found["max_difference"] == pytest.approx(math.log(3))
    assert found["mean_difference"] == pytest.approx(math.log(3) / 4)
    assert found["relative_error"] == pytest.approx(math.log(3) / 2)
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # (1/2, 1/2) against (1/4, 3/4)
    assert found["max_kl"] == pytest.approx(kl)
    assert found["mean_kl"] == pytest.approx(kl / 2)
    assert found["top1_agreement"] == 0.5
    assert (found["tokens"], found["rows"]) == (2, 1)
    assert (found["reference_loss"], found["loss"]) == (None, None)
    known = compare_logits(lambda _: p, lambda _: q, [[1, 1]], [[-100, 1]])  # the label of a place is told before it
    assert known["reference_loss"] == pytest.approx(math.log(2))
    assert known["loss"] == pytest.approx(math.log(4 / 3))


def test_long_rows_are_compared_in_pieces_that_add_up() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(600, 7), torch.randn(600, 7)
    whole = compare_logits(lambda _: p, lambda _: q, [[1] * 600])
    parts = compare_logits(
        lambda ids: p[ids[0] :][: len(ids)], lambda ids: q[ids[0] :][: len(ids)], [[0] * 6, [6] * 594]
    )
    for name in ("max_difference", "mean_difference", "relative_error", "mean_kl", "max_kl", "top1_agreement"):
        assert parts[name] == pytest.approx(whole[name])
    expected = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert whole["mean_kl"] == pytest.approx(expected.item(), rel=1e-5)


def test_nan_fails_every_limit() -> None:
    nan = torch.full((2, 3), math.nan)
    measured = compare_logits(lambda _: torch.ones(2, 3), lambda _: nan, [[1, 2]])
    assert math.isnan(measured["max_difference"])
    assert math.isnan(measured["mean_kl"])
    assert (
        len(failures(measured, EXACT.over(Limits(max_logit_difference=5.0)))) >= 3
    )  # top-1 of all-NaN logits is some token


def test_no_rows_and_other_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        compare_logits(lambda _: torch.ones(1, 2), lambda _: torch.ones(1, 2), [[]])
    with pytest.raises(ValueError, match="logits of shape"):
        compare_logits(lambda _: torch.ones(1, 2), lambda _: torch.ones(1, 3), [[1]])


def test_limits_of_the_user_go_before_the_defaults() -> None:
    limits = EXACT.over(Limits(mean_kl=0.5, min_top1_agreement=0.0))
    assert (limits.mean_kl, limits.min_top1_agreement, limits.relative_error) == (0.5, 0.0, EXACT.relative_error)
    assert limits.max_logit_difference is None


def test_deltas_that_rounding_ate_are_named_where_the_recipe_says_so() -> None:
    cosines = {"a": 0.99, "b": 0.5, "c": None, "d": math.nan, "e": 0.8}
    tensors = worst_first([TensorReport(name, (), 0.1, cosine, 1.0) for name, cosine in cosines.items() if name != "d"])
    assert [one["name"] for one in tensors] == ["b", "e", "a", "c"]
    assert eaten_deltas(tensors, Limits()) == []
    assert eaten_deltas(tensors, Limits(min_delta_cosine=0.9)) == [
        "rounding left less than cosine 0.9 of 2 deltas (worst: b, cosine 0.500)"
    ]
    nan = worst_first([TensorReport("d", (), 0.1, math.nan, 1.0)])
    assert eaten_deltas(nan, Limits(min_delta_cosine=0.1))
