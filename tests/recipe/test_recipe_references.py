"""The order in which stages run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipe_sample import VALID

from posttrain.recipe.load import load_recipe
from posttrain.recipe.references import adapter_methods, dependencies, execution_order
from posttrain.recipe.schema import Pretrain, Recipe


def chain(parents: dict[str, list[str]]) -> Recipe:
    """A recipe of evaluate stages that refer to those named; only the order matters here."""
    suite = {"name": "s", "kind": "bits_per_byte", "data": [{"path": "x"}]}
    stages = {
        name: {"kind": "evaluate", "models": {"m": "x"} | {p: f"@{p}" for p in needs}, "suites": [suite]}
        for name, needs in parents.items()
    }
    return Recipe.model_validate({"name": "r", "stages": stages})


def test_the_recipes_own_order_is_kept_where_it_can_be(valid):
    recipe = load_recipe(valid, env={}).recipe
    assert execution_order(recipe) == list(recipe.stages)


def test_a_stage_may_refer_to_a_later_one():
    assert execution_order(chain({"a": ["c"], "b": [], "c": []})) == ["b", "c", "a"]


def test_a_circle_is_an_error():
    with pytest.raises(ValueError, match="circle: a, b"):
        execution_order(chain({"a": ["b"], "b": ["a"]}))


@given(st.permutations(range(6)), st.sets(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_every_stage_comes_after_what_it_needs(places, pairs):
    parents: dict[str, list[str]] = {f"s{place}": [] for place in places}
    for one, two in pairs:
        if one < two:
            parents[f"s{two}"].append(f"s{one}")
    order = execution_order(chain(parents))
    assert sorted(order) == sorted(parents)
    assert all(order.index(need) < order.index(name) for name, needs in parents.items() for need in needs)


def test_dependencies_and_adapters(valid):
    stages = load_recipe(valid, env={}).recipe.stages
    assert dependencies(stages["report"]) == ["base", "instruct", "aligned"]
    assert dependencies(stages["release"]) == ["aligned", "report"]
    methods = {name: adapter_methods(name, stages) for name in stages}
    assert methods["base"] == methods["instruct"] == methods["aligned"] == []
    assert methods["sft"] == methods["dpo"] == ["qlora"]
    assert methods["report"] is None


def test_continue_needs_no_known_parent(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(VALID.replace('    model: "@sft"\n', "    model: ./adapter\n    method: continue\n"))
    assert adapter_methods("dpo", load_recipe(path, env={}).recipe.stages) is None


def test_an_adapter_on_an_adapter_is_a_chain(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(VALID.replace('    model: "@sft"\n', '    model: "@sft"\n    method: lora\n'))
    stages = load_recipe(path, env={}).recipe.stages
    assert adapter_methods("dpo", stages) == ["qlora", "lora"]


SWAP = {"kind": "pretrain", "model": "owner/name", "data": {"sources": [{"path": "x.jsonl"}]}}
"""A stage that continues a checkpoint, without a tokenizer."""


def test_a_tokenizer_may_come_from_another_stage():
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    scratch = {"kind": "pretrain", "data": SWAP["data"], "init": size, "tokenizer": {"vocab_size": 300}}
    swapped = {**SWAP, "tokenizer": "@scratch"}
    recipe = Recipe.model_validate({"name": "r", "stages": {"swapped": swapped, "scratch": scratch}})
    assert execution_order(recipe) == ["scratch", "swapped"]
    assert dependencies(recipe.stages["scratch"]) == []


def test_a_tokenizer_swap_is_one_stage_spelled_out_or_not():
    one, two = (Pretrain.model_validate({**SWAP, "tokenizer": "./t", **more}) for more in ({}, {"new_rows": "mean"}))
    assert one == two
    assert (one.new_rows, Pretrain.model_validate(SWAP).new_rows) == ("mean", None)
    with pytest.raises(ValueError, match="give both, or leave it out"):
        Pretrain.model_validate({**SWAP, "new_rows": "mean"})
