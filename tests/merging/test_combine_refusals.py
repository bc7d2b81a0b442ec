"""What cannot be combined is refused before anything is written, naming the setting or the tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from merging.test_combine import CONFIG, SHAPES, load, random_weights, save

from posttrain.errors import CheckpointError, UserError
from posttrain.merging.combine import Input, combine
from posttrain.merging.methods import Method, check_method

GOOD = Method("task_arithmetic", (1.0, 1.0))


@pytest.mark.parametrize(
    ("method", "inputs", "base", "word"),
    [
        (Method("tise", (1.0,)), 1, True, "tise"),
        (Method("scale", (1.0, 1.0)), 2, True, "exactly 1"),
        (Method("slerp", t=0.5), 3, True, "exactly 2"),
        (Method("linear", (1.0,)), 1, True, "at least 2"),
        (Method("ties", (), density=0.5), 0, True, "at least 1"),
        (Method("ties", (1.0, 1.0), density=0.5), 2, False, "base"),
        (Method("ties", (1.0, 1.0)), 2, True, "method.density"),
        (Method("ties", (1.0, 1.0), density=0.0), 2, True, "method.density"),
        (Method("ties", (1.0, 1.0), density=1.1), 2, True, "method.density"),
        (Method("ties", (1.0, 1.0), density=float("nan")), 2, True, "method.density"),
        (Method("ties", (1.0, 1.0), density=0.5, seed=1), 2, True, "method.seed"),
        (Method("dare_linear", (1.0, 1.0), density=0.5), 2, True, "method.seed"),
        (Method("dare_ties", (1.0, 1.0), seed=1), 2, True, "method.density"),
        (Method("task_arithmetic", (1.0, 1.0), density=0.5), 2, True, "method.density"),
        (Method("slerp"), 2, True, "method.t"),
        (Method("slerp", t=1.5), 2, True, "method.t"),
        (Method("slerp", (0.5, 0.5), t=0.5), 2, True, "give none"),
        (Method("linear", (0.5, 0.5), t=0.5), 2, True, "method.t"),
        (Method("linear", (0.5,)), 2, True, "one per input"),
        (Method("linear", (0.5, 0.6)), 2, True, "add up to 1"),
        (Method("linear", (2.0, -1.0), normalize=True), 2, True, "above 0"),
        (Method("task_arithmetic", (1.0, float("inf"))), 2, True, "finite"),
        (Method("scale", (1.0,), normalize=True), 1, True, "method.normalize"),
    ],
)
def test_settings_that_do_not_fit(method: Method, inputs: int, base: bool, word: str) -> None:
    with pytest.raises(UserError) as caught:
        check_method(method, inputs, base)
    assert word in str(caught.value)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    base = random_weights(0)
    return [save(tmp_path / "m0", base), *(save(tmp_path / f"m{n}", random_weights(n, base)) for n in (1, 2))]


def refused(models: list[Path], other: Path, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        combine(models[0], [Input(models[1]), Input(other)], tmp_path / "out", GOOD, "float32")
    assert not list(tmp_path.glob("out*"))
    assert str(other) in str(caught.value)
    return str(caught.value)


def test_tensor_that_one_lacks(models: list[Path], tmp_path: Path) -> None:
    weights = load(models[2])
    del weights["model.norm.weight"]
    assert "has no model.norm.weight" in refused(models, save(tmp_path / "other", weights), tmp_path)


def test_tensor_that_the_base_lacks(models: list[Path], tmp_path: Path) -> None:
    other = save(tmp_path / "other", load(models[2]) | {"model.extra.weight": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"m0: has no model\.extra\.weight, which .*other has"):
        combine(models[0], [Input(models[1]), Input(other)], tmp_path / "out", GOOD, "float32")


def test_another_shape(models: list[Path], tmp_path: Path) -> None:
    name = "model.layers.0.input_layernorm.weight"
    message = refused(models, save(tmp_path / "other", load(models[2]) | {name: torch.ones(9)}), tmp_path)
    assert f"{name} has shape [9]" in message


def test_another_vocabulary(models: list[Path], tmp_path: Path) -> None:
    larger = {name: torch.ones(13, 8) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    message = refused(models, save(tmp_path / "other", load(models[2]) | larger), tmp_path)
    assert "lm_head.weight has shape [13, 8]" in message
    assert "vocabulary" in message


def test_another_integer(models: list[Path], tmp_path: Path) -> None:
    other = save(tmp_path / "other", load(models[2]) | {"model.steps": torch.tensor([8])})
    assert "model.steps" in refused(models, other, tmp_path)


def test_setting_that_changes_what_tensors_mean(models: list[Path], tmp_path: Path) -> None:
    heads = [CONFIG | {"num_attention_heads": count} for count in (2, 4)]
    models[0] = save(tmp_path / "base", load(models[0]), heads[0])
    assert "num_attention_heads 4" in refused(models, save(tmp_path / "other", load(models[2]), heads[1]), tmp_path)


@pytest.mark.parametrize(
    "method",
    [GOOD, Method("ties", (1.0, 1.0), density=0.1), Method("dare_linear", (1.0, 1.0), density=0.01, seed=0)],
    ids=lambda method: method.kind,
)
def test_nan_is_not_hidden_by_what_a_method_drops(method: Method, models: list[Path], tmp_path: Path) -> None:
    weights = load(models[2])
    weights["model.layers.0.self_attn.q_proj.weight"][5, 5] = float("nan")
    other = save(tmp_path / "other", weights)
    with pytest.raises(CheckpointError, match=r"other: model\.layers\.0\.self_attn\.q_proj\.weight"):
        combine(models[0], [Input(models[1]), Input(other)], tmp_path / "out", method, "float32")
    assert not list(tmp_path.glob("out*"))


def test_overflow_of_float16(models: list[Path], tmp_path: Path) -> None:
    for name in ("model.layers.0.input_layernorm.weight", "model.norm.weight"):  # combined, and only cast
        for index, folder in enumerate(models):
            weights = {**random_weights(0), name: torch.full(SHAPES[name], 7e4)}
            if name != "model.norm.weight":
                weights[name] += index
            models[index] = save(folder.with_name(f"{folder.name} {name}"), weights)
        with pytest.raises(CheckpointError, match="bfloat16"):
            combine(models[0], [Input(m) for m in models[1:]], tmp_path / "out", GOOD, "float16")
        assert not list(tmp_path.glob("out*"))


def test_inputs_that_say_nothing(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a model nor adapters"):
        combine(models[0], [Input(), Input(models[1])], tmp_path / "out", GOOD, "float32")
    inputs = [Input(models[1]), Input(adapters=(tmp_path / "adapter",))]
    with pytest.raises(UserError, match="without a base"):
        combine(None, inputs, tmp_path / "out", Method("slerp", t=0.5), "float32")


def test_existing_folder_and_folder_inside_a_source(models: list[Path], tmp_path: Path) -> None:
    inputs = [Input(models[1]), Input(models[2])]
    with pytest.raises(UserError, match="exists already"):
        combine(models[0], inputs, models[1], GOOD, "float32")
    with pytest.raises(UserError, match="lies inside"):
        combine(models[0], inputs, models[1] / "out", GOOD, "float32")
