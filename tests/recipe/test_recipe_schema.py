"""The JSON Schema that editors complete recipes with, and what the schema classes promise."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from posttrain.recipe.json_schema import recipe_schema, trainer_schema
from posttrain.recipe.schema import Dpo, Method, Recipe
from posttrain.recipe.trainer_lists import settable_fields


@pytest.fixture(scope="module")
def schema():
    return recipe_schema()


def test_it_is_a_schema_of_recipes(schema):
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["required"]) == {"name", "stages"}
    stages = schema["properties"]["stages"]
    assert "discriminator" in str(stages)


def test_trainer_blocks_list_the_installed_fields(schema):
    for name, kind in (("Pretrain", "pretrain"), ("Sft", "sft"), ("Dpo", "dpo")):
        trainer = schema["$defs"][name]["properties"]["trainer"]
        assert trainer["additionalProperties"] is False
        assert trainer["properties"].keys() == settable_fields(kind).keys()
        assert all("description" in field for field in trainer["properties"].values())


def test_fields_have_types_choices_and_ranges():
    fields = trainer_schema("dpo")["properties"]
    assert fields["beta"]["type"] == "number"
    assert fields["beta"]["exclusiveMinimum"] == 0
    assert "cosine" in fields["lr_scheduler_type"]["enum"]
    assert fields["lr_scheduler_kwargs"]["anyOf"] == [{"type": "object"}, {"type": "null"}]
    assert fields["loss_type"]["anyOf"][0]["items"]["enum"][0] == "sigmoid"
    assert fields["max_steps"]["type"] == "integer"
    assert "default" not in fields["optim"]
    assert (fields["save_total_limit"]["default"], fields["gradient_checkpointing"]["default"]) == (2, False)


def test_keys_are_described_by_their_docstrings(schema):
    definitions = schema["$defs"]
    assert definitions["Data"]["properties"]["max_dropped"]["description"].startswith("Largest share of rows")
    assert definitions["QloraSettings"]["properties"]["trainable_tokens"]["description"].startswith("Embedding rows")
    assert definitions["Merge"]["properties"]["seed"]["description"].startswith("Replaces the recipe's seed")
    assert definitions["Method"]["anyOf"][1]["properties"]["continue"]["description"]


@pytest.mark.parametrize("given", ["full", "continue", {"qlora": None}, {"lora": {"r": 4}}, {"continue": True}])
def test_a_method_dumps_only_what_was_given(given):
    method = Method.model_validate(given)
    dumped = method.model_dump(by_alias=True, mode="json")
    assert list(dumped) == [method.kind]
    assert Method.model_validate(dumped) == method


def test_infinite_numbers_are_refused_everywhere():
    with pytest.raises(ValidationError, match="finite"):
        Dpo.model_validate({"kind": "dpo", "model": "m", "data": {"sources": [{"path": "p", "weight": float("inf")}]}})


def test_recipes_are_frozen():
    recipe = Recipe.model_validate({"name": "r", "stages": {"m": {"kind": "merge", "model": "x"}}})
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
