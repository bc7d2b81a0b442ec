"""A tokenizer swap: shared rows bit for bit, the others the mean, logits over shared tokens as they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.errors import CheckpointError
from posttrain.models.save import save_full
from posttrain.models.tokenizer_swap import Swap, Vocabulary, plan_swap, swap_tokenizer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = {**SIZES, "model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 64}
PHI = {**SIZES, "model_type": "phi", "max_position_embeddings": 64}
TINY = {**LLAMA, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
OLD = Vocabulary(
    {
        "<s>": 0,
        "</s>": 1,
        "<unk>": 2,
        **{f"old{n}": n + 3 for n in range(20)},
        **{f"both{n}": 40 - n for n in range(17)},
    },
    {"eos": "</s>", "bos": "<s>", "unk": "<unk>"},
)
NEW = Vocabulary(
    {
        **{f"both{n}": n for n in range(17)},
        **{f"new{n}": n + 17 for n in range(8)},
        "<end>": 25,
        "<unk>": 26,
        "<pad>": 27,
    },
    {"eos": "<end>", "bos": "<end>", "unk": "<unk>", "pad": "<pad>"},
)
ROWS = 48
"""Of the old matrix: 41 and padding."""


def model_of(config: dict[str, Any], tied: bool, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = AutoConfig.for_model(
        **config, vocab_size=ROWS, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1, pad_token_id=None
    )
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    for param in model.parameters():  # biases and norms too
        param.data = torch.randn_like(param) * 0.2
    return model


def matrices(model: Any) -> dict[str, torch.Tensor]:
    """What has a row per token, as it is now."""
    head = model.get_output_embeddings()
    found = {"in": model.get_input_embeddings().weight, "out": head.weight, "bias": head.bias}
    return {name: value.detach().clone() for name, value in found.items() if value is not None}


def assert_rows(before: torch.Tensor, after: torch.Tensor, swap: Swap) -> None:
    mean = before[torch.from_numpy(swap.entries)].mean(dim=0)
    for row, source in enumerate(swap.sources.tolist()):
        assert torch.equal(after[row], mean if source < 0 else before[source])


@pytest.mark.parametrize(("config", "tied"), [(LLAMA, True), (LLAMA, False), (PHI, False)])
def test_shared_rows_are_copied_and_the_others_are_the_mean(config: dict[str, Any], tied: bool) -> None:
    model = model_of(config, tied)
    before, body = matrices(model), model.model.layers[0].self_attn.q_proj.weight.clone()
    swap = plan_swap(OLD, NEW, ROWS, "tokenizer")
    swap_tokenizer(model, swap, NEW)
    after = matrices(model)
    assert before.keys() == after.keys() == {"in", "out", *({"bias"} if config is PHI else ())}
    for name in before:
        assert_rows(before[name], after[name], swap)
        assert len(after[name]) == 32  # 28 tokens, to a multiple of 8
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, body)
    assert model.lm_head.out_features == model.get_input_embeddings().num_embeddings == model.config.vocab_size == 32


@pytest.mark.parametrize(("config", "tied"), [(LLAMA, True), (LLAMA, False), (PHI, False)])
def test_logits_over_shared_tokens_are_unchanged(config: dict[str, Any], tied: bool) -> None:
    model = model_of(config, tied)
    shared = sorted(OLD.ids.keys() & NEW.ids.keys())
    old, new = (torch.tensor([vocabulary.ids[token] for token in shared]) for vocabulary in (OLD, NEW))
    text = torch.randint(len(shared), (3, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = model(input_ids=old[text]).logits[..., old]
        swap_tokenizer(model, plan_swap(OLD, NEW, ROWS, "tokenizer"), NEW)
        after = model(input_ids=new[text]).logits[..., new]
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_mean_leaves_padding_rows_out() -> None:
    model = model_of(LLAMA, tied=False)
    model.get_input_embeddings().weight.data[41:] = 1e6
    swap_tokenizer(model, plan_swap(OLD, NEW, ROWS, "tokenizer"), NEW)
    assert model.get_input_embeddings().weight.abs().max() < 10


def test_special_tokens_map_by_role_where_their_strings_differ() -> None:
    swap = plan_swap(OLD, NEW, ROWS, "tokenizer")
    assert swap.by_role == {"eos": ("<end>", "</s>")}  # it is bos as well: eos goes first
    assert swap.sources[NEW.ids["<end>"]] == OLD.ids["</s>"]
    assert swap.sources[NEW.ids["<unk>"]] == OLD.ids["<unk>"]
    assert swap.sources[NEW.ids["<pad>"]] == -1  # the old tokenizer has none
    assert swap.new.sum() == 9
    assert swap.figures() == {
        "tokens": 28,
        "rows": 32,
        "shared_rows": 18,
        "rows_by_role": {"eos": {"token": "<end>", "from": "</s>"}},
        "new_rows": 9,
        "mean_over_rows": 40,
    }
    assert swap.told() == "18 rows copied, 9 begin as the mean of 40; by role: <end> as </s>"


def test_a_shared_string_goes_before_a_role() -> None:
    new = Vocabulary({"both1": 0, "</s>": 1, "<s>": 2}, {"eos": "<s>", "bos": "</s>"})
    assert plan_swap(OLD, new, ROWS, "tokenizer").sources[:3].tolist() == [OLD.ids["both1"], 1, 0]


def test_configs_follow_the_new_tokenizer() -> None:
    model = model_of(LLAMA, tied=True)
    model.generation_config.update(eos_token_id=[1, 7], suppress_tokens=[5], max_length=99)
    swap_tokenizer(model, plan_swap(OLD, NEW, ROWS, "tokenizer"), NEW)
    config, generation = model.config, model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.vocab_size) == (25, 25, 27, 32)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (25, [25], 27)
    assert (generation.suppress_tokens, generation.max_length) == (None, 99)
    assert model.get_input_embeddings().padding_idx is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_saved_model_is_the_swapped_one(tied: bool, tmp_path: Any) -> None:
    model = model_of(LLAMA, tied)
    swap_tokenizer(model, plan_swap(OLD, NEW, ROWS, "tokenizer"), NEW)
    save_full(model, tmp_path, torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, matrix in matrices(model).items():
        assert torch.equal(matrices(loaded)[name], matrix)


def test_the_same_tokenizer_changes_no_row() -> None:
    model = model_of(PHI, tied=False)
    before = matrices(model)
    swap_tokenizer(model, plan_swap(OLD, OLD, ROWS, "tokenizer"), OLD)
    used = sorted(OLD.ids.values())
    assert all(torch.equal(after[used], before[name][used]) for name, after in matrices(model).items())


def test_padding_follows_the_old_matrix() -> None:
    new = Vocabulary({f"both{n}": n for n in range(17)}, {})
    assert [len(plan_swap(OLD, new, rows, "x").sources) for rows in (41, 48, 128)] == [24, 24, 64]


def test_old_tokens_without_a_row_are_not_there() -> None:
    swap = plan_swap(OLD, NEW, 30, "tokenizer")
    assert swap.sources.max() < 30
    assert swap.entries.max() < 30
    assert swap.shared == 1 + sum(OLD.ids[f"both{n}"] < 30 for n in range(17))


def test_a_vocabulary_with_nothing_shared_is_refused() -> None:
    new = Vocabulary({"</s>": 0, "x": 1, "y": 2}, {"eos": "</s>"})
    with pytest.raises(CheckpointError, match="none of its 3 tokens is one of the model's 40"):
        plan_swap(OLD, new, ROWS, "stages.base.tokenizer")


def test_what_is_not_a_plain_fp32_model_is_refused() -> None:
    swap = plan_swap(OLD, NEW, ROWS, "tokenizer")
    adapter: Any = get_peft_model(model_of(LLAMA, tied=True), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match="is an adapter"):
        swap_tokenizer(adapter, swap, NEW)
    quantised = model_of(LLAMA, tied=False)
    layer = quantised.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"up_proj.weight is torch.uint8"):
        swap_tokenizer(quantised, swap, NEW)
    layered = model_of(LLAMA, tied=False)
    layered.config.vocab_size_per_layer_input = 64
    with pytest.raises(CheckpointError, match="embeddings of every layer"):
        swap_tokenizer(layered, swap, NEW)
    assert all(len(matrix) == ROWS for matrix in matrices(quantised).values())


TOKENS = [f"t{n}" for n in range(30)]
VOCABULARIES = st.lists(st.sampled_from(TOKENS), min_size=1, unique=True).flatmap(
    lambda tokens: st.lists(st.integers(0, 45), min_size=len(tokens), max_size=len(tokens), unique=True).map(
        lambda ids: dict(zip(tokens, ids, strict=True))
    )
)
ROLES = st.fixed_dictionaries({}, optional={role: st.sampled_from(TOKENS) for role in ("eos", "bos", "unk", "pad")})


@settings(max_examples=60, deadline=None)
@given(VOCABULARIES, VOCABULARIES, ROLES, ROLES, st.booleans())
def test_every_row_is_accounted_for(
    old: dict[str, int], new: dict[str, int], old_roles: dict[str, str], new_roles: dict[str, str], tied: bool
) -> None:
    before = Vocabulary(old, {role: token for role, token in old_roles.items() if token in old})
    after = Vocabulary(new, {role: token for role, token in new_roles.items() if token in new})
    try:
        swap = plan_swap(before, after, ROWS, "tokenizer")
    except CheckpointError:
        assert not (old.keys() & new.keys()) - set(after.roles.values())
        return
    rows = len(swap.sources)
    assert rows % 8 == 0
    assert max(new.values()) < rows <= max(new.values()) + 8
    for token in old.keys() & new.keys():
        assert swap.sources[new[token]] == old[token]
    for token, row in new.items():
        given_by_role = token in {taken for taken, _ in swap.by_role.values()}
        assert [token in old, given_by_role, bool(swap.new[row])].count(True) == 1
    assert swap.shared + len({token for token, _ in swap.by_role.values()}) + swap.new.sum() == len(new)
    assert set(np.flatnonzero(swap.sources >= 0)) <= set(new.values())
    model = model_of(TINY, tied)
    old_matrices = matrices(model)
    swap_tokenizer(model, swap, after)
    for name, matrix in matrices(model).items():
        assert_rows(old_matrices[name], matrix, swap)
