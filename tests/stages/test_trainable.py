"""What a stage trains: the method that fits its parent, the parameters that take gradients, the rows of new tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.artifact import Record, write_record
from posttrain.errors import RecipeError
from posttrain.merging.checkpoint import open_checkpoint
from posttrain.models.lineage import Lineage, Link, Quantization, lineage_of
from posttrain.models.load import TRAINED
from posttrain.models.new_tokens import NewToken, write_new_tokens
from posttrain.models.save import save_adapter
from posttrain.recipe.schema import Method
from posttrain.stages.parents import resolve_method
from posttrain.stages.setup import Machine, assert_trainable
from posttrain.stages.trainable import Policy, load_trainable
from tests.stages.stage_tiny import make_context
from tests.training.spine_tiny import make_model, make_tokenizer, save_base

MACHINE = Machine("cpu", "sdpa", torch.float32)
CONTROL = [256, 257]
NF4 = Quantization("nf4", True, "float32")


def method(value: Any) -> Method:
    return Method.model_validate(value)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    return tmp_path


def load(
    run: Path, parents: Lineage, value: Any, control: list[int] | None = None, machine: Machine = MACHINE
) -> Policy:
    context = make_context(run, "dpo", "dpo")
    ids = CONTROL if control is None else control
    return load_trainable(parents, method(value), machine, context, ids, make_tokenizer().get_vocab())


def on_base(run: Path, quantization: Quantization | None = None) -> Lineage:
    return Lineage(Link(run / "base", "@base", None), (), quantization)


def on_adapter(run: Path, value: Any) -> Lineage:
    """Leaves an SFT adapter in the run and returns what stands on it."""
    policy = load(run, on_base(run), value)
    save_adapter(policy.model, run / "sft")
    lineage = policy.parents.grown(Link(run / "sft", "@sft", "f"), policy.quantization)
    record = Record("sft", "sft", 1, "f", {}, lineage=lineage.as_dict(run))
    write_record(run / "sft", record)
    return lineage_of(run / "sft", "@sft")


def trained_names(policy: Policy) -> set[str]:
    return {name for name, param in policy.model.named_parameters() if param.requires_grad}


@pytest.mark.parametrize("spread", ["fsdp", "deepspeed"])
def test_four_bits_are_not_cut_over_processes_not_even_those_of_a_parent(run: Path, spread: Any) -> None:
    parents = on_adapter(run, {"qlora": {"r": 2, "bnb_4bit_use_double_quant": True}})
    cut = Machine("cpu", "sdpa", torch.float32, spread)
    with pytest.raises(RecipeError, match="4-bit weights are not cut over processes"):
        load(run, parents, {"qlora": {"r": 2, "bnb_4bit_use_double_quant": True}}, machine=cut)


def test_full_trains_every_weight_in_fp32(run: Path) -> None:
    policy = load(run, on_base(run), "full")
    assert trained_names(policy) == {name for name, _ in policy.model.named_parameters()}
    assert not policy.is_adapter
    assert assert_trainable(policy.model, "sft")[0] == sum(p.numel() for p in make_model().parameters())
    assert policy.lineage_after(make_context(run, "full", "sft")) == {
        "base": {"folder": "full", "label": "@full", "fingerprint": "print of full"},
        "adapters": [],
        "quantization": None,
    }


@pytest.mark.parametrize("kind", ["lora", "qlora", "dora"])
def test_an_adapter_trains_alone_and_a_second_one_on_it(run: Path, kind: str) -> None:
    parents = on_adapter(run, {kind: {"r": 4}})
    assert parents.quantization == (NF4 if kind == "qlora" else None)
    taken_over = resolve_method(None, parents, "dpo")
    assert taken_over.kind == kind
    assert taken_over.adapter is not None
    assert taken_over.adapter.r == 4
    assert {name.rpartition(".")[2] for name in taken_over.adapter.target_modules} >= {"q_proj", "down_proj"}
    policy = load(run, parents, taken_over.model_dump(by_alias=True))
    names = trained_names(policy)
    assert names
    assert all(f".{TRAINED}." in name and "lora" in name for name in names)
    assert {param.dtype for param in policy.model.parameters() if param.requires_grad} == {torch.float32}
    lineage = policy.lineage_after(make_context(run, "dpo", "dpo"))
    assert [link["label"] for link in (lineage["base"], *lineage["adapters"])] == ["@base", "@sft", "@dpo"]
    assert bool(lineage["quantization"]) == (kind == "qlora")
    if kind == "qlora":
        modules = [name.removesuffix(".weight") for name in open_checkpoint(run / "base").tensors if "proj" in name]
        assert sorted(lineage["quantization"]["modules"]) == sorted(modules)


def test_an_adapter_that_goes_on_replaces_its_parent_in_the_lineage(run: Path) -> None:
    parents = on_adapter(run, {"lora": {"r": 4, "trainable_tokens": "none"}})
    policy = load(run, parents, "continue")
    lineage = policy.lineage_after(make_context(run, "dpo", "dpo"))
    assert [link["label"] for link in lineage["adapters"]] == ["@dpo"]
    assert all(f".{TRAINED}." in name for name in trained_names(policy))


@pytest.mark.parametrize(
    ("parent", "asked", "found"),
    [
        ({"lora": {"r": 4}}, "full", "full on top of an adapter"),
        (None, "continue", "continue, but the model is not an adapter"),
        ({"qlora": {"r": 4}}, "lora", "lora above an adapter trained on a 4-bit base"),
        ({"qlora": {"r": 4}}, "dora", "dora above an adapter trained on a 4-bit base"),
        ({"lora": {"r": 4}}, "qlora", "qlora above an adapter trained on an unquantised base"),
    ],
)
def test_a_method_that_does_not_fit_its_parent_is_refused(run: Path, parent: Any, asked: str, found: str) -> None:
    parents = on_adapter(run, parent) if parent else on_base(run)
    with pytest.raises(RecipeError, match=rf"stages.dpo.method: {found}"):
        resolve_method(method(asked), parents, "dpo")


def test_a_full_model_goes_on_in_full(run: Path) -> None:
    assert resolve_method(None, on_base(run), "dpo").kind == "full"
    assert resolve_method(method("qlora"), on_base(run), "dpo").kind == "qlora"


def test_another_quantisation_than_the_parents_is_refused(run: Path) -> None:
    parents = on_adapter(run, {"qlora": {"r": 4}})
    with pytest.raises(RecipeError, match=r"stages.dpo.method.qlora: quantises the base as .*fp4"):
        load(run, parents, {"qlora": {"bnb_4bit_quant_type": "fp4"}})


def untrained(run: Path, ids: list[int]) -> None:
    """Says in the base's record which tokens it never saw."""
    summary = {"metrics": {"untrained_token_ids": ids}}
    write_record(run / "base", Record("base", "pretrain", 1, "f", {}, summary=summary))


