"""The head for CPUs gives what TRL's fused head gives."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM
from trl.trainer.sft_trainer import add_fused_lm_head

from posttrain.models.load import Adapter, add_adapter
from posttrain.pretraining.packing import stack
from posttrain.training import head
from posttrain.training.head import use_plain_head
from posttrain.training.sft import show_head_bias
from tests.training.spine_tiny import PAD, make_model, make_rows, score_fields


def with_rows(model: Any) -> Any:
    """A model whose untied head has trained rows, in peft's wrapper."""
    grown = add_adapter(model.requires_grad_(False), Adapter(4, 8, 0.0, "all-linear"), [3, 5])
    torch.manual_seed(0)
    with torch.no_grad():
        for param in grown.parameters():
            if param.requires_grad:
                param.add_(0.1 * torch.randn_like(param))
    show_head_bias(grown)
    return grown


MODELS = {
    "tied": lambda: make_model(tie=True),
    "untied": lambda: make_model(tie=False),
    "bias": lambda: biased(make_model(tie=False)),
    "rows": lambda: with_rows(make_model(tie=False)),
}


def biased(model: Any) -> Any:
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_same_figures_and_gradients(name: str) -> None:
    theirs = MODELS[name]()
    ours = copy.deepcopy(theirs)
    for model in (theirs, ours):
        add_fused_lm_head(model.get_base_model() if name == "rows" else model)
    assert use_plain_head(ours, squares=True)
    rows = make_rows(8)
    batch = {key: torch.from_numpy(value) for key, value in stack([rows[:4], rows[4:]], PAD).items()}
    expected, found = (model(**batch, fused_lm_head=True, use_cache=False) for model in (theirs, ours))
    for field in score_fields(expected):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-5, atol=1e-5, msg=field)
    for output in (expected, found):
        output.log_probs.sum().backward()
    for (key, mine), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if their.grad is not None:
            torch.testing.assert_close(mine.grad, their.grad, rtol=1e-4, atol=1e-4, msg=key)


def test_many_logits_are_left_to_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    add_fused_lm_head(model)
    use_plain_head(model)
    batch = {key: torch.from_numpy(value) for key, value in stack([make_rows(4)], PAD).items()}
    monkeypatch.setattr(head, "_score", lambda *_: pytest.fail("scored at once"))
    monkeypatch.setattr(head, "_MOST_LOGITS", 100)
    assert dataclasses.is_dataclass(model(**batch, fused_lm_head=True))
    assert model(input_ids=batch["input_ids"]).logits.shape[-1] == model.config.vocab_size  # plain calls stay plain


def test_a_head_that_changes_its_logits_is_left_alone() -> None:
    config = GemmaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    config.final_logit_softcapping = 30.0
    model = GemmaForCausalLM(config)
    add_fused_lm_head(model)
    before = model.forward
    assert not use_plain_head(model)
    assert model.forward == before
