"""A step divided over processes: every row once, and together the loss and gradients of one process.

The parts of all processes run one after the other in this one, in fp64, where rounding hides nothing; what they leave
is added up, as the processes do through their averages. What only real ones can show: `test_ranks_prove.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.pretraining.loop import Step
from posttrain.pretraining.ranks import Rank
from posttrain.pretraining.rows import Row
from posttrain.training.dpo import COUPLED, SpineDpoTrainer, dpo_step
from posttrain.training.pairs import Pair
from posttrain.training.sft import SpineSftTrainer, build_sft_trainer, sft_step
from posttrain.training.shared_mask import MASKS
from tests.training.spine_tiny import (
    PAD,
    arguments,
    largest_difference,
    make_mixture,
    make_model,
    make_pairs,
    make_rows,
    make_tokenizer,
    score,
)
from tests.training.test_dpo_losses import trainer_for

WORLDS = (2, 3, 8)
SFT_CUTS = [
    {"row_tokens": 4096, "tokens": 4096, "documents": None},
    {"row_tokens": 40, "tokens": 60, "documents": 3},
    {"row_tokens": 40, "tokens": 4096, "documents": 2},
    {"row_tokens": 30, "tokens": 30, "documents": None, "one_row": True},
]
DPO_CUTS = [(9999, None), (70, 3), (9999, 2)]
Parts = list[Step]


def sft_parts(rows: list[Row], world: int, **cut: int | bool | None) -> Parts:
    return [sft_step(rows, PAD, **cut, rank=Rank(index, world)) for index in range(world)]  # type: ignore[arg-type]


def dpo_parts(
    pairs: list[Pair], references: torch.Tensor, world: int, cut: tuple[int, int | None], share: bool, *losses: str
) -> Parts:
    made = (
        dpo_step(pairs, references, PAD, *cut, list(losses or ["sigmoid"]), share, Rank(index, world))
        for index in range(world)
    )
    return list(made)


def documents(parts: Parts) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(ids, labels) of every document in the pieces that count; the tail of a row is padding."""
    for piece in (piece for part in parts for piece in part.pieces if not piece.idle):
        tensors = (piece.tensors[name].numpy() for name in ("input_ids", "labels", "position_ids"))
        for ids, labels, positions in zip(*tensors, strict=True):
            starts = [*np.flatnonzero(positions == 0), len(ids)]
            for begin, end in pairwise(starts):
                if ids[begin] != PAD:
                    yield tuple(ids[begin:end].tolist()), tuple(labels[begin:end].tolist())


def answered(parts: Parts) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], float, float]]:
    """(chosen, rejected, their reference log-probs) of every pair in the pieces that count."""
    for piece in (piece for part in parts for piece in part.pieces if not piece.idle):
        ids, real = piece.tensors["input_ids"], piece.tensors["attention_mask"].bool()
        sequences = [tuple(row[mask].tolist()) for row, mask in zip(ids, real, strict=True)]
        half = len(sequences) // 2
        known = (piece.tensors[f"ref_{name}_logps"].tolist() for name in ("chosen", "rejected"))
        yield from zip(sequences[:half], sequences[half:], *known, strict=True)


def check_counts(parts: Parts, whole: Step) -> None:
    """What every process must know alike, or all would wait for one of them."""
    assert len({len(part.pieces) for part in parts}) == 1
    assert sum(piece.share for part in parts for piece in part.pieces) == pytest.approx(1)
    for part in parts:
        assert (part.rows, part.tokens, part.supervised) == (whole.rows, whole.tokens, whole.supervised)
        assert part.forwards == sum(not piece.idle for other in parts for piece in other.pieces)
        assert all(piece.share == 0 for piece in part.pieces if piece.idle)
        assert [piece.idle for piece in part.pieces] == sorted(piece.idle for piece in part.pieces)  # idle ones last


