"""Policies are loaded, grown and saved: a chain of adapters read back from disk is the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from posttrain.errors import CheckpointError, StageError
from posttrain.models.lineage import Lineage, Link, Quantization
from posttrain.models.load import (
    TRAINED,
    Adapter,
    add_adapter,
    continue_adapter,
    load_base,
    load_policy,
    untrained_rows,
)
from posttrain.models.save import save_adapter, save_full, verify_saved_adapter, verify_saved_model
from posttrain.training.dpo import build_dpo_trainer
from posttrain.training.sft import build_sft_trainer
from tests.training.spine_tiny import PAD, arguments, make_model, make_tokenizer, save_base

NF4 = Quantization("nf4", True, "float32")
ALL = Adapter(r=4, lora_alpha=8, lora_dropout=0.3, target_modules="all-linear")
IDS = torch.tensor([[256, 3, 4, 257, 10, 256, 9, 257]])
WEIGHTS = "adapter_model.safetensors"


def load(lineage: Lineage) -> Any:
    return load_policy(lineage, torch.float32, "cpu", "sdpa")


def move(model: Any, seed: int = 7) -> Any:
    """Stands for training: every trainable weight moves."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.05 * torch.randn_like(param))
    return model


def grow(folder: Path, name: str, lineage: Lineage, adapter: Adapter = ALL, rows: tuple[int, ...] = ()) -> Any:
    """Trains one more adapter on a lineage and saves it; returns the live model and the new lineage."""
    model = move(add_adapter(load(lineage).requires_grad_(False), adapter, list(rows)), seed=len(name))
    save_adapter(model, folder / name)
    return model.eval(), lineage.grown(Link(folder / name, f"@{name}", None), lineage.quantization)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    save_base(folder / "tied", make_model(tie=True))
    save_base(folder / "untied", make_model(tie=False))
    return folder


@pytest.mark.parametrize("quantization", [None, NF4], ids=["lora", "qlora"])
@pytest.mark.parametrize("base", ["tied", "untied"])
def test_a_chain_read_from_disk_is_the_trained_model(
    bases: Path, tmp_path: Path, base: str, quantization: Quantization | None
) -> None:
    lineage = Lineage(Link(bases / base, base, None), (), quantization)
    seen = [logits(load(lineage))]
    for name, rows in (("sft", (256, 257)), ("dpo", ()), ("more", ())):
        model, lineage = grow(tmp_path, name, lineage, rows=rows)
        live = logits(model)
        assert torch.equal(logits(load(lineage)), live)
        assert all((live - before).abs().max() > 1e-2 for before in seen)  # each adapter does something
        seen.append(live)
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained
    assert all(f".{TRAINED}." in name for name in trained)
    saved = load_file(tmp_path / "dpo" / WEIGHTS)
    assert all("lora_" in name for name in saved)  # neither parents, nor base, nor token rows
    tokens = [name for name in load_file(tmp_path / "sft" / WEIGHTS) if "trainable_tokens" in name]
    assert len(tokens) == (1 if base == "tied" else 2)


@pytest.mark.parametrize(
    ("adapter", "rows"),
    [
        (Adapter(4, 8, 0.0, ["q_proj", "down_proj"], use_dora=True), ()),
        (
            Adapter(4, 8, 0.0, "all-linear", use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}),
            (),
        ),
        (Adapter(4, 8, 0.0, ["q_proj"], modules_to_save=["embed_tokens", "lm_head"]), ()),
        (Adapter(4, 8, 0.0, ["q_proj"]), (256,)),
    ],
    ids=["dora", "patterns", "modules_to_save", "token_rows"],
)
def test_every_kind_of_adapter_comes_back_above_another(
    bases: Path, tmp_path: Path, adapter: Adapter, rows: tuple[int, ...]
) -> None:
    _, lineage = grow(tmp_path, "plain", Lineage(Link(bases / "untied", "b", None)))
    model, lineage = grow(tmp_path, "second", lineage, adapter, rows)
    assert torch.equal(logits(load(lineage)), logits(model))
    model, lineage = grow(tmp_path, "third", lineage)
    assert torch.equal(logits(load(lineage)), logits(model))


