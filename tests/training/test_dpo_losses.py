"""DPO: every loss type of TRL, packed and cut by us, against TRL's own code on its own padded batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from posttrain.certify.reference import loss_at_zero
from posttrain.errors import StageError
from posttrain.training.dpo import COUPLED, SpineDpoTrainer, build_dpo_trainer, dpo_step
from posttrain.training.limits import Limits
from posttrain.training.packed_view import PackedView
from posttrain.training.pairs import Pair, pad_pairs
from posttrain.training.reference import reference_key, reference_logps
from tests.training.spine_tiny import (
    PAD,
    arguments,
    largest_difference,
    make_model,
    make_pairs,
    make_tokenizer,
    score,
)

LOSS_TYPES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
PAIRS = make_pairs(10, empty_prompt=True)
LIMITS = Limits(tokens=70, documents=3, row_tokens=48)


def trainer_for(model: Any, folder: Path, **fields: Any) -> SpineDpoTrainer:
    given = {"beta": 0.3, "label_smoothing": 0.1, **fields}
    return build_dpo_trainer(model, make_tokenizer(), arguments(folder, 1, **given), LIMITS.row_tokens)


def own_references(trainer: SpineDpoTrainer, pairs: list[Pair], folder: Path) -> torch.Tensor:
    """Log-probs of the trainer's model as it stands, through the cache that a stage uses."""
    events: list[str] = []
    cache = folder / f"{id(trainer)}.npy"
    return reference_logps(trainer, pairs, PAD, LIMITS, cache, lambda name, **_: events.append(name), lambda: False)


