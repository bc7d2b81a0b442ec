"""Resume checkpoints: complete under their name or not there, and only ever loaded into the same model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from posttrain.errors import CheckpointError
from posttrain.pretraining.checkpoint import (
    WEIGHTS,
    checkpoint_steps,
    last_checkpoint,
    load_trainable,
    save_trainable,
    write_checkpoint,
)


def fill(folder: Path) -> None:
    (folder / "weights").write_text("whole")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_found_by_number_and_not_by_name(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        write_checkpoint(tmp_path, step, keep=None, fill=fill)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert checkpoint_steps(tmp_path) == [2, 9, 10]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize(("keep", "left"), [(None, [1, 2, 3, 4]), (1, [4]), (2, [3, 4]), (9, [1, 2, 3, 4])])
def test_the_oldest_go(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step, keep, fill)
    assert checkpoint_steps(tmp_path) == left
    assert names(tmp_path) == [f"checkpoint-{step}" for step in left]


@pytest.mark.contract(number=1)
def test_one_that_was_interrupted_is_never_resumed_from(tmp_path: Path) -> None:
    def killed(folder: Path) -> None:
        (folder / "weights").write_text("ha")
        raise KeyboardInterrupt

    write_checkpoint(tmp_path, 1, 2, fill)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 2, 2, killed)
    assert checkpoint_steps(tmp_path) == [1]
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert names(tmp_path) == ["checkpoint-1"]  # the half-written one is gone
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path, 2, 2, killed)
    write_checkpoint(tmp_path, 2, 2, fill)  # over the leftovers
    assert (tmp_path / "checkpoint-2" / "weights").read_text() == "whole"


@pytest.mark.contract(number=1)
def test_a_kill_while_an_old_one_is_removed_leaves_no_half_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path) -> None:
        (Path(folder) / "weights").unlink()
        raise KeyboardInterrupt

    write_checkpoint(tmp_path, 1, 1, fill)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(tmp_path, 2, 1, fill)
    assert all((tmp_path / f"checkpoint-{step}" / "weights").exists() for step in checkpoint_steps(tmp_path))
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-2"]


def test_the_same_step_is_written_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, None, fill)
    write_checkpoint(tmp_path, 1, None, lambda folder: pytest.fail("written again"))


def model(dtype: torch.dtype = torch.float32, width: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Linear(width, 2, dtype=dtype))
    made[0].bias.requires_grad_(False)
    return made


def test_only_what_trains_is_saved_and_comes_back_in_its_own_dtype(tmp_path: Path) -> None:
    trained = model(torch.bfloat16)
    with torch.no_grad():
        for param in trained.parameters():
            param.add_(1)
    save_trainable(trained, tmp_path)
    fresh = model(torch.bfloat16)
    places = [param.data_ptr() for param in fresh.parameters()]
    load_trainable(fresh, tmp_path)
    for (name, param), want in zip(fresh.named_parameters(), trained.parameters(), strict=True):
        assert param.dtype == want.dtype
        assert torch.equal(param, want) != (name == "0.bias")
    assert places == [param.data_ptr() for param in fresh.parameters()]  # an optimizer holds them


def test_tied_weights_are_saved_once(tmp_path: Path) -> None:
    tied = model(width=2)
    tied[1].weight = tied[0].weight
    save_trainable(tied, tmp_path)
    load_trainable(tied, tmp_path)


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (lambda: model(width=4), r"0.weight is \[3, 2\] torch.float32, the model has \[4, 2\] torch.float32"),
        (lambda: model(torch.float16), r"1.weight is .* torch.float32, the model has .* torch.float16"),
        (lambda: model().requires_grad_(True), r"its parameters are not the model's \(first: 0.bias\)"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, other, found: str) -> None:
    save_trainable(model(), tmp_path)
    assert (tmp_path / WEIGHTS).is_file()
    with pytest.raises(CheckpointError, match=found):
        load_trainable(other(), tmp_path)
