"""`pretrain` continues checkpoints of other houses, with their own tokenizer or another one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.chat.tokenizer import load_tokenizer
from posttrain.errors import ChatError, CheckpointError, Interrupted
from posttrain.models.known_shapes import known_shape
from posttrain.models.twin import save_twin
from posttrain.pretraining.tokenizer import train_tokenizer
from posttrain.recipe.schema import Pretrain
from posttrain.stages.context import Context, ModelInput, Summary
from posttrain.stages.pretrain import run
from tests.stages.stage_tiny import make_context, write_lines

ENGLISH = [f"The town number {n} lies by the sea, and its people speak {n % 7} languages." for n in range(40)]
CATALAN = [f"La vila número {n} és vora el mar, i la seva gent parla {n % 7} llengües." for n in range(40)]
GPT2 = {"model_type": "gpt2", "num_attention_heads": 4, "n_layer": 2, "n_positions": 128, "tie_word_embeddings": True}
HOUSES = {
    "llama": "HuggingFaceTB/SmolLM2-1.7B",
    "gpt_neox": "EleutherAI/pythia-6.9b",
    "falcon": "tiiuae/falcon-7b",
    "gemma": "google/gemma-2b",
    "gemma3": "google/gemma-3-4b-pt",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "olmo2": "allenai/OLMo-2-1124-7B",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "phi": "microsoft/phi-2",
    "phi3": "microsoft/Phi-3-mini-4k-instruct",
    "qwen2": "Qwen/Qwen2.5-0.5B",
    "qwen3": "Qwen/Qwen3-8B",
}
FAST = {"llama", "gpt_neox"}


def house(name: str) -> dict[str, Any]:
    if name == "gpt2":
        return GPT2
    shape = known_shape(HOUSES[name])
    assert shape is not None
    config = dict(shape.config)
    return config["text_config"] if isinstance(config.get("text_config"), dict) else config


def make_run(folder: Path, config: dict[str, Any]) -> Path:
    """A run with a twin in `base`, another tokenizer in `catalan`, and Catalan texts."""
    for name, texts, size in (("english", ENGLISH, 420), ("catalan", CATALAN, 390)):
        train_tokenizer(texts, size, ["<|im_end|>"], 128, folder / name)
    save_twin({**config, "max_position_embeddings": 128}, load_tokenizer(folder / "english"), folder / "base", 3)
    write_lines(folder / "texts.jsonl", [{"text": text} for text in CATALAN])
    return folder


def stage(folder: Path, trainer: dict[str, Any] | None = None, **more: Any) -> tuple[Pretrain, Context]:
    data = {"sources": [{"path": "texts.jsonl", "weight": 2.0}], "max_length": 32}
    config = Pretrain.model_validate({"kind": "pretrain", "model": "@base", "data": data, **more})
    context = make_context(folder, "more", "pretrain", {"max_steps": 3, "learning_rate": 1e-3, **(trainer or {})})
    if isinstance(config.tokenizer, str):
        given = ModelInput(config.tokenizer, folder / config.tokenizer.removeprefix("@"), None, None)
        context = replace(context, inputs={**context.inputs, "tokenizer": given})
    return config, context


def go(folder: Path, trainer: dict[str, Any] | None = None, **more: Any) -> tuple[Summary, Path]:
    config, context = stage(folder, trainer, **more)
    return run(config, context), context.folder


def rows_of(folder: Path, name: str) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return getattr(model, f"get_{name}_embeddings")().weight.detach()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in [*HOUSES, "gpt2"]]
)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_checkpoint_of_any_house_is_continued(name: str, swapped: bool, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, house(name))
    summary, folder = go(run_dir, tokenizer="@catalan" if swapped else None)
    assert summary.metrics["steps"] == 3
    assert 0 < summary.metrics["last_loss"] < summary.metrics["first_loss"]
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert ("tokenizer_swap" in summary.metrics) == swapped
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whose = load_tokenizer(run_dir / ("catalan" if swapped else "english"))
    assert tokenizer.get_vocab() == whose.get_vocab()
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= model.config.vocab_size


@pytest.mark.parametrize("tied", [True, False])
def test_rows_before_the_first_step_are_the_old_ones_and_the_mean(tied: bool, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, {**house("llama"), "tie_word_embeddings": tied})
    summary, folder = go(run_dir, tokenizer="@catalan", snapshots={"step_zero": True})
    old, new = (load_tokenizer(run_dir / name).get_vocab() for name in ("english", "catalan"))
    for name in ("input", "output"):
        before, after = (rows_of(place, name) for place in (run_dir / "base", folder / "snapshots" / "step-0"))
        mean = before[: len(old)].mean(dim=0)
        assert all(torch.equal(after[row], before[old[token]] if token in old else mean) for token, row in new.items())
        assert not torch.equal(after, rows_of(folder, name))
    figures = summary.metrics["tokenizer_swap"]
    assert figures["shared_rows"] == len(old.keys() & new.keys())
    assert figures["new_rows"] == len(new.keys() - old.keys()) > 0
    tokenizer = load_tokenizer(run_dir / "catalan")
    ids = [token for text in CATALAN for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    begun = {row for token, row in new.items() if token not in old}
    assert figures["share_of_new_tokens"] == pytest.approx(sum(token in begun for token in ids) / len(ids), abs=1e-6)
    untrained = summary.metrics["untrained_token_ids"]
    assert {row for row in begun if row not in ids} <= set(untrained)
    assert not set(untrained) & set(ids)


def test_a_tokenizer_can_be_trained_for_the_model(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, house("llama"))
    summary, folder = go(run_dir, tokenizer={"vocab_size": 400, "reserved_tokens": []})
    assert summary.metrics["tokenizer_swap"]["tokens"] == len(load_tokenizer(folder))
    assert (folder / "tokenizer.json").read_bytes() == (folder / "tokenizer" / "tokenizer.json").read_bytes()


def test_a_swapped_run_that_was_interrupted_ends_the_same(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, house("llama"))
    settings: dict[str, Any] = {"tokenizer": "@catalan", "trainer": {"save_steps": 1}}
    config, context = stage(run_dir, **settings)
    asked = iter([False])
    with pytest.raises(Interrupted, match="step 2 of 3"):
        run(config, replace(context, should_stop=lambda: next(asked, True)))
    summary, resumed = go(run_dir, **settings)
    assert summary.metrics["resumed_from"] == 2
    resumed.rename(run_dir / "resumed")
    _, whole = go(run_dir, **settings)
    assert (run_dir / "resumed" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, house("llama"))
    path = run_dir / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match=r"config.json: its weights are quantised \(gptq\)"):
        go(run_dir)


def test_a_tokenizer_that_ends_no_document_is_refused(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, house("llama"))
    path = run_dir / "base" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["eos_token"]
    path.write_text(json.dumps(settings))
    with pytest.raises(ChatError, match=r"base: has no eos_token"):
        go(run_dir)
