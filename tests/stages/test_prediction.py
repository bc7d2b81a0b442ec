"""What a stage tells the estimate of its live model is what the model is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.estimate.weights import static_bytes
from posttrain.models.lineage import Quantization
from posttrain.stages.prediction import Prediction, predict_stage
from posttrain.stages.setup import Machine
from posttrain.training.limits import Limits

MACHINE = Machine("cpu", "sdpa", torch.float32)


def llama() -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=264, tie_word_embeddings=True, **sizes))


def described(model: Any, quantization: Quantization | None = None) -> Prediction:
    return predict_stage(model, quantization, MACHINE, "packed_sdpa", "fp32", "adamw_torch_fused", False)


def trained(model: Any) -> int:
    return sum(param.numel() for param in model.parameters() if param.requires_grad)


def test_full_training_is_every_parameter() -> None:
    model = llama()
    found = described(model)
    static = static_bytes(found.model, found.how.method, "fp32", found.optim)
    assert static.trainable_parameters == trained(model) == static.parameters
    tensors = len(list(model.parameters()))
    assert found.optimizer_bytes == 8 * trained(model) + 4 * tensors  # torch counts steps in a tensor each


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 2}},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [3, 5, 8]}},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["all", "pattern", "dora", "rows", "saved"],
)
def test_an_adapter_is_read_from_the_live_model(fields: dict[str, Any]) -> None:
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4, **fields), adapter_name="default")
    found = described(model)
    static = static_bytes(found.model, found.how.method, "fp32", found.optim)
    assert static.trainable_parameters == trained(model)


def test_frozen_parents_and_four_bits_are_told_apart() -> None:
    model = get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=4), adapter_name="parent0")
    model.add_adapter("default", LoraConfig(task_type="CAUSAL_LM", r=2))
    method = described(model, Quantization("nf4", False, "bfloat16")).how.method
    assert (method.adapter.r, [parent.r for parent in method.parents]) == (2, [4])  # type: ignore[union-attr]
    assert (method.four_bits, method.double_quant) == (True, False)
    assert not described(model).how.method.four_bits


def test_a_larger_piece_takes_more_and_a_small_step_is_the_most() -> None:
    found = described(llama())
    small, large = (found.peak(Limits(tokens, None, tokens, True), 10**9) for tokens in (256, 4096))
    assert small < large
    assert found.peak(Limits(4096, None, 4096, True), 256) == small
    room = found.peak(Limits(1024, None, 1024, True), 10**9)
    assert 512 <= found.largest(room, 64, None) <= 1280  # type: ignore[operator]