def test_what_is_loaded_is_frozen_and_what_is_added_trains_in_fp32(bases: Path, tmp_path: Path) -> None:
    _, lineage = grow(tmp_path, "sft", Lineage(Link(bases / "tied", "b", None), (), NF4), rows=(256,))
    policy = load_policy(lineage, torch.bfloat16, "cpu", "sdpa")
    assert not any(param.requires_grad for param in policy.parameters())
    assert not policy.training
    grown = add_adapter(policy, ALL, [])
    trained = {name: param.dtype for name, param in grown.named_parameters() if param.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert all(f".{TRAINED}." in name for name in trained)
    assert torch.equal(logits(grown), logits(load_policy(lineage, torch.bfloat16, "cpu", "sdpa")))  # nothing yet


def test_a_frozen_parent_has_no_dropout(bases: Path, tmp_path: Path) -> None:
    _, lineage = grow(tmp_path, "sft", Lineage(Link(bases / "tied", "b", None)))
    model = add_adapter(load(lineage), Adapter(4, 8, 0.0, "all-linear"), []).train()
    assert torch.equal(logits(model), logits(model))
    own = add_adapter(load(Lineage(lineage.base)), ALL, []).train()
    move(own)
    assert not torch.equal(logits(own), logits(own))  # the one in training keeps its own


@pytest.mark.parametrize("quantization", [None, NF4], ids=["lora", "qlora"])
def test_an_adapter_goes_on_from_its_very_values(
    bases: Path, tmp_path: Path, quantization: Quantization | None
) -> None:
    _, lineage = grow(tmp_path, "sft", Lineage(Link(bases / "tied", "b", None), (), quantization), rows=(256, 257))
    model, lineage = grow(tmp_path, "dpo", lineage)
    going_on = continue_adapter(lineage, torch.float32, "cpu", "sdpa").eval()
    assert torch.equal(logits(going_on), logits(model))
    build_dpo_trainer(going_on, make_tokenizer(), arguments(tmp_path, 1), 64)  # TRL would round to bf16 here
    assert torch.equal(logits(going_on.eval()), logits(model))
    trained = {name: param.dtype for name, param in going_on.named_parameters() if param.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert all(f".{TRAINED}." in name for name in trained)
    save_adapter(move(going_on), tmp_path / "further")
    again = Lineage(lineage.base, (lineage.adapters[0], Link(tmp_path / "further", "@f", None)), quantization)
    assert torch.equal(logits(load(again)), logits(going_on.eval()))


def test_only_an_adapter_can_be_continued(bases: Path) -> None:
    with pytest.raises(CheckpointError, match="is not an adapter, there is nothing to continue"):
        continue_adapter(Lineage(Link(bases / "tied", "owner/base", None)), torch.float32, "cpu", "sdpa")


def test_trainers_leave_the_values_of_a_new_adapter_alone(bases: Path, tmp_path: Path) -> None:
    lineage = Lineage(Link(bases / "tied", "b", None), (), NF4)
    model = move(add_adapter(load(lineage), ALL, [256]))
    before = {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}
    build_sft_trainer(model, make_tokenizer(), arguments(tmp_path, 1))
    after = {name: param for name, param in model.named_parameters() if param.requires_grad}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_foreign_adapter_is_not_put_on_another_base(bases: Path, tmp_path: Path) -> None:
    grow(tmp_path, "sft", Lineage(Link(bases / "tied", "b", None)))
    small = save_base(tmp_path / "small", make_model(num_hidden_layers=1))
    wrong = Lineage(Link(small, "small", None), (Link(tmp_path / "sft", "@sft", None),))
    with pytest.raises(CheckpointError, match="does not have"):
        load(wrong)


def test_untrained_rows_are_found_by_their_looks() -> None:
    model = make_model()
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[10] = 0
        weight[11] *= 0.01
        weight[13] = weight[12]
    assert untrained_rows(model, [9, 10, 11, 12, 13, 14]) == [10, 11, 12, 13]
    assert untrained_rows(model, [9, 12]) == []  # one of a pair alone cannot be told
    assert untrained_rows(model, []) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tie", [True, False])
def test_a_whole_model_is_saved_in_its_dtype_and_with_its_ties(tmp_path: Path, dtype: torch.dtype, tie: bool) -> None:
    model = make_model(tie=tie)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_full(model, tmp_path, dtype)
    make_tokenizer().save_pretrained(tmp_path)
    verify_saved_model(model, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    assert ("lm_head.weight" in saved) == (not tie)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)  # as any user loads it
    assert plain.dtype == dtype
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tie
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])  # the live model keeps its own
        assert torch.equal(plain.state_dict()[name], tensor.to(dtype))


def test_fused_experts_are_saved_and_verified(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        bos_token_id=None,
        eos_token_id=257,
        pad_token_id=PAD,
    )
    model = MixtralForCausalLM(config)
    for name in ("fresh", "again"):
        save_full(model, tmp_path / name, torch.bfloat16)
        make_tokenizer().save_pretrained(tmp_path / name)
        verify_saved_model(model, tmp_path / name)
        model = load_base(tmp_path / name, torch.float32, "cpu", "sdpa")


def damage(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "model.norm.weight holds values that are not finite"),
        (
            lambda t: t["model.norm.weight"][:1].fill_(float("inf")),
            "model.norm.weight holds values that are not finite",
        ),
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight was not saved"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model.norm.weight was saved as \(3,\), not \(64,\)",
        ),
        (lambda t: t.update({"more": torch.ones(3)}), r"more was saved as \(3,\), not None"),
    ],
)
def test_a_model_that_was_not_saved_well_is_found(tmp_path: Path, change: Any, found: str) -> None:
    model = make_model()
    save_base(tmp_path, model)
    damage(tmp_path / "model.safetensors", change)
    with pytest.raises(StageError, match=found):
        verify_saved_model(model, tmp_path)


def test_an_adapter_that_was_not_saved_well_is_found(bases: Path, tmp_path: Path) -> None:
    model = add_adapter(load(Lineage(Link(bases / "tied", "b", None))), ALL, [256])
    save_adapter(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", WEIGHTS}
    assert (tmp_path / WEIGHTS).stat().st_mode & 0o777 == 0o644
    with pytest.raises(StageError, match="every lora_B is zero: the adapter changes nothing"):
        verify_saved_adapter(tmp_path)
    save_adapter(move(model), tmp_path)
    verify_saved_adapter(tmp_path)
    first = sorted(load_file(tmp_path / WEIGHTS))[0]
    damage(tmp_path / WEIGHTS, lambda tensors: tensors[first].view(-1)[:1].fill_(float("nan")))
    with pytest.raises(StageError, match="holds values that are not finite"):
        verify_saved_adapter(tmp_path)
