"""The peak of a step against live storages, and what follows from it: the largest piece, and what would fit."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from posttrain.errors import UserError
from posttrain.estimate.activations import Pass
from posttrain.estimate.adapters import AdapterShape
from posttrain.estimate.architecture import Architecture
from posttrain.estimate.cost import cost, flops_per_token
from posttrain.estimate.devices import find_device, recognise
from posttrain.estimate.memory import Piece, largest_micro_batch, needs_checkpointing, predict, predict_peak
from posttrain.estimate.remedies import Setting, remedies
from posttrain.estimate.shapes import architecture_of
from posttrain.estimate.weights import Method
from posttrain.models.known_shapes import known_shape

GIB = 1 << 30
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu" / "measure_memory.py"
LORA = Pass("bf16", "cuda", "fused", Method(AdapterShape(16)))
FULL = Pass("bf16")


def known(model_id: str) -> Architecture:
    shape = known_shape(model_id)
    assert shape is not None
    return architecture_of(shape.config, model_id)


LLAMA = known("meta-llama/Llama-3.1-8B")


@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_the_peak_of_a_step_is_what_is_alive_at_it(method: str) -> None:
    script = runpy.run_path(str(SCRIPT))
    results = script["run_one"]("1b", method, 512, True)
    assert [result["checkpointing"] for result in results] == [False, True]
    for result in results:
        assert result["predicted"] == pytest.approx(result["measured"], rel=0.10)


def test_operations_of_eight_billion_parameters() -> None:
    """6 N + 3 a, 4 N + 3 a, and 2 N + a more where activations are recomputed; 4096 tokens, causal."""
    lora = Method(AdapterShape(16))
    told = [flops_per_token(LLAMA, method, 4096, again) / 1e9 for method in (Method(), lora) for again in (False, True)]
    assert told == pytest.approx([48.2, 64.3, 33.2, 49.3], abs=0.06)


def test_more_tokens_need_more_and_recomputing_needs_less() -> None:
    sizes = [predict_peak(LLAMA, LORA, "adamw_torch_fused", Piece(n, n)) for n in (1024, 4096, 16384)]
    assert sizes == sorted(set(sizes))
    again = predict(LLAMA, LORA, "adamw_torch_fused", Piece(16384, 16384, checkpointing=True))
    assert again.allocated < sizes[2] / 3
    assert again.device == again.allocated + again.margin


def test_the_largest_piece_fits_and_the_next_does_not() -> None:
    largest = largest_micro_batch(LLAMA, LORA, "adamw_torch_fused", 48 * GIB, False, 2048)
    assert largest is not None
    sizes = [predict(LLAMA, LORA, "adamw_torch_fused", Piece(n, n)).device for n in (largest, largest + 256)]
    assert sizes[0] <= 48 * GIB < sizes[1]
    assert largest_micro_batch(LLAMA, LORA, "adamw_torch_fused", 10 * GIB, True, 2048) is None
    assert largest_micro_batch(LLAMA, LORA, "adamw_torch_fused", 48 * GIB, True, 100) is not None
    assert needs_checkpointing(LLAMA, LORA, "adamw_torch_fused", 24 * GIB, 8192, 8192)
    assert not needs_checkpointing(LLAMA, LORA, "adamw_torch_fused", 140 * GIB, 8192, 8192)


def test_a_dense_mask_is_quadratic_in_the_row() -> None:
    dense = Pass("bf16", "cuda", "sdpa", LORA.method)
    short, long = (predict_peak(LLAMA, dense, "sgd", Piece(16384, row)) for row in (2048, 16384))
    assert long - short >= 0.99 * LLAMA.layers * 2 * 16384 * (16384 - 2048)


def test_rows_that_train_beside_an_adapter_cost_a_copy_of_the_matrix() -> None:
    moved = Pass("bf16", "cuda", "fused", Method(AdapterShape(16, token_rows=4)))
    plain, rows = (predict(LLAMA, how, "sgd", Piece(4096, 4096, True)).head for how in (LORA, moved))
    assert rows - plain >= 8 * 128256 * 4096


def test_remedies_are_computed() -> None:
    setting = Setting(LLAMA, FULL, "adamw_torch_fused", Piece(4096, 4096), 4096, None)
    found = {remedy.change: remedy.bytes for remedy in remedies(setting, 48 * GIB)}
    assert "method: lora" in found
    assert "method: qlora" in found
    assert not any(change.startswith("optim") for change in found)
    assert all(size <= 48 * GIB for change, size in found.items() if not change.startswith("a GPU"))
    assert "a GPU such as b200" in found
    eight = {remedy.change for remedy in remedies(setting, 100 * GIB)}
    assert "optim: adamw_bnb_8bit and gradient_checkpointing: true" in eight


def test_devices_by_name_and_size() -> None:
    assert find_device("24GB").memory == 24 * GIB
    assert find_device("24gb").teraflops is None
    assert find_device("A100-80GB").watts == 400
    assert find_device("RTX 4090").name == "rtx4090"
    with pytest.raises(UserError, match="no device that is known"):
        find_device("abacus")
    here = recognise("NVIDIA A100-SXM4-80GB", 81920 << 20)
    assert (here.name, here.teraflops, here.memory) == ("NVIDIA A100-SXM4-80GB", 312, 81920 << 20)
    assert recognise("NVIDIA L40S", 46068 << 20).teraflops == 362
    assert recognise("Some Card", 8 * GIB).teraflops is None


def test_time_is_measured_before_it_is_tabled() -> None:
    h200 = find_device("h200")
    tabled, measured = cost(33.2e9, 10**6, h200), cost(33.2e9, 10**6, h200, 5000.0)
    assert (tabled.source, measured.source) == ("tabled", "measured")
    assert tabled.seconds == pytest.approx(33.2e15 / (989e12 * 0.4))
    assert measured.seconds == pytest.approx(200)
    assert measured.watt_hours == pytest.approx(200 * 700 * 0.8 / 3600)
    assert cost(1.0, 1, find_device("24GB")).seconds is None
