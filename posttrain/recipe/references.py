"""How the stages of a recipe hang together: references, what each stage leaves, order, and settings of several keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from posttrain.recipe.describe import nearest
from posttrain.recipe.problems import Problem
from posttrain.recipe.schema import Dpo, Evaluate, Merge, Pretrain, Publish, Recipe, Sft, Stage
from posttrain.recipe.yaml12 import KeyPath

Stages = Mapping[str, Stage]
"""Stages that are valid by themselves, by name."""

_LEAVES = {"pretrain": "a model", "sft": "a model", "dpo": "a model", "merge": "a model", "evaluate": "a report",
           "publish": "a published folder"}  # fmt: skip


def references(stage: Stage) -> dict[KeyPath, str]:
    """Every place of a stage where a `@stage` may stand: path inside the stage -> the text there."""
    found: dict[KeyPath, str] = {}
    if isinstance(stage, (Evaluate, Merge)):
        found |= {("models", name): model for name, model in stage.models.items()}
    if isinstance(stage, (Pretrain, Sft, Dpo, Merge, Publish)) and stage.model is not None:
        found[("model",)] = stage.model
    if isinstance(stage, Pretrain) and isinstance(stage.tokenizer, str):
        found[("tokenizer",)] = stage.tokenizer
    if isinstance(stage, Merge) and stage.base_model is not None:
        found[("base_model",)] = stage.base_model
    if isinstance(stage, Publish) and stage.report is not None:
        found[("report",)] = stage.report
    return found


def dependencies(stage: Stage) -> list[str]:
    """Names of the stages that a stage refers to, without repetition."""
    return list(dict.fromkeys(text[1:] for text in references(stage).values() if text.startswith("@")))


def execution_order(recipe: Recipe) -> list[str]:
    """Stage names in the order they can run: the recipe's own order wherever that is possible.

    Raises:
        ValueError: a cycle; `load_recipe` has refused such a recipe.
    """
    waiting = {name: set(dependencies(stage)) for name, stage in recipe.stages.items()}
    order: list[str] = []
    while waiting:
        ready = next((name for name, needs in waiting.items() if needs <= set(order)), None)
        if ready is None:
            raise ValueError(f"stages refer to each other in a circle: {', '.join(waiting)}")
        order.append(ready)
        del waiting[ready]
    return order


def check_references(stages: Stages, kinds: Mapping[str, str]) -> Iterator[Problem]:
    """Yields what is wrong with `@stage` references, and with methods given where they lead.

    Args:
        stages: the stages that are valid by themselves.
        kinds: name -> kind of every stage of the recipe; "" where it is not known.
    """
    circles = _circles(stages)
    for name, stage in stages.items():
        for place, text in references(stage).items():
            path = ("stages", name, *place)
            if name in circles and text[1:] in circles[name] and text.startswith("@"):
                if name == circles[name][0]:
                    way = " -> ".join([*circles[name], name])
                    yield Problem(path, f"stages refer to each other in a circle: {way}", "break it at one of them")
                continue
            yield from _check_reference(path, text, kinds, wants_report=place == ("report",))
        if name not in circles:
            yield from _check_adapters(name, stage, stages)


def _check_reference(path: KeyPath, text: str, kinds: Mapping[str, str], *, wants_report: bool) -> Iterator[Problem]:
    if not text.strip():
        yield Problem(path, "is empty", "give a hub id (owner/name), a path, or @stage")
    elif not text.startswith("@"):
        if wants_report:
            yield Problem(path, f"{text!r} is no reference to a stage", "give @NAME of a stage of kind evaluate")
    elif text[1:] not in kinds:
        yield Problem(path, f"there is no stage `{text[1:]}`", nearest(text[1:], list(kinds)))
    elif (leaves := _LEAVES.get(kinds[text[1:]])) and leaves != ("a report" if wants_report else "a model"):
        wanted = [
            name for name, kind in kinds.items() if _LEAVES.get(kind) == ("a report" if wants_report else "a model")
        ]
        todo = f"refer to one of: {', '.join('@' + name for name in wanted)}" if wanted else "refer to another stage"
        yield Problem(path, f"{text} leaves {leaves}, not {'a report' if wants_report else 'a model'}", todo)


def _circles(stages: Stages) -> dict[str, list[str]]:
    """Stage -> the circle of references it is part of, from its first member in the recipe's order."""
    found: dict[str, list[str]] = {}
    for start in stages:
        trail = _way_back(start, stages)
        if trail and start not in found:
            found |= dict.fromkeys(trail, trail)
    return found


