"""SFT on packed rows: the loss and gradients of each document alone, however a step is cut."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import posttrain.training.sft as sft
from posttrain.pretraining.rows import IGNORE, Row, make_row
from posttrain.training.sft import build_sft_trainer, sft_step
from tests.training.spine_tiny import (
    PAD,
    arguments,
    largest_difference,
    make_mixture,
    make_model,
    make_rows,
    make_tokenizer,
    score,
    wrap,
)

CUTS = [
    {"row_tokens": 4096, "tokens": 4096, "documents": None},  # everything in one packed row
    {"row_tokens": 40, "tokens": 4096, "documents": None},  # several rows in one piece
    {"row_tokens": 40, "tokens": 90, "documents": 3},
    {"row_tokens": 1, "tokens": 1, "documents": 1},  # every document alone
]


def alone(model: torch.nn.Module, rows: list[Row]) -> tuple[float, dict[str, torch.Tensor]]:
    """The definition: each document by itself, unpadded; the mean over all supervised tokens."""
    model.zero_grad()
    total = torch.zeros(())
    for row in rows:
        logits = model(input_ids=torch.from_numpy(row.ids).long()[None], use_cache=False).logits[0]
        labels = torch.from_numpy(row.labels).long()
        total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
    loss = total / sum(row.supervised for row in rows)
    loss.backward()
    found = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
    model.zero_grad()
    return loss.item(), found


@pytest.mark.contract(number=8)
@pytest.mark.parametrize("tie", [True, False])
def test_packed_is_unpacked_however_the_step_is_cut(tmp_path: Path, tie: bool) -> None:
    rows = [*make_rows(12), make_row([5], [5]), make_row([5, 6], [5, 6])]
    trainer = build_sft_trainer(make_model(tie=tie), make_tokenizer(), arguments(tmp_path, 1))
    loss, gradients = alone(trainer.model, rows)
    for cut in CUTS:
        step = sft_step(rows, PAD, **cut)
        ours = score(trainer, step)
        assert ours[0] == pytest.approx(loss, rel=1e-5)
        assert largest_difference(ours[1], gradients) < 1e-5
        assert sum(piece.share for piece in step.pieces) == pytest.approx(1)
        assert (step.rows, step.tokens) == (len(rows), sum(map(len, rows)))
        assert step.supervised == sum(row.supervised for row in rows)
    assert len(step.pieces) == len(rows)


def test_wrapped_rows_are_their_documents_cut_apart(tmp_path: Path) -> None:
    documents = make_rows(9)
    rows, _ = wrap(documents, 16)
    parts = []
    for row in rows:
        starts = [*np.flatnonzero(row.positions == 0), len(row)]
        parts += [make_row(row.ids[a:b], row.labels[a:b]) for a, b in pairwise(starts)]
    trainer = build_sft_trainer(make_model(), make_tokenizer(), arguments(tmp_path, 1))
    loss, gradients = alone(trainer.model, parts)
    ours = score(trainer, sft_step(rows, PAD, 32, 64, None))
    assert ours[0] == pytest.approx(loss, rel=1e-5)
    assert largest_difference(ours[1], gradients) < 1e-5


def test_an_adapter_learns_the_same_packed_and_unpacked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make_model(), config)
    trainer = build_sft_trainer(model, make_tokenizer(), arguments(tmp_path, 1))
    rows = make_rows(10)
    loss, gradients = alone(model, rows)
    ours = score(trainer, sft_step(rows, PAD, 64, 128, None))
    assert ours[0] == pytest.approx(loss, rel=1e-5)
    assert largest_difference(ours[1], gradients) < 1e-5


def running_positions(batch: dict[str, np.ndarray]) -> None:
    batch["position_ids"][:] = np.arange(batch["position_ids"].shape[1])


def with_mask(batch: dict[str, np.ndarray]) -> None:
    batch["attention_mask"] = np.ones_like(batch["input_ids"])


@pytest.mark.parametrize("leak", [running_positions, with_mask])
def test_a_leak_between_documents_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leak) -> None:
    def leaking(rows: list[list[Row]], pad_id: int) -> dict[str, np.ndarray]:
        batch = original(rows, pad_id)
        leak(batch)
        return batch

    original, rows = sft.stack, make_rows(12)
    trainer = build_sft_trainer(make_model(), make_tokenizer(), arguments(tmp_path, 1))
    loss, gradients = alone(trainer.model, rows)
    monkeypatch.setattr(sft, "stack", leaking)
    ours = score(trainer, sft_step(rows, PAD, 4096, 4096, None))
    assert abs(ours[0] / loss - 1) > 1e-4
    assert largest_difference(ours[1], gradients) > 1e-3


def test_a_step_without_any_label_costs_nothing(tmp_path: Path) -> None:
    # The last row of a wrapped stream may be one token, which nothing predicts.
    trainer = build_sft_trainer(make_model(), make_tokenizer(), arguments(tmp_path, 1))
    loss, gradients = score(trainer, sft_step([make_row([7], [7])], PAD, 16, 16, None))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())


def test_a_routers_loss_counts_once_however_the_step_is_cut(tmp_path: Path) -> None:
    trainer = build_sft_trainer(make_mixture(), make_tokenizer(), arguments(tmp_path, 1))
    assert trainer.aux_loss_enabled
    rows = make_rows(12)
    whole, cut = (score(trainer, sft_step(rows, PAD, 64, tokens, None))[0] for tokens in (4096, 64))
    assert cut == pytest.approx(whole, rel=0.05)  # near, not equal: the balance of a piece is not the step's


def test_offloading_of_activations_is_not_skipped(tmp_path: Path) -> None:
    entered: list[str] = []

    class Context:
        def __enter__(self) -> None:
            entered.append("in")

        def __exit__(self, *_: object) -> None:
            entered.append("out")

    trainer = build_sft_trainer(make_model(), make_tokenizer(), arguments(tmp_path, 1))
    trainer.maybe_activation_offload_context = Context()
    score(trainer, sft_step(make_rows(3), PAD, 64, 64, None))
    assert entered == ["in", "out"]