@given(
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(1, 99),
    st.integers(1, 200),
    st.none() | st.integers(1, 4),
    st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_all_processes_together_hold_every_row_once(
    count: int, world: int, row_tokens: int, tokens: int, most: int | None, one_row: bool
) -> None:
    rows = make_rows(count, seed=count)
    cut = {"row_tokens": row_tokens, "tokens": tokens, "documents": most, "one_row": one_row}
    parts = sft_parts(rows, world, **cut)
    given_rows = Counter((tuple(row.ids.tolist()), tuple(row.labels.tolist())) for row in rows)
    assert Counter(documents(parts)) == given_rows
    check_counts(parts, sft_step(rows, PAD, **cut))  # type: ignore[arg-type]
    held = [len(list(documents([part]))) for part in parts]
    assert min(held) > 0 or max(held) == 1


@given(st.integers(2, 16), st.integers(1, 9), st.integers(1, 200), st.none() | st.integers(1, 4), st.booleans())
@settings(deadline=None, max_examples=80)
def test_all_processes_together_hold_every_pair_once(
    count: int, world: int, tokens: int, most: int | None, share: bool
) -> None:
    pairs, references = make_pairs(count, seed=count), torch.arange(2.0 * count).view(count, 2)
    parts = dpo_parts(pairs, references, world, (tokens, most), share)
    spelled = [
        (*((*pair.prompt.tolist(), *answer.tolist()) for answer in (pair.chosen, pair.rejected)), *known)
        for pair, known in zip(pairs, references.tolist(), strict=True)
    ]
    assert Counter(answered(parts)) == Counter(spelled)
    check_counts(parts, dpo_step(pairs, references, PAD, tokens, most, ["sigmoid"], share))
    for piece in (piece for part in parts for piece in part.pieces):
        assert most is None or len(piece.tensors["input_ids"]) <= 2 * most


@pytest.mark.parametrize("loss_type", sorted(COUPLED))
def test_pairs_that_act_on_one_another_stay_with_the_first_process(loss_type: str) -> None:
    pairs, references = make_pairs(7), torch.zeros(7, 2)
    parts = dpo_parts(pairs, references, 3, (20, 1), False, "sigmoid", loss_type)
    check_counts(parts, dpo_step(pairs, references, PAD, 20, 1, ["sigmoid", loss_type]))
    assert [len(list(answered([part]))) for part in parts] == [7, 0, 0]
    assert parts[0].pieces[0].share == 1


@pytest.fixture(scope="module")
def sft_trainer(tmp_path_factory: pytest.TempPathFactory) -> SpineSftTrainer:
    folder = tmp_path_factory.mktemp("sft")
    return build_sft_trainer(make_model().double(), make_tokenizer(), arguments(folder, 1))


@pytest.fixture(scope="module")
def dpo_trainers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SpineDpoTrainer]:
    """Loss types -> a trainer, each built once."""
    made: dict[tuple[str, ...], SpineDpoTrainer] = {}

    def trainer(*losses: str) -> SpineDpoTrainer:
        if losses not in made:
            made[losses] = trainer_for(make_model().double(), tmp_path_factory.mktemp("dpo"), loss_type=list(losses))
        made[losses].mask = None
        return made[losses]

    return trainer


