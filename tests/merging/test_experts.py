"""LoRA on the stacked experts of a mixture: merged from files and reloaded, against the adapter in use."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from merging import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from posttrain.errors import CheckpointError
from posttrain.merging.adapter import EXPERT_PARAMETERS
from posttrain.merging.experts import LAYOUTS
from posttrain.merging.merge import merge
from posttrain.merging.quantization import QuantSpec
from posttrain.models.load import quantised_modules

pytestmark = pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
"""peft says so of patterns for parameters, and applies them all the same."""
EXPERTS = 4
SHAPE = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "eos_token_id": None,
}
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 24, "head_dim": 8},
    "olmoe": {"num_experts": EXPERTS},
    "deepseek_v3": {
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 2,
        "topk_group": 2,
    },
    "glm4_moe": {
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    },
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": BOTH},
    "gate and up": {"target_parameters": BOTH[:1]},
    "down": {"target_parameters": ["down_proj"]},
    "rslora, router, attention": {
        "target_parameters": [*BOTH, "mlp.gate.weight"],
        "target_modules": ["o_proj"],
        "use_rslora": True,
    },
    "patterns": {
        "target_parameters": [*BOTH, "mlp.gate.weight"],
        "rank_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 2},
        "alpha_pattern": {"experts.down_proj": 32, "gate.weight": 4},
    },
}


def save_moe(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, shards: bool = False) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SHAPE | OWN[model_type])
    model = AutoModelForCausalLM.from_config(config)
    model.to(dtype).save_pretrained(folder, max_shard_size=9_000 if shards else 10**9)
    return folder


def load_moe(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_moe_adapter(base: Path, folder: Path, seed: int = 1, **settings: Any) -> Path:
    tuned = get_peft_model(load_moe(base), LoraConfig(**{"r": 3, "lora_alpha": 8, "target_modules": []} | settings))
    torch.manual_seed(seed)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(folder)
    return folder


def live_moe(base: Path, *adapters: Path) -> torch.nn.Module:
    model = PeftModel.from_pretrained(load_moe(base), adapters[0], adapter_name="0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=str(number))
    model.base_model.set_adapter([str(number) for number in range(len(adapters))])
    return model.eval()


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_layout_is_that_of_transformers(model_type: str) -> None:
    steps = get_checkpoint_conversion_mapping(model_type)
    stacked, renamed = {}, {}
    for step in steps:
        if isinstance(step, WeightConverter):
            *_, parameter = step.target_patterns[0].split(".")
            parts = tuple(pattern.split(".experts.*.")[1].removesuffix(".weight") for pattern in step.source_patterns)
            kinds = [(type(operation), operation.dim) for operation in step.operations]
            assert kinds == [(MergeModulelist, 0), (Concatenate, 1)][: len(parts)]
            stacked[parameter] = parts
        elif isinstance(step, WeightRenaming) and "mlp" in step.target_patterns[0]:
            renamed[step.source_patterns[0]] = step.target_patterns[0]
    layout = LAYOUTS[model_type]
    assert stacked == layout.parts
    assert renamed == ({} if layout.block == "mlp" else {f".{layout.block}.": ".mlp."})


@pytest.mark.parametrize("model_type", LAYOUTS)
def test_runtime_declares_its_parameters_in_the_order_that_keys_count_on(model_type: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPE | OWN[model_type]))
    experts = model.get_submodule("model.layers.1.mlp.experts")
    assert tuple(name for name, _ in experts.named_parameters(recurse=False)) == EXPERT_PARAMETERS
    assert not getattr(experts, "is_transposed", False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_merged_files_are_the_experts_in_use(model_type: str, kind: str, tmp_path: Path) -> None:
    base = save_moe(tmp_path / "base", model_type, torch.bfloat16, shards=kind == "both")
    adapter = save_moe_adapter(base, tmp_path / "adapter", **KINDS[kind])
    in_use = tiny.logits(live_moe(base, adapter))
    assert tiny.relative(tiny.logits(load_moe(base)), in_use) > 0.01

    report = merge(base, [adapter], tmp_path / "fp32", "float32", max_shard_size=9_000)
    merge(base, [adapter], tmp_path / "bf16", "bfloat16")

    assert tiny.relative(tiny.logits(load_moe(tmp_path / "fp32")), in_use) < 1e-6
    fp32 = {
        name: value for file in (tmp_path / "fp32").glob("*.safetensors") for name, value in load_file(file).items()
    }
    bf16 = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(torch.equal(value.bfloat16(), bf16[name]) for name, value in fp32.items())  # rounded once
    assert all(tensor.cosine and tensor.cosine > 0.999 for tensor in report.tensors)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_chain_on_experts(model_type: str, tmp_path: Path) -> None:
    base = save_moe(tmp_path / "base", model_type)
    chain = [save_moe_adapter(base, tmp_path / str(n), seed=n, target_parameters=BOTH, r=2 + n) for n in range(2)]
    merge(base, chain, tmp_path / "out", "float32")
    assert tiny.relative(tiny.logits(load_moe(tmp_path / "out")), tiny.logits(live_moe(base, *chain))) < 1e-6


@pytest.mark.parametrize(
    ("model_type", "targets"), [("mixtral", ["w1", "w2", "w3"]), ("qwen2_moe", ["gate_proj", "up_proj"])]
)
def test_targets_by_names_from_before_experts_were_stacked(model_type: str, targets: list[str], tmp_path: Path) -> None:
    base = save_moe(tmp_path / "base", model_type)
    adapter = save_moe_adapter(base, tmp_path / "adapter", target_modules=targets)
    merge(base, [adapter], tmp_path / "out", "float32")
    assert tiny.relative(tiny.logits(load_moe(tmp_path / "out")), tiny.logits(live_moe(base, adapter))) < 1e-6


def split_adapter(base: Path, folder: Path) -> Path:
    """An adapter as peft wrote it when each expert was a module: LoRA of its own on each part."""
    save_moe_adapter(base, folder, target_modules=["w1", "w2", "w3"])
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"target_modules": ["w1", "w2", "w3"], "target_parameters": None, "rank_pattern": {}, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(2)
    tensors = {}
    for layer in range(2):
        for expert in range(EXPERTS):
            for part, (outputs, inputs) in {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}.items():
                key = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}"
                tensors[f"{key}.lora_A.weight"] = 0.3 * torch.randn(3, inputs)
                tensors[f"{key}.lora_B.weight"] = 0.3 * torch.randn(outputs, 3)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def test_adapter_from_before_experts_were_stacked(tmp_path: Path) -> None:
    base = save_moe(tmp_path / "base", "mixtral")
    adapter = split_adapter(base, tmp_path / "adapter")
    merge(base, [adapter], tmp_path / "out", "float32")
    assert tiny.relative(tiny.logits(load_moe(tmp_path / "out")), tiny.logits(live_moe(base, adapter))) < 1e-6


def test_experts_beside_a_quantised_base_are_not_quantised(tmp_path: Path) -> None:
    base = save_moe(tmp_path / "base", "mixtral", torch.bfloat16)
    adapter = save_moe_adapter(base, tmp_path / "adapter", target_parameters=BOTH, target_modules=["q_proj"])
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=settings)
    for module in loaded.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    spec = QuantSpec(double_quant=False, source_dtype="float32", modules=quantised_modules(loaded))
    in_use = PeftModel.from_pretrained(loaded, adapter).eval()
    assert quantised_modules(in_use) == spec.modules

    merge(base, [adapter], tmp_path / "out", "float32", "dequantized", spec)

    assert tiny.relative(tiny.logits(load_moe(tmp_path / "out")), tiny.logits(in_use)) < 2e-6
    with pytest.raises(CheckpointError, match="was not recorded"):
        merge(base, [adapter], tmp_path / "guessed", "float32", "dequantized", replace(spec, modules=None))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    base = save_moe(tmp_path / "base", "mixtral")
    save_moe_adapter(base, tmp_path / "adapter", target_parameters=BOTH)
    return tmp_path


def refusal(work: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        merge(work / "base", [work / "adapter"], work / "out", "float32")
    assert sorted(path.name for path in work.iterdir()) == ["adapter", "base"]
    return str(caught.value)


def edit_adapter(work: Path, change: Any) -> None:
    file = work / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


LAYER = "base_model.model.model.layers.1.mlp.experts"


def test_factor_of_stacked_experts_missing(work: Path) -> None:
    edit_adapter(work, lambda tensors: tensors.pop(f"{LAYER}.base_layer.lora_B.weight"))
    assert f"{LAYER}.base_layer.lora_B.weight is missing" in refusal(work)


def test_stacked_experts_of_a_layer_missing(work: Path) -> None:
    edit_adapter(work, lambda tensors: [tensors.pop(f"{LAYER}.base_layer.lora_{side}.weight") for side in "AB"])
    assert "no factors for model.layers.1.mlp.experts.gate_up_proj" in refusal(work)


def test_more_wrappers_than_targets(work: Path) -> None:
    edit_config(work / "adapter" / "adapter_config.json", target_parameters=BOTH[1:])
    assert ".mlp.experts.base_layer.lora_A.weight" in refusal(work)


def test_family_that_is_not_known(work: Path) -> None:
    edit_config(work / "base" / "config.json", model_type="jamba")
    assert ".mlp.experts.lora_A.weight is LoRA on the stacked experts of model_type 'jamba'" in refusal(work)


def test_base_with_another_number_of_experts(work: Path) -> None:
    file = work / "base" / "model.safetensors"
    tensors = load_file(file)
    fewer = {name: value for name, value in tensors.items() if ".experts.3." not in name}
    save_file(fewer, file, metadata={"format": "pt"})
    assert "is for experts [4, 32, 48], not model.layers.0.block_sparse_moe.experts.3.w2.weight" in refusal(work)
    more = tensors | {name.replace("experts.3", "experts.4"): value.clone() for name, value in tensors.items()}
    save_file(more, file, metadata={"format": "pt"})
    assert "is for 4 experts, the base has model.layers.0.block_sparse_moe.experts.4.w1.weight" in refusal(work)


def test_some_experts_without_factors(work: Path) -> None:
    split_adapter(work / "base", work / "adapter")
    key = "model.layers.1.block_sparse_moe.experts.2.w3"
    edit_adapter(work, lambda tensors: [tensors.pop(f"base_model.model.{key}.lora_{side}.weight") for side in "AB"])
    assert f"none for {key}.weight" in refusal(work)
