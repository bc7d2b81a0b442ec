"""Architectures by arithmetic are the transformers classes, tensor by tensor."""

from __future__ import annotations

import pytest
from estimate_tiny import FAMILIES, tiny_config

from posttrain.errors import CheckpointError
from posttrain.estimate.families import by_arithmetic
from posttrain.estimate.shapes import architecture_of, by_class
from posttrain.models.known_shapes import known_ids, known_shape


@pytest.mark.parametrize("model_id", known_ids())
def test_a_known_shape_is_its_class(model_id: str) -> None:
    shape = known_shape(model_id)
    assert shape is not None
    found, built = by_arithmetic(shape.config), by_class(shape.config, model_id)
    assert found is not None
    assert {one.name: one for one in found.tensors} == {one.name: one for one in built.tensors}
    assert found.parameters == shape.parameters
    assert (found.tied, found.layers, found.vocabulary) == (built.tied, built.layers, built.vocabulary)
    if shape.active_parameters is not None:
        embedding = found.vocabulary * found.block.hidden
        norms = sum(one.numel for one in found.of_kind("norm"))
        assert found.matmul_parameters == shape.active_parameters - embedding - norms


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_config_is_its_class(kind: str) -> None:
    config = tiny_config(kind).to_dict()
    found, built = by_arithmetic(config), by_class(config, kind)
    assert found is not None
    assert {one.name: one for one in found.tensors} == {one.name: one for one in built.tensors}
    assert found.tied == built.tied
    assert (found.block.hidden, found.block.heads) == (64, 4)


def test_a_family_that_is_not_known_is_asked_itself() -> None:
    config = {"model_type": "stablelm", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 4, "intermediate_size": 96, "vocab_size": 128}
    assert by_arithmetic(config) is None
    found = architecture_of(config, "x")
    assert not found.known
    assert found.block.mlp == 96
    assert found.parameters == sum(one.numel for one in found.tensors) > 128 * 64


def test_the_language_model_of_a_multimodal_config_counts() -> None:
    text = tiny_config("llama").to_dict()
    assert architecture_of({"model_type": "llava", "text_config": text}, "x") == architecture_of(text, "x")


def test_a_config_that_nothing_knows_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no model can be built"):
        architecture_of({"model_type": "no-such-architecture"}, "somewhere")


def test_another_vocabulary_moves_embedding_and_head_alone() -> None:
    found = architecture_of(tiny_config("llama").to_dict(), "x")
    grown = found.with_vocabulary(520)
    assert grown.parameters - found.parameters == 2 * 8 * 64
