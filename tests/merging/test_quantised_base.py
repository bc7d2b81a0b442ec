"""The dequantised base: the numbers a 4-bit training saw, and the model it makes."""

from __future__ import annotations

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from merging import tiny
from peft import PeftModel
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from posttrain.errors import CheckpointError, UserError
from posttrain.merging.header import TensorInfo
from posttrain.merging.merge import merge
from posttrain.merging.quantization import QuantSpec, is_quantised

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_quantised(folder: Path, spec: QuantSpec) -> LlamaForCausalLM:
    """As a training loads it, with the CPU's bf16 packing of the first eval forward switched off."""
    model = LlamaForCausalLM.from_pretrained(
        folder,
        dtype=DTYPES[spec.source_dtype],
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=spec.quant_type,
            bnb_4bit_use_double_quant=spec.double_quant,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32 file", "bf16 file"])
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec("nf4", True, source_dtype="bfloat16"),
        QuantSpec("nf4", False, source_dtype="float32"),
        QuantSpec("fp4", True, source_dtype="float32"),
        QuantSpec("fp4", False, source_dtype="bfloat16"),
    ],
    ids=str,
)
def test_base_is_to_the_bit_what_linear4bit_holds(
    spec: QuantSpec, stored: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    base = tiny.save_base(tmp_path / "base", tied, stored, shards=False)
    model = load_quantised(base, spec)
    expected = {name: p.float() for name, p in model.named_parameters() if not isinstance(p, bnb.nn.Params4bit)}
    quantised = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    for name, module in quantised.items():
        weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        expected[f"{name}.weight"] = weight.float()

    merge(base, [], tmp_path / "out", "float32", "dequantized", spec)

    found = load_file(tmp_path / "out" / "model.safetensors")
    assert len(quantised) == 14
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merged_is_the_qlora_in_use_and_the_original_base_is_not(dora: bool, tmp_path: Path) -> None:
    spec = QuantSpec(source_dtype="float32")
    base = tiny.save_base(tmp_path / "base", True, torch.bfloat16, shards=True)
    adapter = tiny.save_adapter(
        base, tmp_path / "adapter", target_modules=["q_proj", "up_proj"], use_dora=dora, trainable_token_indices=[1, 2]
    )
    in_use = tiny.logits(PeftModel.from_pretrained(load_quantised(base, spec), adapter).eval())

    merge(base, [adapter], tmp_path / "dequantized", "float32", "dequantized", spec)
    merge(base, [adapter], tmp_path / "original", "float32")

    assert tiny.relative(tiny.logits(tiny.load_base(tmp_path / "dequantized")), in_use) < 2e-6
    assert tiny.relative(tiny.logits(tiny.load_base(tmp_path / "original")), in_use) > 0.01


def test_skipped_modules_follow_the_rule_of_transformers() -> None:
    def info(name: str, *shape: int) -> TensorInfo:
        return TensorInfo(name, "BF16", shape, Path("x"), 0)

    spec = QuantSpec(skipped=("lm_head", "model.layers.1", "gate"))
    names = {
        "model.layers.0.mlp.up_proj.weight": True,
        "model.layers.1.mlp.up_proj.weight": False,
        "model.layers.11.mlp.up_proj.weight": True,
        "model.layers.0.mlp.gate.weight": False,
        "model.layers.0.mlp.gate_proj.weight": True,
        "model.embed_tokens.weight": False,
        "lm_head.weight": False,
    }
    assert {name: is_quantised(info(name, 4, 4), spec) for name in names} == names
    assert not is_quantised(info("model.norm.weight", 4), spec)
    assert not is_quantised(info("model.layers.0.self_attn.q_proj.bias", 4), spec)
    with pytest.raises(CheckpointError, match="belongs to experts"):
        is_quantised(info("model.layers.0.mlp.experts.gate_up_proj.weight", 2, 4, 4), spec)


def test_recorded_modules_go_before_names() -> None:
    spec = QuantSpec(skipped=(), modules=("model.layers.0.mlp.up_proj", "lm_head"))
    names = {
        "model.layers.0.mlp.up_proj.weight": True,
        "lm_head.weight": True,
        "model.layers.0.mlp.down_proj.weight": False,
    }
    found = {name: is_quantised(TensorInfo(name, "BF16", (4, 4), Path("x"), 0), spec) for name in names}
    assert found == names
    assert not is_quantised(TensorInfo("model.layers.0.mlp.up_proj.bias", "BF16", (4,), Path("x"), 0), spec)


def test_recorded_module_that_the_base_does_not_have(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", True, torch.float32, shards=False)
    with pytest.raises(CheckpointError, match=r"model\.extra: was quantised in training"):
        merge(base, [], tmp_path / "out", "float32", "dequantized", QuantSpec(modules=("model.extra",)))


def test_dequantised_without_a_quantisation_is_refused(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base", True, torch.float32, shards=False)
    with pytest.raises(UserError, match="not trained on a quantised base"):
        merge(base, [], tmp_path / "out", "float32", "dequantized", None)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