def add_up(trainer: SpineSftTrainer | SpineDpoTrainer, parts: Parts) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of all parts together."""
    scores = [score(trainer, part) for part in parts]
    return sum(loss for loss, _ in scores), {name: sum(found[name] for _, found in scores) for name in scores[0][1]}


def check_sum(trainer: SpineSftTrainer | SpineDpoTrainer, parts: Parts, whole: Step) -> None:
    loss, gradients = score(trainer, whole)
    together = add_up(trainer, parts)
    assert together[0] == pytest.approx(loss, rel=1e-6)
    assert largest_difference(together[1], gradients) < 1e-9
    assert any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("cut", SFT_CUTS, ids=str)
def test_the_gradients_of_all_processes_add_up_to_one_processs(
    world: int, cut: dict[str, int], sft_trainer: SpineSftTrainer
) -> None:
    rows = make_rows(11)
    check_sum(sft_trainer, sft_parts(rows, world, **cut), sft_step(rows, PAD, **cut))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("cut", DPO_CUTS, ids=str)
@pytest.mark.parametrize("share", [False, True])
def test_the_gradients_of_pairs_add_up(
    world: int, cut: tuple[int, int | None], share: bool, dpo_trainers: Callable[..., SpineDpoTrainer]
) -> None:
    pairs, trainer = make_pairs(7), dpo_trainers("sigmoid")
    references = -20 + torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
    trainer.mask = MASKS["sdpa"] if share else None
    whole = dpo_step(pairs, references, PAD, *cut, ["sigmoid"], share)
    check_sum(trainer, dpo_parts(pairs, references, world, cut, share), whole)


@pytest.mark.parametrize("losses", [("ipo",), ("sigmoid", "sft"), ("aot",), ("aot_unpaired",)], ids="+".join)
def test_every_kind_of_loss_adds_up(losses: tuple[str, ...], dpo_trainers: Callable[..., SpineDpoTrainer]) -> None:
    pairs, references = make_pairs(6), -20 + torch.randn(6, 2, generator=torch.Generator().manual_seed(2))
    whole = dpo_step(pairs, references, PAD, 70, 2, list(losses))
    check_sum(dpo_trainers(*losses), dpo_parts(pairs, references, 3, (70, 2), False, *losses), whole)


def test_a_step_with_fewer_rows_than_processes(
    sft_trainer: SpineSftTrainer, dpo_trainers: Callable[..., SpineDpoTrainer]
) -> None:
    rows, pairs, references = make_rows(2), make_pairs(2), torch.full((2, 2), -20.0)
    parts = sft_parts(rows, 5, **SFT_CUTS[0])
    assert [part.pieces[0].idle for part in parts] == [False, False, True, True, True]
    check_sum(sft_trainer, parts, sft_step(rows, PAD, **SFT_CUTS[0]))
    of_pairs = dpo_parts(pairs, references, 5, (9999, None), False)
    assert sum(part.pieces[0].idle for part in of_pairs) == 3
    check_sum(dpo_trainers("sigmoid"), of_pairs, dpo_step(pairs, references, PAD, 9999, None, ["sigmoid"]))


def test_an_idle_piece_costs_a_forward_and_nothing_else(
    sft_trainer: SpineSftTrainer, dpo_trainers: Callable[..., SpineDpoTrainer]
) -> None:
    idle = [
        (sft_trainer, sft_parts(make_rows(1), 2, **SFT_CUTS[0])[1]),
        (dpo_trainers("sigmoid"), dpo_parts(make_pairs(1), torch.full((1, 2), -20.0), 2, (9999, None), False)[1]),
        (dpo_trainers("aot"), dpo_parts(make_pairs(3), torch.full((3, 2), -20.0), 2, (9999, None), False, "aot")[1]),
    ]
    for trainer, step in idle:
        assert [piece.idle for piece in step.pieces] == [True]
        loss, gradients = score(trainer, step)
        assert loss == 0
        assert {name for name, param in trainer.model.named_parameters() if param.requires_grad} == gradients.keys()
        assert not any(gradient.any() for gradient in gradients.values())


def test_a_routers_loss_is_that_of_all_forwards(tmp_path: Path) -> None:
    trainer = build_sft_trainer(make_mixture(), make_tokenizer(), arguments(tmp_path, 1))
    assert trainer.aux_loss_enabled
    rows, cut = make_rows(12), {"row_tokens": 64, "tokens": 64, "documents": None}
    alone = score(trainer, sft_step(rows, PAD, **cut))[0]
    for world in (2, 5):
        assert add_up(trainer, sft_parts(rows, world, **cut))[0] == pytest.approx(alone, rel=0.05)  # a piece's balance
    loss, gradients = score(trainer, sft_parts(rows[:1], 2, **cut)[1])
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients.values())