def test_rows_of_control_tokens_are_trained_where_no_training_touched_them(run: Path) -> None:
    assert load(run, on_base(run), "lora").token_rows == [256]  # by its looks: the row of padding is zero
    untrained(run, [3, 257])
    policy = load(run, on_base(run), "lora")
    assert policy.token_rows == [257]
    rows = [param for name, param in policy.model.named_parameters() if "trainable_tokens" in name]
    assert [list(param.shape) for param in rows] == [[1, 64]]
    assert all(param.requires_grad for param in rows)
    assert load(run, on_base(run), {"lora": {"trainable_tokens": "none"}}).token_rows == []
    assert load(run, on_base(run), "lora", control=[]).token_rows == []


def test_rows_that_the_folder_lists_as_new_are_trained_until_something_has_trained_them(run: Path) -> None:
    untrained(run, [257])
    write_new_tokens(run / "base", [NewToken("<|new|>", 260, ("a",)), NewToken("<|more|>", 258, ())])
    for kind in ("lora", "qlora", "dora"):
        assert load(run, on_base(run), kind).token_rows == [257, 258, 260]
    assert load(run, on_base(run), {"lora": {"trainable_tokens": "none"}}).token_rows == []
    assert load(run, on_base(run), "full").token_rows == []  # it trains every row
    parents = on_adapter(run, "lora")
    config = json.loads((run / "sft" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"embed_tokens": [257, 258, 260]}  # tied: the head is the same tensor
    assert load(run, parents, "lora").token_rows == []


def test_named_tokens_are_the_ones_that_train(run: Path) -> None:
    policy = load(run, on_base(run), {"qlora": {"trainable_tokens": ["<|im_end|>", "a"]}})
    assert policy.token_rows == sorted([257, make_tokenizer().get_vocab()["a"]])
    with pytest.raises(RecipeError, match=r"stages.dpo.method.lora.trainable_tokens: '<\|nope\|>' is no token"):
        load(run, on_base(run), {"lora": {"trainable_tokens": ["<|nope|>"]}})
    parents = on_adapter(run, {"lora": {"r": 4}})
    with pytest.raises(RecipeError, match="names tokens, above an adapter"):
        load(run, parents, {"lora": {"trainable_tokens": ["a"]}})


def test_a_second_adapter_leaves_the_parents_token_rows_to_the_parent(run: Path) -> None:
    untrained(run, CONTROL)
    parents = on_adapter(run, {"lora": {"r": 4}})
    config = json.loads((run / "sft" / "adapter_config.json").read_text())
    assert list(config["trainable_token_indices"].values()) == [CONTROL]
    policy = load(run, parents, "lora")
    assert policy.token_rows == []
    assert not any("trainable_tokens" in name for name in trained_names(policy))


def test_the_same_seed_gives_the_same_adapter(run: Path) -> None:
    policies = [load(run, on_base(run), {"lora": {"r": 4}}) for _ in range(2)]
    torch.manual_seed(3)
    policies.append(load(run, on_base(run), {"lora": {"r": 4}}))
    states = [dict(policy.model.named_parameters()) for policy in policies]
    for state in states[1:]:
        assert all(torch.equal(state[name], param) for name, param in states[0].items())