def _way_back(start: str, stages: Stages) -> list[str]:
    """The shortest way from a stage along its references back to itself, or nothing."""
    ways = [[start]]
    seen: set[str] = set()
    for way in ways:  # grows while it is read: breadth first
        for name in dependencies(stages[way[-1]]):
            if name == start:
                return way
            if name in stages and name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return []


def adapter_methods(name: str, stages: Stages, seen: frozenset[str] = frozenset()) -> list[str] | None:
    """Methods (`lora`, `qlora`, `dora`) of the adapters that a stage's model stands on, the first one first.

    Empty for a full model; None where the recipe does not tell: the model comes from elsewhere, or the
    stage is itself at fault.
    """
    stage = stages.get(name)
    if isinstance(stage, (Pretrain, Merge)):
        return []
    if not isinstance(stage, (Sft, Dpo)) or name in seen:
        return None
    above = adapter_methods(stage.model[1:], stages, seen | {name}) if stage.model.startswith("@") else None
    method = stage.method.kind if stage.method else "inherit"
    if method == "inherit":
        return above
    if method == "full":
        return None if above else []
    if method == "continue":
        return above if above and isinstance(stage, Dpo) else None
    return [*(above or []), method]


def _check_adapters(name: str, stage: Stage, stages: Stages) -> Iterator[Problem]:
    """Yields methods that do not fit the model they start from; silent where that is not a stage of the recipe."""
    method = stage.method.kind if isinstance(stage, (Sft, Dpo)) and stage.method else ""
    if isinstance(stage, Sft) and method == "continue":
        todo = "give lora, qlora, dora or full"
        yield Problem(("stages", name, "method"), "only a dpo stage continues its parent's adapter", todo)
        return
    model = stage.model if isinstance(stage, (Pretrain, Sft, Dpo, Merge, Publish)) else None
    if model is None or not model.startswith("@"):
        return
    above = adapter_methods(model[1:], stages)
    if above is None:
        return
    if isinstance(stage, Merge):
        yield from _check_merge(name, stage, above)
    elif method == "continue" and not above:
        found = f"{model} leaves a full model, so there is no adapter to continue"
        yield Problem(("stages", name, "method"), found, "remove method, or give lora, qlora, dora or full")
    elif above and (method == "full" or isinstance(stage, (Pretrain, Publish))):
        key = "method" if method == "full" else "model"
        found = f"{model} leaves an adapter, and this stage needs a standalone model"
        yield Problem(("stages", name, key), found, f'merge it first: {{kind: merge, model: "{model}"}}')


def _check_merge(name: str, stage: Merge, above: list[str]) -> Iterator[Problem]:
    if not above and stage.scale is None:
        found = f"{stage.model} leaves a full model: there is no adapter to merge"
        yield Problem(("stages", name, "model"), found, f"use {stage.model} directly and remove this stage")
    elif not above and stage.base_model is None:
        found = f"{stage.model} leaves a full model, and scale works on its difference to a base"
        yield Problem(("stages", name, "scale"), found, "give base_model")
    elif stage.base in ("dequantized", "auto") and "qlora" not in above:
        found = f"{stage.model} was not trained on a quantised base"
        yield Problem(("stages", name, "base"), found, "remove it, or set base: original")
