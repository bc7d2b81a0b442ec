"""What stops training: a loss or gradient that is not finite, weights that get no gradient, a request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.errors import Interrupted, StageError
from posttrain.pretraining.checkpoint import checkpoint_steps
from posttrain.pretraining.loop import Step
from posttrain.pretraining.metrics import read_metrics
from posttrain.stages.setup import assert_gradients, assert_trainable
from posttrain.training.sft import SpineSftTrainer, build_sft_trainer, sft_step
from tests.training.spine_tiny import PAD, arguments, make_model, make_rows, make_tokenizer, train

ROWS = make_rows(60)


def make_step(step: int) -> Step:
    return sft_step(ROWS[4 * step : 4 * step + 4], PAD, 64, 4096, None)


def trainer_for(folder: Path, steps: int, model: Any = None, **fields: Any) -> SpineSftTrainer:
    return build_sft_trainer(model or make_model(), make_tokenizer(), arguments(folder, steps, **fields))


def weights(trainer: SpineSftTrainer) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in trainer.model.named_parameters()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    trainer = trainer_for(tmp_path, 6, save_steps=2)
    original, kept = SpineSftTrainer.piece_loss, {}

    def broken(self: Any, model: Any, tensors: dict, share: float, step: Step) -> torch.Tensor:
        loss = original(self, model, tensors, share, step)
        if self.state.global_step == 3:
            kept.update(weights(self))
            return loss * value
        return loss

    monkeypatch.setattr(SpineSftTrainer, "piece_loss", broken)
    with pytest.raises(StageError, match=rf"step 4: the loss is {value}; the optimizer has not moved"):
        train(trainer, tmp_path, 6, make_step)
    assert same(weights(trainer), kept)
    assert checkpoint_steps(tmp_path / "checkpoints") == [2]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer_moves(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, 4, max_grad_norm=1.0)
    before = weights(trainer)
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(StageError, match="step 1: the gradient norm is nan; the optimizer has not moved"):
        train(trainer, tmp_path, 4, make_step)
    assert same(weights(trainer), before)


def test_it_stops_without_clipping_too(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, 4, max_grad_norm=0.0)
    before = weights(trainer)
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(StageError, match="the gradient norm is"):
        train(trainer, tmp_path, 4, make_step)
    assert same(weights(trainer), before)


@pytest.mark.contract(number=14)
def test_a_trainable_weight_that_gets_no_gradient_stops_the_first_step(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, 4)
    before = weights(trainer)
    trainer.model.model.layers[0].forgotten = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(StageError, match=r"model.layers.0.forgotten is trainable and got no gradient"):
        train(trainer, tmp_path, 4, make_step, on_first_gradient=assert_gradients)
    assert same(before, weights(trainer))


def test_gradients_are_looked_at_once() -> None:
    model = make_model()
    with pytest.raises(StageError, match="got no gradient"):
        assert_gradients(model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with pytest.raises(StageError, match="every gradient is zero"):
        assert_gradients(model)
    model.model.norm.weight.grad += 1
    assert_gradients(model)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(StageError, match="every gradient is zero"):
        assert_gradients(model)  # frozen weights do not count


def test_what_trains_is_counted_and_is_fp32() -> None:
    model = make_model()
    total = sum(param.numel() for param in model.parameters())
    assert assert_trainable(model, "sft") == (total, total)
    model.requires_grad_(False)
    with pytest.raises(StageError, match="no parameter is trainable"):
        assert_trainable(model, "sft")
    model.model.norm.requires_grad_(True)
    assert assert_trainable(model, "sft") == (64, total)
    model.to(torch.bfloat16)
    with pytest.raises(StageError, match=r"model.norm.weight would be trained in torch.bfloat16"):
        assert_trainable(model, "sft")


def test_a_request_to_stop_keeps_the_last_step(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, 6)
    with pytest.raises(Interrupted, match="step 1 of 6"):
        train(trainer, tmp_path, 6, make_step, should_stop=lambda: True)
    assert checkpoint_steps(tmp_path / "checkpoints") == [1]
    assert sorted(path.name for path in (tmp_path / "checkpoints/checkpoint-1").iterdir()) == [
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trainable.safetensors",
        "trainer_state.json",
    ]


def test_a_request_to_stop_at_the_last_step_comes_too_late(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, 3)
    done = train(trainer, tmp_path, 3, make_step, should_stop=lambda: trainer.state.global_step == 3)
    assert (done.steps, done.resumed_from) == (3, 0)


@pytest.mark.parametrize("fields", [{"logging_steps": 10}, {"logging_strategy": "no"}])
def test_a_run_shorter_than_its_logging_has_its_losses(tmp_path: Path, fields: dict[str, Any]) -> None:
    done = train(trainer_for(tmp_path, 3, **fields), tmp_path, 3, make_step)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 3]
    assert done.first_loss is not None
    assert done.last_loss is not None


def test_events_and_snapshots_follow_the_steps(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    kept: list[tuple[int, int]] = []
    trainer = trainer_for(tmp_path, 5)
    train(
        trainer,
        tmp_path,
        5,
        make_step,
        events=lambda name, **fields: events.append({"event": name, **fields}),
        snapshots=frozenset({0, 2, 5}),
        save_snapshot=lambda step: kept.append((step, trainer.state.global_step)),
    )
    assert kept == [(0, 0), (2, 2), (5, 5)]
    assert [(event["event"], event["step"], event["total"]) for event in events] == [
        ("step", step, 5) for step in range(1, 6)
    ]
    for number, event in enumerate(events):
        rows = ROWS[4 * number : 4 * number + 4]
        assert event["rows"] == 4
        assert event["tokens"] == sum(map(len, rows))
        assert event["supervised_tokens"] == sum(row.supervised for row in rows)
        assert event["tokens_per_second"] > 0
        json.dumps(event)
    assert {"loss", "grad_norm", "learning_rate"} <= events[0].keys()
    assert "epoch" not in events[0]
