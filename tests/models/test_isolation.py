"""The live check that packed documents do not see each other."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
)

import posttrain.models.attention as attention_module
from posttrain.errors import StageError
from posttrain.models.attention import FASTEST, check_isolation, choose_attention, missing, shortest_window
from posttrain.models.load import Adapter, add_adapter
from posttrain.models.packed_attention import PACKED, packed_attention
from tests.training.spine_tiny import make_model


@pytest.mark.parametrize("attention", ["sdpa", "eager", PACKED])
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


def test_auto_takes_the_first_that_does() -> None:
    found = choose_attention(make_model(), "auto", "cpu", torch.float32, 256)
    assert (found.backend, found.skipped) == (PACKED, {})
    model = make_model()
    assert choose_attention(model, "auto", "cpu", torch.float32, 256, first="eager").backend == "eager"
    assert model.config._attn_implementation == "eager"


def test_what_leaks_or_fails_is_passed_over_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = make_model(), LlamaForCausalLM.forward

    def leaking(self: LlamaForCausalLM, input_ids: torch.Tensor, position_ids: torch.Tensor, **rest: object) -> object:
        if self.config._attn_implementation == "sdpa":
            position_ids = torch.arange(input_ids.size(1))[None]
        return forward(self, input_ids=input_ids, position_ids=position_ids, **rest)

    monkeypatch.setattr(LlamaForCausalLM, "forward", leaking)
    monkeypatch.setitem(FASTEST, "cpu", ("flex_attention", "sdpa", "no_such", "eager"))
    monkeypatch.setattr(attention_module, "missing", lambda name, *_: "is away" if name == "flex_attention" else None)
    found = choose_attention(model, "auto", "cpu", torch.float32, 256)
    assert found.backend == model.config._attn_implementation == "eager"
    assert found.skipped["flex_attention"] == "is away"
    assert "packed documents see each other" in found.skipped["sdpa"]
    assert "fails (ValueError" in found.skipped["no_such"]
    with pytest.raises(StageError, match="sdpa packed documents see each other") as raised:
        choose_attention(model, "sdpa", "cpu", torch.float32, 256)
    assert raised.value.todo == "set it to auto, sdpa or eager"


def test_what_is_not_installed_is_never_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "set_attn_implementation", lambda *_: pytest.fail("loaded"))
    with pytest.raises(StageError, match="flash_attention_2 runs on a GPU only"):
        choose_attention(make_model(), "flash_attention_2", "cpu", torch.bfloat16, 256)
    monkeypatch.setattr(attention_module, "is_flash_attn_2_available", lambda: False)
    assert missing("flash_attention_2", "cuda", torch.bfloat16) == "is not installed"
    assert "fp32" in str(missing("flash_attention_3", "cuda", torch.float32))
    monkeypatch.setattr(attention_module, "is_flash_attn_2_available", lambda: True)
    assert missing("flash_attention_2", "cuda", torch.bfloat16) is None
    assert missing("flex_attention", "cuda", torch.float32) is None
    assert missing(PACKED, "cuda", torch.float32) == "is for CPUs"


def test_windows_are_read_from_the_config() -> None:
    assert shortest_window(make_model().config) is None
    assert shortest_window(MistralConfig(sliding_window=7)) == 7
    assert shortest_window(Qwen2Config(sliding_window=7, use_sliding_window=False)) is None


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_by_document_is_that_of_each_document(kv_heads: int) -> None:
    model = make_model(num_key_value_heads=kv_heads)
    rows = [torch.randint(0, 256, (1, length)) for length in (1, 9, 4)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)
    model.set_attn_implementation(PACKED)
    together = model(input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    twice = model(input_ids=torch.cat(rows, 1).expand(2, -1), position_ids=positions.expand(2, -1), use_cache=False)
    torch.testing.assert_close(twice.logits[1:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("setting", [{"sliding_window": 4}, {"softcap": 3.0}, {"is_causal": False}, {}])
def test_attention_that_is_not_plain_is_refused(setting: dict[str, object]) -> None:
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=PACKED):  # with no setting: no position ids
        packed_attention(torch.nn.Module(), states, states, states, None, **setting)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes no attention mask"):
        packed_attention(torch.nn.Module(), states, states, states, torch.ones(1, 1, 4, 4))


def test_a_window_leaves_attention_by_document_out() -> None:
    config = MistralConfig(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                           num_attention_heads=4, num_key_value_heads=2, sliding_window=8)  # fmt: skip
    found = choose_attention(MistralForCausalLM(config), "auto", "cpu", torch.float32, 256)
    assert found.backend == "sdpa"
    assert "plain causal attention" in found.skipped[PACKED]


def falcon(**settings: bool) -> FalconForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FalconForCausalLM(FalconConfig(**sizes, **settings))


@pytest.mark.parametrize("adapted", [False, True])
def test_an_architecture_that_ignores_positions_in_its_mask_is_given_one(adapted: bool) -> None:
    model = add_adapter(falcon(), Adapter(4, 8, 0.0, "all-linear"), []) if adapted else falcon()
    found = choose_attention(model, "auto", "cpu", torch.float32, 256)
    assert (found.backend, found.masked) == ("sdpa", True)
    assert "packed documents see each other" in found.skipped["sdpa"]
    rows = [torch.randint(0, 256, (1, length)) for length in (1, 9, 4)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    together = model(input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(input_ids=row, use_cache=False).logits for row in rows], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    mask = torch.ones(1, 14, dtype=torch.long)  # one of the caller's own stays
    whole = model(input_ids=torch.cat(rows, dim=1), attention_mask=mask, use_cache=False).logits
    assert (whole - alone).abs().max() > 1e-2


def test_positions_by_alibi_cannot_be_packed() -> None:
    model = falcon(alibi=True)
    with pytest.raises(StageError, match="packed documents see each other"):
        choose_attention(model, "auto", "cpu", torch.float32, 256)
    assert not model.transformer._forward_pre_hooks
