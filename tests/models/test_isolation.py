"""The live check that packed documents do not see each other."""

from __future__ import annotations

import pytest
import torch

from posttrain.errors import StageError
from posttrain.models.attention import check_isolation
from posttrain.models.load import Adapter, add_adapter
from tests.training.spine_tiny import make_model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_isolated_documents_pass(attention: str) -> None:
    model = make_model().eval()
    model.set_attn_implementation(attention)
    assert check_isolation(model, 256) <= 1e-6
    assert not model.training  # left as it was
    assert check_isolation(model.bfloat16(), 256) <= 1e-6


def test_dropout_anywhere_is_no_leak() -> None:
    model = add_adapter(make_model(attention_dropout=0.3), Adapter(4, 8, 0.5, "all-linear"), [])
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.05 * torch.randn_like(param))
    state = torch.get_rng_state()
    assert check_isolation(model, 256) <= 1e-6
    assert torch.equal(torch.get_rng_state(), state)  # training draws what it would have drawn


@pytest.mark.contract(number=8)
@pytest.mark.parametrize("leak", ["positions", "mask"])
def test_a_leak_is_refused(monkeypatch: pytest.MonkeyPatch, leak: str) -> None:
    model = make_model()
    forward = model.forward

    def leaking(input_ids: torch.Tensor, position_ids: torch.Tensor, **rest: object) -> object:
        if leak == "positions":
            position_ids = torch.arange(input_ids.size(1))[None]
        else:
            rest["attention_mask"] = torch.ones_like(input_ids)
        return forward(input_ids=input_ids, position_ids=position_ids, **rest)

    monkeypatch.setattr(model, "forward", leaking)
    with pytest.raises(StageError, match="packed documents see each other"):
        check_isolation(model, 256)


def test_logits_that_are_not_numbers_do_not_pass() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(StageError):
        check_isolation(model, 256)