def trl_score(trainer: SpineDpoTrainer, reference: Any, pairs: list[Pair]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by TRL alone: its collator, its padded forward, its live reference model."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, (p.prompt.tolist(), p.chosen.tolist(), p.rejected.tolist()), strict=True)) for p in pairs]
    batch = DataCollatorForPreference(pad_token_id=PAD)(rows)
    ours = trainer.ref_model
    trainer.ref_model, trainer.precompute_ref_logps = reference, False
    trainer.model.zero_grad()
    loss = DPOTrainer._compute_loss(trainer, trainer.model, batch, False)
    loss.backward()
    trainer.ref_model, trainer.precompute_ref_logps = ours, True
    found = {name: param.grad.clone() for name, param in trainer.model.named_parameters() if param.grad is not None}
    return loss.item(), found


def plain_trl(model: Any, before: Any, folder: Path, **fields: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a copy of `model` against `before`, with TRL's own fused head on both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("posttrain.training.dpo.use_plain_head", lambda *_, **__: False)
        reference = trainer_for(copy.deepcopy(before), folder, **fields).model
        return trl_score(trainer_for(copy.deepcopy(model), folder, **fields), reference, PAIRS)


def compare(folder: Path, model: Any, before: Any, **fields: Any) -> None:
    """Asserts that our step is TRL's, against the reference `before`, whole and cut into pieces."""
    loss, gradients = plain_trl(model, before, folder, **fields)
    references = own_references(trainer_for(before, folder, **fields), PAIRS, folder)
    trainer = trainer_for(model, folder, **fields)
    for tokens, most in ((9999, None), (LIMITS.tokens, LIMITS.documents)):
        step = dpo_step(PAIRS, references, PAD, tokens, most, list(trainer.loss_types))
        assert len(step.pieces) > 1 or most is None or COUPLED & set(trainer.loss_types)
        ours = score(trainer, step)
        assert ours[0] == pytest.approx(loss, rel=1e-5)
        assert largest_difference(ours[1], gradients) < 2e-5


def test_no_loss_type_of_trl_is_left_out() -> None:
    from posttrain.recipe.trainer_checks import allowed_values
    from posttrain.recipe.trainer_fields import read_fields

    assert sorted(allowed_values("dpo", read_fields("dpo")["loss_type"]) or []) == sorted(LOSS_TYPES)


@pytest.mark.contract(number=8)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_is_trls_own(tmp_path: Path, loss_type: str) -> None:
    compare(tmp_path, make_model(0), make_model(1), loss_type=[loss_type])


@pytest.mark.parametrize(
    "fields",
    [
        {"label_smoothing": 0.4, "loss_type": ["robust"]},
        {"ld_alpha": 0.5},
        {"ld_alpha": 0.0, "loss_type": ["ipo"]},
        {"f_divergence_type": "forward_kl"},
        {"f_divergence_type": "js_divergence", "loss_type": ["hinge"]},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.5},
        {"use_weighting": True},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]},
        {"loss_type": ["sigmoid", "bco_pair", "sft"]},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_settings_of_the_losses_are_trls_own(tmp_path: Path, fields: dict[str, Any]) -> None:
    compare(tmp_path, make_model(0, tie=False), make_model(1, tie=False), **fields)


def test_an_adapter_is_trained_as_by_trl(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make_model(), config)
    compare(tmp_path, model, make_model())


def test_only_the_coupled_losses_keep_a_step_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    near = own_references(trainer_for(make_model(0), tmp_path), PAIRS, tmp_path)
    references = near + 2 * torch.randn(near.shape, generator=torch.Generator().manual_seed(0))
    wrong_when_cut = set()
    for loss_type in LOSS_TYPES:
        trainer = trainer_for(make_model(0), tmp_path, loss_type=[loss_type])
        whole = score(trainer, dpo_step(PAIRS, references, PAD, 9999, None, [loss_type]))[0]
        with monkeypatch.context() as patch:
            patch.setattr("posttrain.training.dpo.COUPLED", frozenset())
            cut = score(trainer, dpo_step(PAIRS, references, PAD, 60, 2, [loss_type]))[0]
        if cut != pytest.approx(whole, rel=1e-4):
            wrong_when_cut.add(loss_type)
    assert wrong_when_cut == set(COUPLED)


@pytest.mark.contract(number=9)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_loss_before_training_is_the_one_at_ratio_zero(tmp_path: Path, loss_type: str) -> None:
    trainer = trainer_for(make_model(), tmp_path, loss_type=[loss_type])
    references = own_references(trainer, PAIRS, tmp_path)
    found = trainer.loss_before_training(dpo_step(PAIRS, references, PAD, 70, 3, [loss_type]))
    expected = loss_at_zero([loss_type], beta=0.3, label_smoothing=0.1)
    assert (expected is None) == (loss_type == "sft")
    if expected is not None:
        assert found == pytest.approx(expected, abs=1e-4)
    assert not trainer._metrics["train"]  # the first logged line is of the first step alone
    assert trainer._total_train_tokens == 0


def test_padding_is_as_trls_collator_does_it() -> None:
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, (p.prompt.tolist(), p.chosen.tolist(), p.rejected.tolist()), strict=True)) for p in PAIRS]
    theirs, ours = DataCollatorForPreference(pad_token_id=PAD)(rows), pad_pairs(PAIRS, PAD)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Leaking(PackedView):
    """A view that lets packed sequences see each other."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inner = self.model

        def forward(position_ids: torch.Tensor, **rest: Any) -> Any:
            return inner(position_ids=torch.arange(position_ids.size(1))[None].expand_as(position_ids), **rest)

        return PackedView(forward, self.row_tokens)(*args, **kwargs)


def test_a_leak_between_sequences_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, _ = plain_trl(make_model(0), make_model(1), tmp_path)
    references = own_references(trainer_for(make_model(1), tmp_path), PAIRS, tmp_path)
    monkeypatch.setattr("posttrain.training.dpo.PackedView", Leaking)
    trainer = trainer_for(make_model(0), tmp_path)
    assert abs(score(trainer, dpo_step(PAIRS, references, PAD, 9999, None, ["sigmoid"]))[0] / loss - 1) > 1e-3


def test_attention_dropout_is_off_too(tmp_path: Path) -> None:
    trainer = trainer_for(make_model(attention_dropout=0.3), tmp_path)
    batch = pad_pairs(PAIRS, PAD)
    assert torch.equal(trainer.policy_logps(batch), trainer.policy_logps(batch))


def test_nothing_may_ask_for_a_reference_model(tmp_path: Path) -> None:
    trainer = trainer_for(make_model(), tmp_path)
    with pytest.raises(StageError, match="asked for a reference model"):
        trainer.ref_model(input_ids=torch.zeros(1, 1))


def test_reference_log_probs_go_on_where_they_stopped(tmp_path: Path) -> None:
    trainer, cache = trainer_for(make_model(), tmp_path), tmp_path / "refs.npy"
    answers = iter([False, False, True])
    part = reference_logps(trainer, PAIRS, PAD, LIMITS, cache, lambda *_, **__: None, lambda: next(answers))
    missing = part.isnan().any(dim=1)
    assert 0 < missing.sum() < len(PAIRS)
    texts: list[str] = []
    whole = reference_logps(trainer, PAIRS, PAD, LIMITS, cache, lambda _, text: texts.append(text), lambda: False)
    assert torch.equal(whole[~missing], part[~missing])
    assert torch.equal(whole, own_references(trainer, PAIRS, tmp_path))  # as if it had never stopped
    assert texts[-1] == f"reference log-probs {len(PAIRS)}/{len(PAIRS)}"
    texts.clear()
    reference_logps(trainer, PAIRS, PAD, LIMITS, cache, lambda _, text: texts.append(text), lambda: False)
    assert not texts  # all of it was there


def test_log_probs_that_are_not_finite_stop_the_stage(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(StageError, match="not finite"):
        own_references(trainer_for(model, tmp_path), PAIRS, tmp_path)


def test_the_cache_key_is_policy_and_token_ids() -> None:
    keys = {
        reference_key({"model": "a"}, PAIRS),
        reference_key({"model": "b"}, PAIRS),
        reference_key({"model": "a"}, PAIRS[1:]),
        reference_key({"model": "a"}, [PAIRS[1], PAIRS[0], *PAIRS[2:]]),
        reference_key({"model": "a"}, [Pair(PAIRS[0].prompt, PAIRS[0].rejected, PAIRS[0].chosen), *PAIRS[1:]]),
        reference_key({"model": "a"}, [Pair(np.append(PAIRS[0].prompt, PAIRS[0].chosen), *[PAIRS[0].chosen] * 2)]),
    }
    assert len(keys) == 6
    assert reference_key({"model": "a"}, make_pairs(10, empty_prompt=True)) == reference_key({"model": "a"}, PAIRS)
