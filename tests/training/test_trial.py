"""Before the first step: the heaviest piece, smaller ones after a lack of memory, and no trace of it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.errors import StageError
from posttrain.models.packed_attention import PACKED
from posttrain.pretraining.loop import Step
from posttrain.training.limits import Limits, piece_limits
from posttrain.training.memory import measured_peak
from posttrain.training.sft import SpineSftTrainer, build_sft_trainer, sft_pieces
from posttrain.training.trial import try_limits
from tests.training.spine_tiny import PAD, arguments, make_model, make_rows, make_tokenizer, score, train

ROWS = make_rows(24, longest=40)
LONGEST = max(map(len, ROWS))
LIMITS = Limits(tokens=512, documents=None, row_tokens=64)


def trainer_in(folder: Path, **model: Any) -> SpineSftTrainer:
    return build_sft_trainer(make_model(**model), make_tokenizer(), arguments(folder, 3))


def heaviest(limits: Limits) -> Step:
    return sft_pieces(ROWS, PAD, limits)


def short_of_memory(trainer: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets pieces of more than `most` tokens run out of memory in their backward; returns what was tried."""
    tried: list[int] = []
    inner = trainer.piece_loss

    def piece_loss(model: Any, tensors: dict, share: float, step: Step) -> torch.Tensor:
        tried.append(tensors["input_ids"].numel())
        loss = inner(model, tensors, share, step)
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    monkeypatch.setattr(trainer, "piece_loss", piece_loss)
    return tried


def test_what_fits_at_once_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_in(tmp_path)
    tried = short_of_memory(trainer, 10**9, monkeypatch)
    found = try_limits(trainer, LIMITS, heaviest, LONGEST, 1000, lambda *_, **__: pytest.fail("said something"))
    assert (found.limits, found.refused) == (LIMITS, [])
    assert max(tried) == max(piece.tensors["input_ids"].numel() for piece in heaviest(LIMITS).pieces)


def test_smaller_pieces_are_tried_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_in(tmp_path)
    short_of_memory(trainer, 130, monkeypatch)
    said: list[str] = []
    found = try_limits(trainer, LIMITS, heaviest, LONGEST, 1000, lambda _, text: said.append(text))
    assert found.refused == [512, 256]
    assert (found.limits.tokens, found.limits.row_tokens) == (128, 64)
    assert said[0] == "out of memory with 512 tokens in a piece; trying 256"


def test_when_one_row_is_too_much_it_says_what_would_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_in(tmp_path)
    tried = short_of_memory(trainer, 0, monkeypatch)
    with pytest.raises(StageError, match=f"one row or pair of {LONGEST} tokens does not fit") as raised:
        try_limits(trainer, LIMITS, heaviest, LONGEST, 1000, lambda *_, **__: None)
    assert "gradient_checkpointing" in raised.value.todo
    assert min(tried) <= 64
    assert all(param.grad is None for param in trainer.model.parameters())


def test_the_optimizers_room_is_part_of_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_in(tmp_path)
    asked: list[int] = []
    original = torch.empty

    def empty(*size: Any, **more: Any) -> torch.Tensor:
        if more.get("dtype") == torch.uint8:
            asked.append(size[0])
        return original(*size, **more)

    monkeypatch.setattr(torch, "empty", empty)
    try_limits(trainer, LIMITS, heaviest, LONGEST, 12345, lambda *_, **__: None)
    assert 12345 in asked


def test_training_is_as_if_it_had_not_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: Path, trial: bool) -> tuple[dict[str, torch.Tensor], str]:
        folder.mkdir()
        trainer = trainer_in(folder, attention_dropout=0.2)
        torch.manual_seed(3)
        if trial:
            short_of_memory(trainer, 130, monkeypatch)
            try_limits(trainer, LIMITS, heaviest, LONGEST, 1000, lambda *_, **__: None)
            monkeypatch.undo()
            assert not trainer._metrics["train"]
            assert trainer._total_train_tokens == 0
        train(trainer, folder, 3, lambda step: sft_pieces(ROWS[8 * step : 8 * step + 8], PAD, LIMITS))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        figures = [line.split(', "tokens"')[0] for line in lines]
        return trainer.model.state_dict(), "\n".join(figures)

    plain, tried = run(tmp_path / "plain", False), run(tmp_path / "tried", True)
    assert plain[1] == tried[1]
    assert all(torch.equal(plain[0][name], tried[0][name]) for name in plain[0])


def test_pieces_of_any_size_are_the_same_step(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    whole = score(trainer, heaviest(LIMITS))[0]
    smaller = LIMITS
    while (halved := smaller.halved(LONGEST)) is not None:
        smaller = halved
        assert score(trainer, heaviest(smaller))[0] == pytest.approx(whole, rel=1e-6)
    assert smaller.tokens == LONGEST


def test_rows_are_short_under_a_dense_mask_and_one_otherwise() -> None:
    assert piece_limits("cpu", None, None) == Limits(2048, None, 256)
    assert piece_limits("cpu", 100, 3) == Limits(100, 3, 100)
    assert piece_limits("cuda", 8192, None, "sdpa").row_tokens == 2048
    for backend in ("flash_attention_2", "flash_attention_3", "flex_attention", PACKED):
        limits = piece_limits("cuda", 8192, None, backend)
        assert (limits.row_tokens, limits.one_row) == (8192, True)
        step = sft_pieces(ROWS, PAD, Limits(128, 2, 128, one_row=True))
        assert all(piece.tensors["input_ids"].shape[0] == 1 for piece in step.pieces)
    asked = []
    assert piece_limits("cuda", None, None, "sdpa", lambda row: asked.append(row) or 4096).tokens == 4096
    assert piece_limits("cuda", None, None, "flex_attention", lambda row: asked.append(row) or 99999).tokens == 16384
    assert asked == [2048, None]
    assert piece_limits("cuda", 512, None, "sdpa", lambda row: 4096).tokens == 512
    assert piece_limits("cpu", None, None, "sdpa", lambda row: 4).tokens == 2048


def test_the_measured_peak_is_this_processs() -> None:
    before = measured_peak("cpu")["measured_bytes"]
    block = torch.ones(16 << 20)
    assert measured_peak("cpu")["measured_bytes"] >= max(before, block.nbytes)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_piece_computes_in_the_precision_of_the_recipe_before_the_trainer_prepares_the_model(
    tmp_path: Path, precision: str
) -> None:
    given = {**arguments(tmp_path, 3), "bf16": precision == "bf16"}
    trainer = build_sft_trainer(make_model(), make_tokenizer(), given)
    dtypes: list[torch.dtype] = []
    layer = trainer.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    try_limits(trainer, LIMITS, heaviest, LONGEST, 1000, lambda *_, **__: None)
    assert set(dtypes) == {torch.bfloat16 if precision == "bf16" else torch.float32}
