"""Pairs that share a prefix: where tokens stand, the masks, and when sharing is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from posttrain.errors import StageError
from posttrain.models.attention import shortest_window
from posttrain.models.packed_attention import PACKED
from posttrain.training import sharing
from posttrain.training.layout import common_prefix, lay_out
from posttrain.training.pairs import Pair, cut_pairs, pad_pairs
from posttrain.training.shared_mask import MASKS, block_mask, bool_mask, float_mask
from posttrain.training.sharing import Survey, choose_sharing, sharing_backend, survey
from tests.training.spine_tiny import END, PAD, VOCABULARY, make_model, make_pairs
from tests.training.test_dpo_losses import trainer_for

PAIRS = make_pairs(8, empty_prompt=True)
LENGTHS = survey(PAIRS)
IDS = st.lists(st.integers(0, 3), max_size=6)


def pair_of(prompt: list[int], chosen: list[int], rejected: list[int]) -> Pair:
    return Pair(*(np.array(part, dtype=np.int32) for part in (prompt, chosen, rejected)))


@given(
    st.lists(st.tuples(IDS, IDS.filter(len), IDS.filter(len)), min_size=1, max_size=5),
    st.integers(1, 40),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_prediction_is_found_again_with_all_its_context(
    given_pairs: list[tuple[list[int], list[int], list[int]]], row_tokens: int, share: bool
) -> None:
    pairs = [pair_of(*parts) for parts in given_pairs]
    batch = {name: table.numpy() for name, table in pad_pairs(pairs, PAD).items()}
    labels = np.where(batch["completion_mask"] == 1, batch["input_ids"], -100)
    lengths = batch["attention_mask"].sum(1).tolist()
    layout = lay_out(batch["input_ids"], labels, lengths, row_tokens, share, multiple=4)
    mask = bool_mask(torch.from_numpy(layout.documents), torch.from_numpy(layout.branches))[:, 0].numpy()
    assert layout.ids.shape[1] % 4 == 0
    assert (layout.documents >= 0).sum() == sum(pair.cost(share) for pair in pairs)
    assert mask.any(axis=2).all()  # no query without a key: a softmax over nothing
    width = layout.ids.shape[1] - 1
    for sequence, length in enumerate(lengths):
        for at in range(batch["input_ids"].shape[1] - 1):
            place = layout.sources[sequence, at]
            if at >= length - 1 or labels[sequence, at + 1] == -100:
                assert place == -1
                continue
            row, column = divmod(int(place), width)
            seen = np.flatnonzero(mask[row, column])
            assert layout.ids[row, seen].tolist() == batch["input_ids"][sequence, : at + 1].tolist()
            assert layout.positions[row, seen].tolist() == list(range(at + 1))
            assert layout.labels[row, column + 1] == labels[sequence, at + 1]


@given(IDS, IDS)
def test_common_prefix_is_what_both_begin_with(one: list[int], other: list[int]) -> None:
    found = common_prefix(np.array(one), np.array(other))
    assert one[:found] == other[:found]
    assert one[found : found + 1] != other[found : found + 1] or found == len(one) == len(other)


def test_pieces_hold_every_pair_once_and_no_more_than_they_may() -> None:
    costs = [pair.cost(True) for pair in PAIRS]
    assert all(pair.cost(True) == pair.tokens - pair.shared for pair in PAIRS)
    pieces = cut_pairs(costs, 40, 3)
    assert sorted(index for piece in pieces for index in piece) == list(range(len(PAIRS)))
    assert all(len(piece) <= 3 and (len(piece) == 1 or sum(costs[i] for i in piece) <= 40) for piece in pieces)
    assert costs[pieces[0][0]] == max(costs)


def test_the_forms_of_the_mask_say_the_same() -> None:
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, -1], [2, 2, 2, 2, 2, -1, -1]])
    branches = torch.tensor([[0, 0, 1, 2, 0, 0, 0], [0, 1, 1, 2, 2, 0, 0]])
    seen = bool_mask(documents, branches)
    assert torch.equal(float_mask(documents, branches) == 0, seen)
    with torch.compiler.set_stance("force_eager"):
        blocks = block_mask(documents, branches)
    index = torch.arange(7)
    per_token = blocks.mask_mod(
        torch.arange(2)[:, None, None], torch.zeros((), dtype=torch.long), index[:, None], index[None]
    )
    assert torch.equal(per_token, seen[:, 0])
    assert blocks.shape == (2, 1, 7, 7)  # four axes: transformers hands it on as it is


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_takes_the_block_mask(tmp_path: Path) -> None:
    # Forward alone: FlexAttention has no backward on a CPU.
    trainer = trainer_for(make_model(), tmp_path)
    batch = pad_pairs(PAIRS, PAD)
    plain = trainer.policy_logps(batch)
    trainer.model.set_attn_implementation("flex_attention")
    trainer.mask = MASKS["flex_attention"]
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(trainer.policy_logps(batch), plain, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager", PACKED])
def test_sharing_is_taken_where_it_is_exact_and_saves(tmp_path: Path, attention: str) -> None:
    trainer = trainer_for(make_model(), tmp_path)
    trainer.model.set_attn_implementation(attention)
    found = choose_sharing(trainer, "auto", LENGTHS, 256)
    assert trainer.shares
    assert found.mask is trainer.mask is MASKS[attention]
    assert (found.plain_tokens, found.saved_tokens) == (LENGTHS.plain, LENGTHS.saved)
    assert found.as_dict()["layout"] == "shared_prefix"
    assert not trainer._metrics["train"]


def test_off_is_off_and_little_saved_is_not_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(make_model(), tmp_path)
    monkeypatch.setattr(sharing, "_disproof", lambda *_: pytest.fail("tried"))
    assert "share_prefix is off" in choose_sharing(trainer, "off", LENGTHS, 256).note
    nothing = survey([pair_of([], [1, 2, 3], [4, 5, 6])])
    assert nothing == Survey(6, 0, 3)
    found = choose_sharing(trainer, "auto", nothing, 256)
    assert "would save only 0%" in found.note
    assert (found.saved_tokens, trainer.mask) == (0, None)


def test_a_mask_that_leaks_is_disproven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(documents: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
        return bool_mask(documents, torch.zeros_like(branches))

    trainer = trainer_for(make_model(), tmp_path)
    monkeypatch.setitem(MASKS, "sdpa", leaking)
    found = choose_sharing(trainer, "auto", LENGTHS, 256)
    assert "one answer sees the other" in found.note
    assert not trainer.shares
    with pytest.raises(StageError, match="on, but one answer sees the other"):
        choose_sharing(trainer, "on", LENGTHS, 256)


def test_positions_that_do_not_go_on_are_disproven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_for(make_model(), tmp_path)
    forward = trainer.model.forward

    def by_column(position_ids: torch.Tensor, attention_mask: Any = None, **rest: Any) -> Any:
        if attention_mask is not None:  # as a model with biases by distance in the row would see it
            position_ids = torch.arange(position_ids.shape[1])[None].expand_as(position_ids)
        return forward(position_ids=position_ids, attention_mask=attention_mask, **rest)

    monkeypatch.setattr(trainer.model, "forward", by_column)
    assert "differ from those of plain packing" in choose_sharing(trainer, "auto", LENGTHS, 256).note


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 4, "bos_token_id": None, "eos_token_id": END, "pad_token_id": PAD}  # fmt: skip


def test_a_window_shorter_than_the_longest_sequence_is_no_case_for_sharing(tmp_path: Path) -> None:
    longest = LENGTHS.longest
    for window, shares in ((longest - 15, False), (longest, True)):
        config = MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=window, initializer_range=0.3)
        model = MistralForCausalLM(config)
        assert shortest_window(model.config) == window
        trainer = trainer_for(model, tmp_path)
        found = choose_sharing(trainer, "auto", LENGTHS, 256)
        assert trainer.shares == shares, found.note
        if not shares:
            assert f"a layer sees {window} tokens back" in found.note
            # The proof alone finds it too, without knowing of windows.
            assert "differ" in str(sharing._disproof(trainer, bool_mask, LENGTHS.longest, 256))


def test_biases_by_distance_are_found_by_the_proof(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SMALL.items() if key != "intermediate_size"}
    model = FalconForCausalLM(FalconConfig(**sizes, alibi=True, new_decoder_architecture=False))
    trainer = trainer_for(model, tmp_path)
    found = choose_sharing(trainer, "auto", LENGTHS, 256)
    assert not trainer.shares
    assert "do not share" in found.note


def test_a_routers_balance_counts_every_token(tmp_path: Path) -> None:
    routed = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
    config = MixtralConfig(**SMALL, **routed, num_key_value_heads=2)
    trainer = trainer_for(MixtralForCausalLM(config), tmp_path)
    assert trainer.aux_loss_enabled
    assert "balance loss" in choose_sharing(trainer, "auto", LENGTHS, 256).note


def test_backends_without_a_mask_are_said(tmp_path: Path) -> None:
    trainer = trainer_for(make_model(), tmp_path)
    trainer.model.config._attn_implementation_internal = "flash_attention_2"
    assert "flash_attention_2 takes no mask" in choose_sharing(trainer, "auto", LENGTHS, 256).note
    assert sharing_backend("auto", "cuda", LENGTHS) == "flex_attention"
    assert sharing_backend("off", "cuda", LENGTHS) is None
    assert sharing_backend("auto", "cpu", LENGTHS) is None
