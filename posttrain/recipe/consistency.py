"""Settings of a recipe that are right one by one and wrong together."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.recipe.describe import nearest
from posttrain.recipe.merge_checks import check_merge
from posttrain.recipe.problems import Problem
from posttrain.recipe.schema import Dpo, Evaluate, Gate, Merge, Pretrain, Publish, Sft, Snapshots, Stage, Suite
from posttrain.recipe.slurm_options import check_slurm
from posttrain.recipe.yaml12 import KeyPath

_PAIRS = ("auto", "preference", "transcript_pair")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]*")
METRICS = {
    "bits_per_byte": ("bits_per_byte",),
    "preference": ("accuracy", "accuracy_per_token", "margin", "chosen_logp", "rejected_logp"),
    "generate": ("answer_tokens",),
}
"""Kind of a suite -> the figures it has; of `generate`, beside one for each check."""


def check_stage(name: str, stage: Stage) -> Iterator[Problem]:
    """Yields the problems of one stage that its schema class cannot see."""
    path: KeyPath = ("stages", name)
    if isinstance(stage, (Pretrain, Sft, Dpo)):
        yield from _check_data(path, stage)
        if stage.snapshots == Snapshots():
            yield Problem((*path, "snapshots"), "keeps nothing", "give every, step_zero or powers_of_two")
    if isinstance(stage, Pretrain) and stage.init and stage.data.max_length > stage.init.max_position_embeddings:
        found = (
            f"{stage.data.max_length} is more than init.max_position_embeddings ({stage.init.max_position_embeddings})"
        )
        yield Problem((*path, "data", "max_length"), found, "lower it, or raise max_position_embeddings")
    if isinstance(stage, Evaluate):
        yield from _check_suites(path, stage)
        for index, gate in enumerate(stage.require):
            yield from _check_gate((*path, "require", index), gate, stage)
    if isinstance(stage, Merge):
        yield from check_merge(path, stage)
    if isinstance(stage, Publish) and stage.hub is not None and len(stage.hub.split("/")) != 2:
        yield Problem((*path, "hub"), f"{stage.hub!r} is no hub repository", "write owner/name")


def _check_data(path: KeyPath, stage: Pretrain | Sft | Dpo) -> Iterator[Problem]:
    shapes = [source.shape for source in stage.data.sources]
    if stage.data.held_out is not None and isinstance(stage, Pretrain):
        yield Problem((*path, "data", "held_out"), "is about certificates of adapters", "remove it: pretrain has none")
    if stage.data.history is not None and not isinstance(stage, Sft):
        yield Problem((*path, "data", "history"), "is about conversations with several answers", "remove it: sft alone")
    if stage.data.system is not None and isinstance(stage, Pretrain):
        yield Problem((*path, "data", "system"), "is about conversations", "remove it: pretrain reads texts")
    if stage.data.packing == "wrap":
        if isinstance(stage, Dpo):
            yield Problem((*path, "data", "packing"), "wrap would cut pairs apart", "take bfd")
        elif isinstance(stage, Sft) and set(shapes) != {"text"}:
            todo = "take bfd, or give every source shape: text"
            yield Problem((*path, "data", "packing"), "wrap would cut conversations apart", todo)
    for index, source in enumerate(stage.data.sources):
        here = (*path, "data", "sources", index)
        if isinstance(stage, Dpo) and source.shape not in _PAIRS:
            found = f"{source.shape} rows hold no pairs"
            yield Problem((*here, "shape"), found, f"a dpo stage takes {', '.join(_PAIRS)}")
        elif isinstance(stage, Sft) and source.shape in _PAIRS[1:]:
            todo = "use it in a dpo stage, or name another shape"
            yield Problem((*here, "shape"), f"{source.shape} rows hold pairs, not conversations", todo)
        elif isinstance(stage, Dpo) and source.text_format is not None:
            yield Problem((*here, "text_format"), "makes one text of a row, and dpo needs pairs", "remove it")


def _check_suites(path: KeyPath, stage: Evaluate) -> Iterator[Problem]:
    names: set[str] = set()
    for index, suite in enumerate(stage.suites):
        here = (*path, "suites", index)
        if suite.name in names:
            yield Problem((*here, "name"), f"a second suite is named {suite.name!r}", "give it another name")
        if not _FILE_NAME.fullmatch(suite.name):
            yield Problem((*here, "name"), f"{suite.name!r} cannot name a file", "use letters, digits, `.`, `_`, `-`")
        names.add(suite.name)
        if suite.checks and suite.kind != "generate":
            yield Problem((*here, "checks"), f"a suite of kind {suite.kind} generates nothing", "set kind: generate")
        yield from _check_checks(here, suite)


def _check_checks(path: KeyPath, suite: Suite) -> Iterator[Problem]:
    names: set[str] = set()
    for index, check in enumerate(suite.checks):
        here = (*path, "checks", index)
        if check.name in names:
            yield Problem((*here, "name"), f"a second check is named {check.name!r}", "give it another name")
        names.add(check.name)
        if check.kind == "stops" and (check.field or check.value) is not None:
            yield Problem(here, "a check of kind stops compares with nothing", "remove field and value")
        elif check.kind == "regex" and check.value is not None and (wrong := _regex_error(check.value)):
            yield Problem((*here, "value"), f"{check.value!r} is no regular expression: {wrong}", "correct it")
        elif check.kind != "stops" and check.field is None and check.value is None:
            yield Problem(here, f"a check of kind {check.kind} has nothing to compare with", "give field or value")
        elif check.field is not None and check.value is not None:
            yield Problem(here, "gives both field and value", "keep one of them")


def _regex_error(pattern: str) -> str:
    """What is wrong with a regular expression, or nothing."""
    try:
        re.compile(pattern)
    except re.error as error:
        return str(error)
    return ""


def _check_gate(path: KeyPath, gate: Gate, stage: Evaluate) -> Iterator[Problem]:
    suites = {suite.name: [*(check.name for check in suite.checks), *METRICS[suite.kind]] for suite in stage.suites}
    if gate.suite not in suites:
        yield Problem((*path, "suite"), f"there is no suite {gate.suite!r}", nearest(gate.suite, list(suites)))
    elif gate.metric not in suites[gate.suite]:
        todo = nearest(gate.metric, suites[gate.suite])
        yield Problem((*path, "metric"), f"{gate.suite} has no figure {gate.metric!r}", todo)
    for key, model in (("model", gate.model), ("minus", gate.minus)):
        if model is not None and model not in stage.models:
            yield Problem((*path, key), f"there is no model {model!r} in `models`", nearest(model, list(stage.models)))
    if gate.min is None and gate.max is None and gate.interval_above is None:
        yield Problem(path, "requires nothing", "give min, max or interval_above")
    elif gate.min is not None and gate.max is not None and gate.min > gate.max:
        yield Problem((*path, "min"), f"{gate.min} is above max, {gate.max}", "exchange them")
    elif gate.interval_above is not None and gate.minus is None:
        todo = "add minus: NAME of another model, or use min"
        yield Problem((*path, "interval_above"), "is about the interval of a difference", todo)


def check_runtime(tree: Mapping[str, Any], stages: Mapping[str, Stage]) -> Iterator[Problem]:
    """Yields execution settings that exclude each other, of the recipe's `runtime` with each stage's on top.

    Args:
        tree: the recipe as given, to say which key stands where.
        stages: the stages that are valid by themselves.
    """
    base = _block(tree, "runtime")
    yield from _check_cuts(("runtime",), base, base)
    yield from check_slurm(("runtime", "slurm"), _block(base, "slurm"))
    on_cpu: list[KeyPath] = []
    for name, stage in stages.items():
        own = tree["stages"][name].get("runtime") or {}
        yield from _check_cuts(("stages", name, "runtime"), own, {**base, **own})
        yield from check_slurm(("stages", name, "runtime", "slurm"), _block(own, "slurm"))
        if isinstance(stage, (Pretrain, Sft, Dpo)) and {**base, **own}.get("device") == "cpu":
            on_cpu.append(("stages", name, "runtime", "device") if "device" in own else ("runtime", "device"))
    if tree.get("precision") == "fp16":
        for path in dict.fromkeys(on_cpu):
            yield Problem(path, "a CPU does not train in fp16", "set precision: bf16 or fp32")


def _block(tree: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping under a key, or an empty one: what else stands there is the schema's problem."""
    found = tree.get(key)
    return found if isinstance(found, dict) else {}


def _check_cuts(path: KeyPath, own: Mapping[str, Any], merged: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields two ways of cutting a step given together, where the `own` settings of this place had a part in it."""
    keys = ("micro_batch_tokens", "micro_batch_size")
    given = [key for key in keys if own.get(key) not in (None, "auto")]
    if given and all(merged.get(key) not in (None, "auto") for key in keys):
        todo = "keep one of them" if len(given) == 2 else "set the other, from the recipe's runtime, to null here"
        yield Problem((*path, given[-1]), "micro_batch_tokens and micro_batch_size are both given", todo)
