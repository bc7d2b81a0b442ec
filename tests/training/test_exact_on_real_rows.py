"""Packed and prefix-shared training on real rows, against TRL's own padded path: losses, rewards, gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from posttrain.models.packed_attention import PACKED
from posttrain.training.dpo import SpineDpoTrainer, dpo_step
from posttrain.training.limits import Limits, piece_limits
from posttrain.training.packed_view import MaskMaker
from posttrain.training.pairs import Pair
from posttrain.training.reference import reference_logps
from posttrain.training.sft import build_sft_trainer, sft_pieces
from posttrain.training.shared_mask import MASKS, bool_mask
from tests.training.real_rows import MAX_LENGTH, real_pairs, real_rows
from tests.training.spine_tiny import PAD, arguments, make_model, make_tokenizer, score
from tests.training.test_dpo_losses import LOSS_TYPES, trainer_for, trl_score

WHOLE = Limits(tokens=99999, documents=None, row_tokens=256)
CUT = Limits(tokens=400, documents=None, row_tokens=256)
LAYOUTS: dict[str, tuple[str, MaskMaker | None]] = {
    "packed": ("sdpa", None),
    "packed, by document": (PACKED, None),
    "shared": ("sdpa", bool_mask),
    "shared, by document": (PACKED, MASKS[PACKED]),
}


@pytest.fixture(scope="module")
def pairs(shared_dir: Path) -> list[Pair]:
    found = real_pairs(shared_dir, 8)
    assert max(pair.longest for pair in found) == MAX_LENGTH
    assert len({len(pair.chosen) for pair in found}) > 5
    assert sum(pair.shared for pair in found) > 0.2 * sum(pair.tokens for pair in found)
    return found


def of_trl(
    folder: Path, pairs: list[Pair], **fields: Any
) -> tuple[float, dict[str, torch.Tensor], dict[str, list[float]]]:
    """Loss, gradients and logged figures of TRL alone, with its own head and its own reference model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.training.dpo.use_plain_head", lambda *_, **__: False)
        reference = trainer_for(make_model(1), folder, **fields).model
        trainer = trainer_for(make_model(0), folder, **fields)
        loss, gradients = trl_score(trainer, reference, pairs)
    return loss, gradients, dict(trainer._metrics["train"])


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients, relative to the norm of theirs."""
    assert ours.keys() == theirs.keys()
    apart = torch.stack([(ours[name] - theirs[name]).norm() for name in ours]).norm()
    return (apart / torch.stack([gradient.norm() for gradient in theirs.values()]).norm()).item()


def in_layout(name: str, folder: Path, seed: int, **fields: Any) -> SpineDpoTrainer:
    attention, mask = LAYOUTS[name]
    model = make_model(seed)
    model.set_attn_implementation(attention)
    trainer = trainer_for(model, folder, **fields)
    trainer.mask = mask
    trainer.row_tokens = piece_limits("cpu", None, None, attention).packed_row
    return trainer


def references_of(name: str, folder: Path, pairs: list[Pair], **fields: Any) -> torch.Tensor:
    trainer, cache = in_layout(name, folder, 1, **fields), folder / f"{name}.npy"
    return reference_logps(trainer, pairs, PAD, CUT, cache, lambda *_, **__: None, lambda: False)


def limit_of(trainer: SpineDpoTrainer, pairs: list[Pair], references: torch.Tensor, loss_type: str) -> float:
    """1e-5; or, where one unit in the last place of the log-probs moves gradients by more, three times that.

    A sequence's log-prob is a sum of hundreds, which fp32 holds to some 3e-5. DiscoPOP divides by a temperature
    of 0.05 what is made of it: its gradients are known to no more than that.
    """

    def gradients(known: torch.Tensor) -> dict[str, torch.Tensor]:
        return score(trainer, dpo_step(pairs, known, PAD, WHOLE.tokens, None, [loss_type], trainer.shares))[1]

    toward = torch.tensor([0.0, -1e9])
    moved = difference(gradients(torch.nextafter(references, toward)), gradients(references))
    trainer._metrics["train"].clear()
    return 1e-5 if moved <= 1e-5 else 3 * moved


@pytest.mark.contract(number=8)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_reward_and_gradient_is_trls(tmp_path: Path, pairs: list[Pair], loss_type: str) -> None:
    fields = {"loss_type": [loss_type], "beta": 0.1}
    loss, gradients, figures = of_trl(tmp_path, pairs, **fields)
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"} <= set(
        figures
    )
    for name in LAYOUTS:
        references = references_of(name, tmp_path, pairs, **fields)
        trainer = in_layout(name, tmp_path, 0, **fields)
        limit = limit_of(trainer, pairs, references, loss_type)
        assert limit == 1e-5 or loss_type in ("discopop", "sppo_hard")
        for limits in (WHOLE, CUT):
            step = dpo_step(pairs, references, PAD, limits.tokens, None, [loss_type], trainer.shares)
            ours = score(trainer, step)
            assert ours[0] == pytest.approx(loss, rel=1e-5), (name, limits)
            assert difference(ours[1], gradients) < limit, (name, limits)
            if len(step.pieces) == 1:
                for key in figures.keys() - {"num_tokens"}:
                    assert trainer._metrics["train"][key][-1] == pytest.approx(figures[key][-1], rel=1e-5, abs=1e-6), (
                        key
                    )
            trainer._metrics["train"].clear()


@pytest.mark.parametrize("fields", [{"ld_alpha": 0.5}, {"use_weighting": True}], ids=["ld_alpha", "wpo"])
def test_what_reads_single_tokens_works_on_shared_ones(
    tmp_path: Path, pairs: list[Pair], fields: dict[str, Any]
) -> None:
    loss, gradients, _ = of_trl(tmp_path, pairs, **fields)
    for name in LAYOUTS:
        references = references_of(name, tmp_path, pairs, **fields)
        trainer = in_layout(name, tmp_path, 0, **fields)
        ours = score(trainer, dpo_step(pairs, references, PAD, CUT.tokens, None, ["sigmoid"], trainer.shares))
        assert ours[0] == pytest.approx(loss, rel=1e-5), name
        assert difference(ours[1], gradients) < 1e-5, name


def sees_the_other_branch(documents: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    return bool_mask(documents, torch.zeros_like(branches))


def sees_the_other_documents(documents: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    return bool_mask(torch.zeros_like(documents), branches)


def sees_everything(documents: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(bool_mask(documents, branches))


def all_ones_mask(trainer: SpineDpoTrainer) -> None:
    """What a caller gets wrong: a mask given and the cache on, so that position ids count for nothing."""
    forward = trainer.model.forward

    def leaking(input_ids: torch.Tensor, **rest: Any) -> Any:
        rest |= {"attention_mask": torch.ones_like(input_ids), "use_cache": True}
        return forward(input_ids=input_ids, **rest)

    trainer.model.forward = leaking


def with_mask(mask: MaskMaker) -> Callable[[SpineDpoTrainer], None]:
    def set_it(trainer: SpineDpoTrainer) -> None:
        trainer.mask = mask

    return set_it


@pytest.mark.parametrize(
    "leak",
    [all_ones_mask, *(with_mask(mask) for mask in (sees_the_other_branch, sees_the_other_documents, sees_everything))],
    ids=["all ones, cache on", "branches", "documents", "everything"],
)
def test_a_leak_is_seen_by_these_very_comparisons(
    tmp_path: Path, pairs: list[Pair], leak: Callable[[SpineDpoTrainer], None]
) -> None:
    loss, gradients, _ = of_trl(tmp_path, pairs)
    references = references_of("shared", tmp_path, pairs)
    trainer = in_layout("packed" if leak is all_ones_mask else "shared", tmp_path, 0)
    leak(trainer)
    ours = score(trainer, dpo_step(pairs, references, PAD, WHOLE.tokens, None, ["sigmoid"], trainer.shares))
    assert abs(ours[0] / loss - 1) > 1e-3
    assert difference(ours[1], gradients) > 1e-3


@pytest.mark.contract(number=8)
@pytest.mark.parametrize("attention", ["sdpa", "eager", PACKED])
def test_sft_is_trls_own_padded_step(tmp_path: Path, shared_dir: Path, attention: str) -> None:
    rows = real_rows(shared_dir, 16)
    assert max(map(len, rows)) == MAX_LENGTH
    assert len({len(row) for row in rows}) > 5
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.training.sft.use_plain_head", lambda *_, **__: False)
        theirs = build_sft_trainer(make_model(), make_tokenizer(), arguments(tmp_path, 1))
    collate = DataCollatorForLanguageModeling(pad_token_id=PAD)
    batch = collate([{"input_ids": row.ids.tolist(), "labels": row.labels.tolist()} for row in rows])
    assert "attention_mask" in batch
    expected = SFTTrainer.compute_loss(theirs, theirs.model.train(), dict(batch))
    expected.backward()
    gradients = {name: param.grad.clone() for name, param in theirs.model.named_parameters()}

    model = copy.deepcopy(make_model())
    model.set_attn_implementation(attention)
    trainer = build_sft_trainer(model, make_tokenizer(), arguments(tmp_path, 1))
    for tokens in (None, 300):
        ours = score(trainer, sft_pieces(rows, PAD, piece_limits("cpu", tokens, None, attention)))
        assert ours[0] == pytest.approx(expected.item(), rel=1e-5)
        assert difference(ours[1], gradients) < 1e-5
