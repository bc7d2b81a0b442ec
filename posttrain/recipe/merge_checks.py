"""Settings of a `merge` stage that are right one by one and wrong together."""

from __future__ import annotations

import re
from collections.abc import Iterator

from posttrain.recipe.describe import nearest
from posttrain.recipe.problems import Problem
from posttrain.recipe.schema import Merge
from posttrain.recipe.yaml12 import KeyPath

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:[KMG]I?B)?\s*", re.IGNORECASE)
_USES = {
    "scale": (),
    "linear": ("weights", "normalize"),
    "slerp": ("t",),
    "task_arithmetic": ("weights", "normalize"),
    "ties": ("weights", "normalize", "density"),
    "dare_linear": ("weights", "normalize", "density"),
    "dare_ties": ("weights", "normalize", "density"),
}
"""Method -> the settings it has a use for."""
_NEEDS = {"slerp": "t", "ties": "density", "dare_linear": "density", "dare_ties": "density"}


def check_merge(path: KeyPath, stage: Merge) -> Iterator[Problem]:
    """Yields what the schema class of `merge` cannot see: settings without a use, weights that fit nothing."""
    if not _is_size(stage.max_shard_size):
        yield Problem((*path, "max_shard_size"), f"{stage.max_shard_size!r} is no size", "write 5GB or 500MB")
    if stage.model is not None:
        yield from _check_chain(path, stage)
        return
    if stage.method is None:
        yield Problem(path, "combines `models` by no method", f"give method: {', '.join([*_USES][1:])}")
        return
    if stage.scale is not None:
        yield Problem((*path, "scale"), "is about one model", "give weights, or `model` instead of `models`")
    if stage.base == "auto":
        yield Problem((*path, "base"), "auto, for a combination, which nothing is in use of", "name the base")
    for key in _given(stage):
        if key not in _USES[stage.method]:
            yield Problem((*path, key), f"{stage.method} has no use for it", "remove it")
    needed = _NEEDS.get(stage.method)
    if needed is not None and needed not in _given(stage):
        yield Problem(path, f"{stage.method} needs {needed}", f"add {needed}")
    if stage.method in ("slerp", "linear") and (
        len(stage.models) != 2 if stage.method == "slerp" else len(stage.models) < 2
    ):
        todo = "give two" if stage.method == "slerp" else "give at least two"
        yield Problem((*path, "models"), f"{len(stage.models)} for {stage.method}", todo)
    yield from _check_weights(path, stage)


def _check_chain(path: KeyPath, stage: Merge) -> Iterator[Problem]:
    if stage.method is not None:
        yield Problem((*path, "method"), "combines several models", "give `models` instead of `model`")
    for key in _given(stage):
        yield Problem((*path, key), "is about a combination of `models`", "remove it")
    if stage.scale is None and stage.base_model is not None:
        yield Problem((*path, "base_model"), "is told by the adapter's own lineage", "remove it")
    if stage.scale is not None and stage.base == "auto":
        yield Problem((*path, "base"), "auto, for a scaled delta, which nothing is in use of", "name the base")


def _given(stage: Merge) -> list[str]:
    """Settings of combinations that a stage has."""
    values = {"weights": stage.weights, "normalize": stage.normalize, "density": stage.density, "t": stage.t}
    return [key for key, value in values.items() if value not in (None, False, {})]


def _check_weights(path: KeyPath, stage: Merge) -> Iterator[Problem]:
    for name in stage.weights:
        if name not in stage.models:
            todo = nearest(name, list(stage.models))
            yield Problem((*path, "weights", name), f"there is no model {name!r} in `models`", todo)
    if not stage.weights or set(stage.weights) != set(stage.models):
        if stage.weights and set(stage.weights) < set(stage.models):
            lacking = next(name for name in stage.models if name not in stage.weights)
            yield Problem((*path, "weights"), f"has none for {lacking!r}", "give one for each model, or none")
        return
    if stage.normalize and not all(weight > 0 for weight in stage.weights.values()):
        yield Problem((*path, "weights"), "are not all above 0, with normalize", "change them, or remove normalize")
    elif stage.method == "linear" and not stage.normalize and abs(sum(stage.weights.values()) - 1) > 1e-6:
        found = f"add up to {sum(stage.weights.values()):g}: no mean of models"
        yield Problem((*path, "weights"), found, "change them, or set normalize: true")


def _is_size(text: str) -> bool:
    match = _SIZE.fullmatch(text)
    return match is not None and float(match[1]) > 0
