"""Bytes of weights, adapters, 4-bit tensors and optimizer state are those that the libraries allocate."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from estimate_tiny import FAMILIES, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from posttrain.errors import StageError
from posttrain.estimate.adapters import AdapterShape, adapter_tensors
from posttrain.estimate.shapes import architecture_of
from posttrain.estimate.weights import Method, optimizer_bytes, quantised, static_bytes, trained_tensors
from posttrain.models.lineage import Quantization
from posttrain.models.load import Adapter, add_adapter, load_base

SETTINGS = {
    "all-linear": ({"target_modules": "all-linear"}, AdapterShape(4)),
    "some": (
        {"target_modules": ["q_proj", "down_proj", "dense", "o_proj"], "rank_pattern": {"down_proj": 7, "0.*dense": 3}},
        AdapterShape(4, ("q_proj", "down_proj", "dense", "o_proj"), {"down_proj": 7, "0.*dense": 3}),
    ),
    "regex": ({"target_modules": r".*(dense|o_proj)"}, AdapterShape(4, r".*(dense|o_proj)")),
    "dora": ({"target_modules": "all-linear", "use_dora": True}, AdapterShape(4, dora=True)),
    "head": (
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        AdapterShape(4, modules_to_save=("lm_head",)),
    ),
}


PAIRS = [pair for pair in itertools.product(FAMILIES, SETTINGS) if pair != ("olmoe", "dora")]  # which peft refuses


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_an_adapter_has_what_peft_counts(kind: str, name: str) -> None:
    settings, shape = SETTINGS[name]
    config = tiny_config(kind)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    wrapped = add_adapter(model, Adapter(r=4, lora_alpha=4, lora_dropout=0.0, **settings), [])
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    architecture = architecture_of(config.to_dict(), kind)
    assert sum(one.numel for one in adapter_tensors(architecture, shape)) == trained > 0


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_token_rows_count_once_where_the_head_is_tied(kind: str) -> None:
    config = tiny_config(kind)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
    wrapped = add_adapter(model, Adapter(4, 4, 0.0, "all-linear"), [3, 4, 5])
    trained = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    found = adapter_tensors(architecture_of(config.to_dict(), kind), AdapterShape(4, token_rows=3))
    assert sum(one.numel for one in found) == trained


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", FAMILIES)
def test_four_bits_are_the_bytes_that_bitsandbytes_holds(kind: str, double: bool, tmp_path: Path) -> None:
    config = tiny_config(kind)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    architecture = architecture_of(config.to_dict(), kind)
    quantization = Quantization("nf4", double, "bfloat16")
    if kind == "falcon":  # its layers are a class of their own, which transformers leaves alone
        assert not quantised(architecture)
        with pytest.raises(StageError, match="no layer"):
            load_base(tmp_path, torch.bfloat16, "cpu", "sdpa", quantization)
        return
    model = load_base(tmp_path, torch.bfloat16, "cpu", "sdpa", quantization)
    held = {}
    for parameter in model.parameters():
        tensors = [parameter.data]
        if (state := vars(parameter).get("quant_state")) is not None:
            tensors += [state.absmax, state.code]
            tensors += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
        held |= {tensor.untyped_storage().data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    static = static_bytes(architecture, Method(AdapterShape(4), four_bits=True, double_quant=double), "bf16", "sgd")
    assert static.weights == sum(held.values())


@pytest.mark.parametrize("kind", FAMILIES)
def test_full_training_holds_what_torch_allocates(kind: str) -> None:
    config = tiny_config(kind)
    model = tiny_model(config, "full", "bf16", "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [one for held in optimizer.state.values() for one in held.values() if isinstance(one, torch.Tensor)]
    static = static_bytes(architecture_of(config.to_dict(), kind), Method(), "bf16", "adamw_torch_fused")
    assert static.weights == sum(one.numel() * 4 for one in model.parameters())
    assert static.gradients == sum(one.grad.numel() * 4 for one in model.parameters() if one.grad is not None)
    assert static.optimizer == sum(one.numel() * one.element_size() for one in state)


@pytest.mark.parametrize(("optim", "made"), [("adamw_bnb_8bit", "AdamW8bit"), ("lion_8bit", "Lion8bit")])
def test_eight_bits_are_what_bitsandbytes_allocates(optim: str, made: str) -> None:
    import bitsandbytes

    matrix, vector = torch.nn.Parameter(torch.randn(100, 81)), torch.nn.Parameter(torch.randn(300))
    optimizer = getattr(bitsandbytes.optim, made)([matrix, vector])
    for parameter in (matrix, vector):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    from posttrain.estimate.adapters import Trained

    trained = [Trained("a", (100, 81), 8100), Trained("b", (300,), 300)]
    told, paged = optimizer_bytes(trained, optim)
    maps = 2 if made == "AdamW8bit" else 1
    assert told == sum(held.values()) + (2 - maps) * 1024
    assert paged == 0


def test_adafactor_keeps_rows_and_columns() -> None:
    from transformers.optimization import Adafactor

    matrix, vector = torch.nn.Parameter(torch.randn(100, 81)), torch.nn.Parameter(torch.randn(300))
    optimizer = Adafactor([matrix, vector], lr=1e-3, relative_step=False, scale_parameter=False)
    for parameter in (matrix, vector):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    names = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")
    held = sum(state[name].numel() * 4 for state in optimizer.state.values() for name in names if name in state)
    from posttrain.estimate.adapters import Trained

    trained = [Trained("a", (100, 81), 8100), Trained("b", (300,), 300)]
    assert optimizer_bytes(trained, "adafactor") == (held, 0)


def test_paged_state_lies_elsewhere() -> None:
    model = architecture_of(tiny_config("llama").to_dict(), "x")
    wide = model.with_vocabulary(8192)
    trained = trained_tensors(wide, Method())
    _, paged = optimizer_bytes(trained, "paged_adamw_32bit")
    assert paged == 2 * 8 * 8192 * 64
    static = static_bytes(wide, Method(), "bf16", "paged_adamw_32bit")
    assert static.total == static.weights + static.gradients + static.optimizer - paged


def test_frozen_adapters_below_are_counted_in_fp32() -> None:
    model = architecture_of(tiny_config("llama").to_dict(), "x")
    alone = static_bytes(model, Method(AdapterShape(4)), "bf16", "sgd")
    above = static_bytes(model, Method(AdapterShape(4), parents=(AdapterShape(8),)), "bf16", "sgd")
    assert above.weights - alone.weights == 2 * alone.trainable
    assert above.trainable == alone.trainable
