"""Settings of a merge stage: each right one by one, and what is wrong together is named before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from posttrain.recipe.consistency import check_stage
from posttrain.recipe.merge_checks import _USES
from posttrain.recipe.references import check_references, references
from posttrain.recipe.schema import Merge, Pretrain, Sft

TWO = {"one": "@a", "two": "org/model@main"}


def made(**settings: Any) -> Merge:
    return Merge.model_validate({"kind": "merge", **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "@a"},
        {"model": "@a", "base": "auto", "dtype": "float32", "certificate": {"mode": "layers", "mean_kl": 1e-3}},
        {"model": "@a", "scale": 0.5, "base_model": "./base"},
        {"models": TWO, "method": "linear"},
        {"models": TWO, "method": "linear", "weights": {"one": 0.3, "two": 0.7}},
        {"models": TWO, "method": "linear", "weights": {"one": 3.0, "two": 7.0}, "normalize": True},
        {"models": TWO, "method": "slerp", "t": 0.5},
        {"models": {"one": "@a"}, "method": "task_arithmetic", "weights": {"one": -1.0}},
        {"models": TWO, "method": "ties", "density": 0.2, "base_model": "org/base"},
        {"models": TWO, "method": "dare_ties", "density": 0.2, "seed": 7},
    ],
)
def test_what_makes_sense_is_taken(settings: dict[str, Any]) -> None:
    assert list(check_stage("m", made(**settings))) == []


@pytest.mark.parametrize("settings", [{}, {"model": "@a", "models": TWO}, {"model": "@a", "method": "mean"},
                                      {"models": TWO, "method": "ties", "density": 0.0}, {"model": "@a", "base": "nf4"},
                                      {"model": "@a", "certificate": {"mode": "none"}},
                                      {"model": "@a", "certificate": {"relative_error": 0.0}}])  # fmt: skip
def test_the_schema_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        made(**settings)


@pytest.mark.parametrize(
    ("settings", "place", "word"),
    [
        ({"models": TWO}, (), "no method"),
        ({"models": TWO, "method": "ties"}, (), "needs density"),
        ({"models": TWO, "method": "slerp"}, (), "needs t"),
        ({"models": TWO, "method": "linear", "density": 0.5}, ("density",), "no use"),
        ({"models": TWO, "method": "ties", "density": 0.5, "t": 0.5}, ("t",), "no use"),
        ({"models": {"one": "@a"}, "method": "linear"}, ("models",), "1 for linear"),
        ({"models": {**TWO, "three": "@b"}, "method": "slerp", "t": 0.5}, ("models",), "3 for slerp"),
        ({"models": TWO, "method": "linear", "weights": {"one": 0.3, "tow": 0.7}}, ("weights", "tow"), "no model"),
        ({"models": TWO, "method": "linear", "weights": {"one": 0.3}}, ("weights",), "none for 'two'"),
        ({"models": TWO, "method": "linear", "weights": {"one": 0.3, "two": 0.3}}, ("weights",), "add up to 0.6"),
        (
            {"models": TWO, "method": "ties", "density": 1.0, "normalize": True, "weights": {"one": -1.0, "two": 2.0}},
            ("weights",),
            "above 0",
        ),
        ({"models": TWO, "method": "linear", "base": "auto"}, ("base",), "nothing is in use"),
        ({"models": TWO, "method": "linear", "scale": 0.5}, ("scale",), "about one model"),
        ({"model": "@a", "method": "linear"}, ("method",), "several models"),
        ({"model": "@a", "weights": {"one": 1.0}}, ("weights",), "combination"),
        ({"model": "@a", "base_model": "./base"}, ("base_model",), "lineage"),
        ({"model": "@a", "scale": 0.5, "base": "auto"}, ("base",), "nothing is in use"),
        ({"model": "@a", "max_shard_size": "0GB"}, ("max_shard_size",), "no size"),
    ],
)
def test_what_is_wrong_together_is_named(settings: dict[str, Any], place: tuple[str, ...], word: str) -> None:
    (problem,) = check_stage("m", made(**settings))
    assert problem.path == ("stages", "m", *place)
    assert word in problem.found


def test_every_method_of_the_engine_and_no_other_is_known_here() -> None:
    from posttrain.merging.methods import KINDS

    assert {*_USES} == {*KINDS}


def test_every_model_that_is_read_is_a_reference() -> None:
    stage = made(models=TWO, method="linear", base_model="@base")
    assert references(stage) == {("models", "one"): "@a", ("models", "two"): TWO["two"], ("base_model",): "@base"}


def test_a_scaled_full_model_needs_its_base() -> None:
    data = {"sources": [{"path": "./x.jsonl"}]}
    base = Pretrain.model_validate({"kind": "pretrain", "model": "org/x", "data": data})
    full = Sft.model_validate({"kind": "sft", "model": "@base", "data": data})
    kinds = {"base": "pretrain", "full": "sft", "m": "merge"}
    stages = {"base": base, "full": full, "m": made(model="@full", scale=0.5)}
    (problem,) = check_references(stages, kinds)
    assert problem.path == ("stages", "m", "scale")
    stages["m"] = made(model="@full", scale=0.5, base_model="@base")
    assert list(check_references(stages, kinds)) == []


def test_rows_held_out_are_no_setting_of_pretraining() -> None:
    data = {"sources": [{"path": "./x.jsonl"}], "held_out": 16}
    stage = Pretrain.model_validate({"kind": "pretrain", "model": "org/x", "data": data})
    (problem,) = check_stage("base", stage)
    assert problem.path == ("stages", "base", "data", "held_out")
