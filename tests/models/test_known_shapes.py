"""Facts of known models: complete, consistent, and the published parameter counts."""

from __future__ import annotations

import pytest

from posttrain.models.known_shapes import Shape, known_ids, known_shape

PUBLISHED = {  # from the hub's safetensors metadata
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "BSC-LT/salamandra-7b": 7_768_117_248,
}


def shape(model_id: str) -> Shape:
    found = known_shape(model_id)
    assert found is not None
    return found


def test_what_is_unknown_is_none() -> None:
    assert known_shape("nobody/nothing") is None
    assert known_shape("README") is None
    assert known_shape("../shapes/mistralai/Mistral-7B-v0.1") is None


def test_every_file_is_found_by_its_id() -> None:
    assert len(known_ids()) >= 27
    for model_id in known_ids():
        found = shape(model_id)
        assert found.id == model_id
        assert found.architecture.endswith("ForCausalLM")
        assert found.config["model_type"]
        assert found.config["vocab_size"] > 30_000
        assert found.generation_config["eos_token_id"] is not None
        assert found.license


@pytest.mark.parametrize(("model_id", "parameters"), PUBLISHED.items())
def test_published_counts(model_id: str, parameters: int) -> None:
    assert shape(model_id).parameters == parameters


def test_end_ids_of_the_family_that_stops_on_several() -> None:
    assert shape("microsoft/Phi-3-mini-4k-instruct").generation_config["eos_token_id"] == [32000, 32001, 32007]


@pytest.mark.parametrize("model_id", known_ids())
def test_the_config_builds_the_architecture_with_that_many_parameters(model_id: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    facts = shape(model_id)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**facts.config))
    assert type(model).__name__ == facts.architecture
    assert sum(parameter.numel() for parameter in model.parameters()) == facts.parameters
