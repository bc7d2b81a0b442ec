"""Where the installed peft gives a wrong model without a word: ours is right, or refuses."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from merging import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel

from posttrain.artifact import Record, fingerprint, write_record
from posttrain.errors import CheckpointError
from posttrain.merging.combine import Input, combine
from posttrain.merging.merge import merge
from posttrain.merging.methods import Method
from posttrain.merging.quantization import QuantSpec
from posttrain.models.lineage import Lineage, Link, lineage_of

SPEC = QuantSpec(source_dtype="float32")
Q = "base_model.model.model.layers.0.self_attn.q_proj"


def load_nf4(base: Path, unpacked: bool = True) -> PreTrainedModel:
    """A base in 4 bits that computes in fp32, in eval mode.

    Args:
        unpacked: bitsandbytes may not repack the weights for the CPU at the first eval forward.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit) and unpacked:
            module.support_avx512bf16_for_cpu = False
    return model


def error(folder: Path, wanted: torch.Tensor) -> float:
    return tiny.relative(tiny.logits(tiny.load_base(folder)), wanted)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bias_of_an_adapter_on_four_bits(tmp_path: Path) -> None:
    """peft's merge of a 4-bit layer adds lora_B's bias without the scale that its forward gives it."""
    base = tiny.save_base(tmp_path / "base", True, torch.float32, shards=False, attention_bias=True)
    tuned = get_peft_model(
        load_nf4(base), LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_bias=True)
    )
    tiny.randomise(tuned, seed=1)
    wanted = tiny.logits(tuned.eval())
    tuned.save_pretrained(tmp_path / "adapter")

    merge(base, [tmp_path / "adapter"], tmp_path / "out", "float32", "dequantized", SPEC)

    assert error(tmp_path / "out", wanted) < 2e-6
    name = "model.layers.0.self_attn.q_proj.bias"
    before = load_file(base / "model.safetensors")[name]
    learned = load_file(tmp_path / "adapter" / "adapter_model.safetensors")[f"{Q}.lora_B.bias"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], before + 4 * learned)
    of_peft = PeftModel.from_pretrained(load_nf4(base), tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(of_peft.state_dict()[name], before + learned)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_one_side_of_a_tied_embedding(target: str, tmp_path: Path) -> None:
    """peft's merge adds the delta to the shared tensor, and so to the side that its forward leaves alone."""
    base = tiny.save_base(tmp_path / "base", True, torch.float32, shards=False)
    tuned = tiny.tune(base, target_modules=["q_proj", target])
    wanted = tiny.logits(tuned)
    tuned.save_pretrained(tmp_path / "adapter")

    report = merge(base, [tmp_path / "adapter"], tmp_path / "out", "float32")

    assert error(tmp_path / "out", wanted) <= 1e-6
    assert report.tied is False
    assert tiny.relative(tiny.logits(tuned.merge_and_unload()), wanted) > 0.3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_tied_over_both_sides_is_refused(tmp_path: Path) -> None:
    """With ensure_weight_tying peft's merge would add the delta twice."""
    base = tiny.save_base(tmp_path / "base", True, torch.float32, shards=False)
    tiny.save_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(CheckpointError, match=r"embed_tokens.*would be hit twice"):
        merge(base, [tmp_path / "adapter"], tmp_path / "out", "float32")


def test_mean_of_two_adapters(tmp_path: Path) -> None:
    """peft's add_weighted_adapter("linear") averages the factors: A and B of different adapters get multiplied."""
    base = tiny.save_base(tmp_path / "base", False, torch.float32, shards=False)
    folders = [
        tiny.save_adapter(base, tmp_path / str(seed), seed=seed, target_modules=["q_proj", "down_proj"])
        for seed in (1, 2)
    ]
    before = load_file(base / "model.safetensors")
    alone = []
    for folder in folders:
        merge(base, [folder], tmp_path / f"merged-{folder.name}", "float32")
        alone.append(load_file(tmp_path / f"merged-{folder.name}" / "model.safetensors"))
    deltas = {n: sum(0.5 * (one[n].double() - w.double()) for one in alone) for n, w in before.items()}
    inputs = [Input(adapters=(folder,)) for folder in folders]
    combine(base, inputs, tmp_path / "out", Method("task_arithmetic", (0.5, 0.5)), "float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in before.items():
        torch.testing.assert_close(found[name].double(), weight + deltas[name], rtol=1e-6, atol=1e-7)

    live = tiny.live(base, *folders)
    live.add_weighted_adapter(["0", "1"], [0.5, 0.5], "mean", combination_type="linear")
    live.set_adapter("mean")
    of_peft = live.merge_and_unload().state_dict()
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        assert tiny.relative((of_peft[name] - before[name]).double(), deltas[name]) > 0.3


def test_merge_after_an_evaluation_on_the_cpu(tmp_path: Path) -> None:
    """The first eval forward repacks 4-bit weights on CPUs with AVX512-BF16, and peft merges the packed bytes."""
    wide = {"hidden_size": 64, "intermediate_size": 64}  # what can be packed: rows by 32, columns by 64
    base = tiny.save_base(tmp_path / "base", False, torch.float32, shards=False, **wide)
    tuned = get_peft_model(load_nf4(base), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    tiny.randomise(tuned, seed=1)
    wanted = tiny.logits(tuned.eval())

    tuned.save_pretrained(tmp_path / "trained")

    evaluated = PeftModel.from_pretrained(load_nf4(base, unpacked=False), tmp_path / "trained").eval()
    tiny.logits(evaluated)
    evaluated.save_pretrained(tmp_path / "adapter")
    merge(base, [tmp_path / "adapter"], tmp_path / "out", "float32", "dequantized", SPEC)

    assert error(tmp_path / "out", wanted) < 2e-6
    layers = [module for module in evaluated.modules() if isinstance(module, bnb.nn.Linear4bit)]
    if any(layer.weight.quant_state.packing_format_for_cpu for layer in layers):
        assert tiny.relative(tiny.logits(evaluated.merge_and_unload()), wanted) > 0.3


@pytest.fixture
def stacked(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder with `base`, `sft`, `merged` (both in one) and `dpo`, which was trained on `merged` in memory.

    Also the logits of the model that was trained.
    """
    base = tiny.save_base(tmp_path / "base", True, torch.float32, shards=False)
    tiny.save_adapter(base, tmp_path / "sft", target_modules=["q_proj", "down_proj"])
    merge(base, [tmp_path / "sft"], tmp_path / "merged", "float32")
    merged = PeftModel.from_pretrained(tiny.load_base(base), tmp_path / "sft").merge_and_unload()
    tuned = get_peft_model(merged, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    tiny.randomise(tuned, seed=2)
    wanted = tiny.logits(tuned.eval())
    tuned.save_pretrained(tmp_path / "dpo")
    return tmp_path, wanted


def record(folder: Path, lineage: Lineage | None, marks: str) -> None:
    """Leaves a finished stage's record, as training does."""
    identity = {"marks": marks}
    plain = lineage.as_dict(folder.parent) if lineage else None
    write_record(folder, Record(folder.name, "sft", 1, fingerprint(identity), identity, lineage=plain))


def test_adapter_that_was_trained_on_a_merged_model(stacked: tuple[Path, torch.Tensor]) -> None:
    """peft names the bare base in its config, loads the adapter on it, and says nothing."""
    work, wanted = stacked
    named = json.loads((work / "dpo" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(work / "base")
    of_peft = PeftModel.from_pretrained(tiny.load_base(Path(named)), work / "dpo")
    assert tiny.relative(tiny.logits(of_peft), wanted) > 0.3

    with pytest.raises(CheckpointError, match=r"nothing proves which base"):
        lineage_of(work / "dpo", "dpo")  # without a record, its word for the base is not taken

    record(work / "merged", None, "first")
    link = Link(work / "merged", "@merged", fingerprint({"marks": "first"}))
    record(work / "dpo", Lineage(link).grown(Link(work / "dpo", "@dpo", None), None), "dpo")
    lineage = lineage_of(work / "dpo", "dpo")
    merge(lineage.base.folder, [one.folder for one in lineage.adapters], work / "out", "float32")
    assert error(work / "out", wanted) <= 1e-6

    record(work / "merged", None, "made again")
    with pytest.raises(CheckpointError, match=r"was trained on another @merged"):
        lineage_of(work / "dpo", "dpo")
