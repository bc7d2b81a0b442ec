"""What each of several processes holds: FSDP2 against a real rank of eight, ZeRO and DDP against the paper's counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.estimate.activations import Pass
from posttrain.estimate.adapters import AdapterShape
from posttrain.estimate.cost import cost
from posttrain.estimate.devices import find_device
from posttrain.estimate.memory import Memory, Piece, host_bytes, predict
from posttrain.estimate.remedies import Setting, remedies
from posttrain.estimate.shapes import architecture_of
from posttrain.estimate.spread import BUCKET, Spread
from posttrain.estimate.weights import Method, static_bytes
from posttrain.models.known_shapes import known_shape

GIB = 1 << 30
ADAM = "adamw_torch_fused"
SHAPE = known_shape("meta-llama/Llama-3.1-8B")
assert SHAPE is not None
LLAMA = architecture_of(SHAPE.config, "llama")
N = LLAMA.parameters


def over(kind: str, processes: int = 8, method: Method | None = None, **more: bool) -> Pass:
    return Pass("bf16", method=method or Method(), spread=Spread(kind, processes, **more))  # type: ignore[arg-type]


def needs(how: Pass, tokens: int = 4096) -> Memory:
    return predict(LLAMA, how, ADAM, Piece(tokens, tokens, checkpointing=True))


def test_a_rank_of_eight_holds_what_is_predicted() -> None:
    script = Path(__file__).with_name("spread_live.py")
    root = str(script.parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        seen = json.loads(line)
        kind, again, tokens = seen["case"]
        method = Method(None if kind == "full" else AdapterShape(16))
        how = Pass("bf16", "cpu", "fused", method, Spread("fsdp", 8))
        told = predict(architecture_of(seen["config"], "live"), how, ADAM, Piece(tokens, tokens, again))
        assert told.weights + told.trainable == seen["weights"]
        assert told.gradients == seen["gradients"]
        assert told.optimizer == seen["optimizer"]
        within = told.activations + told.casts + told.head + told.working + told.exchange
        assert 0.95 <= within / seen["peak"] <= 1.25, (seen["case"], within, seen["peak"])
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize(
    ("kind", "weights", "gradients", "optimizer"),
    [("ddp", 4, 4, 8), ("fsdp", 4 / 8, 4 / 8, 1), ("zero2", 2, 2 / 8, 12 / 8), ("zero3", 2 / 8, 2 / 8, 12 / 8)],
)
def test_bytes_a_parameter_are_those_of_the_paper(
    kind: str, weights: float, gradients: float, optimizer: float
) -> None:
    """Rajbhandari et al. 2020, figure 1: 2 + 2 + 12 bytes, cut stage by stage; FSDP2's weights are the fp32 ones."""
    static = static_bytes(LLAMA, Method(), "bf16", ADAM, over(kind).spread)
    assert static.weights / N == pytest.approx(weights, rel=1e-4)
    assert static.gradients / N == pytest.approx(gradients, rel=1e-4)
    assert static.optimizer / N == pytest.approx(optimizer, rel=1e-4)
    assert static.trainable_parameters == N


def test_ddp_holds_all_of_it_and_buckets() -> None:
    alone, many = needs(over("ddp", 1)), needs(over("ddp", 8))
    assert many.exchange == 4 * N
    assert replace(many, exchange=0, margin=alone.margin) == alone
    lora = needs(over("ddp", 8, Method(AdapterShape(16))))
    assert lora.exchange == 4 * 41_943_040


def test_rows_are_cut_and_rounded_up() -> None:
    spread = Spread("fsdp", 8)
    assert spread.part((16, 4096)) == (2, 4096)
    assert spread.part((3, 5)) == (1, 5)
    assert Spread("zero3", 8).part((3, 5)) == (2,)


def test_more_processes_leave_less_but_never_the_whole_blocks() -> None:
    sizes = [needs(over("fsdp", count)).device for count in (2, 8, 64, 1024)]
    assert sizes == sorted(sizes, reverse=True)
    assert needs(over("fsdp", 1024)).exchange == needs(over("fsdp", 2)).exchange
    assert needs(over("zero3")).exchange >= 2 * BUCKET


def test_what_is_offloaded_lies_with_the_host() -> None:
    how = over("fsdp", 8, weights_on_host=True, updates_on_host=True)
    memory = needs(how)
    assert memory.weights == memory.gradients == memory.optimizer == 0
    assert host_bytes(LLAMA, how, ADAM) == pytest.approx(16 * N / 8, rel=1e-4)
    assert host_bytes(LLAMA, over("fsdp"), ADAM) == 0
    half = needs(over("zero2", 8, updates_on_host=True))
    assert (half.weights, half.optimizer) == (2 * N, 0)


def test_layers_that_stay_whole_cost_their_weights() -> None:
    kept = needs(over("fsdp", 8, gathered_once=True)).exchange - needs(over("fsdp", 8)).exchange
    assert kept > 3.9 * sum(tensor.numel for tensor in LLAMA.matrices) * 30 / 32


def test_remedies_name_processes_that_fit() -> None:
    def ways(how: Pass, budget: int) -> dict[str, int]:
        setting = Setting(LLAMA, how, ADAM, Piece(4096, 4096, True), 4096, None)
        return {remedy.change: remedy.bytes for remedy in remedies(setting, budget)}

    alone = ways(over("ddp", 1), 79 * GIB)
    (found,) = (size for change, size in alone.items() if change.endswith(" and accelerate_config: fsdp2"))
    assert found <= 79 * GIB
    assert "accelerate_config: fsdp2" in ways(over("ddp", 8), 79 * GIB)
    assert any(change.startswith("num_processes: ") for change in ways(over("fsdp", 2), 79 * GIB))
    cut = ways(over("fsdp", 2), 24 * GIB)
    assert "method: qlora and accelerate_config: ddp" in cut
    quantised = over("ddp", 2, Method(AdapterShape(16), four_bits=True))
    assert not any("fsdp2" in change for change in ways(quantised, 1 * GIB))


def test_devices_share_time_and_add_up_power() -> None:
    one, eight = (cost(1e10, 10**9, find_device("h100"), devices=devices) for devices in (1, 8))
    assert one.seconds is not None
    assert eight.seconds == pytest.approx(one.seconds / 8)
    assert eight.watt_hours == pytest.approx(one.watt_hours)
    assert cost(1e10, 10**9, find_device("h100"), 1000.0, 8).seconds == 10**6
