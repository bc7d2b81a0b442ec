"""Figures that must hold: checked for spelling before the work, judged after it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from posttrain.errors import UserError
from posttrain.evaluation.suites import Suite


@dataclass(frozen=True)
class GateRule:
    """One bound on a figure, or on a difference of two models; shares are 0 to 1, not percent."""

    suite: str
    metric: str
    model: str
    minus: str | None = None
    """Judge `model` minus this model instead of the figure itself."""
    min: float | None = None
    max: float | None = None
    interval_above: float | None = None
    """The lower end of the 95 % interval must lie above this."""

    @property
    def subject(self) -> str:
        """What is judged, in words."""
        return f"{self.suite}: {self.metric} of {self.model}" + (f" minus {self.minus}" if self.minus else "")

    @property
    def bounds(self) -> str:
        """What must hold, in words."""
        parts = [
            ("at least", self.min),
            ("at most", self.max),
            ("95 % interval above", self.interval_above),
        ]
        return ", ".join(f"{words} {bound:g}" for words, bound in parts if bound is not None)


def check_gates(gates: Sequence[GateRule], suites: Sequence[Suite], models: Iterable[str]) -> None:
    """Refuses gates on figures that the report will not have.

    Raises:
        UserError: an unknown suite, metric or model, or a gate without a bound.
    """
    metrics = {suite.name: list(suite.units()) for suite in suites}
    names = list(models)
    for number, gate in enumerate(gates):
        where = f"require[{number}]"
        _known(f"{where}.suite", gate.suite, metrics)
        _known(f"{where}.metric", gate.metric, metrics[gate.suite])
        _known(f"{where}.model", gate.model, names)
        if gate.minus is not None:
            _known(f"{where}.minus", gate.minus, names)
        if gate.minus == gate.model:
            raise UserError(f"{where}.minus", f"compares {gate.model} with itself", "name another model")
        if not gate.bounds:
            raise UserError(where, "no bound", "give `min`, `max` or `interval_above`")


def _known(where: str, name: str, names: Iterable[str]) -> None:
    choices = list(names)
    if name not in choices:
        near = difflib.get_close_matches(name, choices, 1)
        todo = f"did you mean {near[0]}?" if near else f"there are: {', '.join(choices)}"
        raise UserError(where, f"unknown: {name}", todo)


def judge(gate: GateRule, tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the gate in words and figures: `subject`, `bounds`, `unit`, `value`, `low`, `high`, `passed`.

    A gate whose figure could not be measured (no verdict at all) fails, with `value` None.

    Args:
        gate: one that `check_gates` let through.
        tables: what `posttrain.evaluation.suites.table` made of each suite.
    """
    metric = next(table for table in tables if table["name"] == gate.suite)["metrics"][gate.metric]
    figure = _difference(metric, gate.model, gate.minus) if gate.minus else metric["models"].get(gate.model)
    verdict = {**asdict(gate), "subject": gate.subject, "bounds": gate.bounds, "unit": metric["unit"]}
    if figure is None:
        return {**verdict, "value": None, "low": None, "high": None, "passed": False}
    passed = (
        (gate.min is None or figure["value"] >= gate.min)
        and (gate.max is None or figure["value"] <= gate.max)
        and (gate.interval_above is None or figure["low"] > gate.interval_above)
    )
    return {**verdict, "value": figure["value"], "low": figure["low"], "high": figure["high"], "passed": passed}


def _difference(metric: Mapping[str, Any], model: str, minus: str) -> dict[str, float] | None:
    """The paired difference, turned round where the recipe names the earlier model first."""
    for one in metric["differences"]:
        if (one["model"], one["minus"]) == (model, minus):
            return {"value": one["value"], "low": one["low"], "high": one["high"]}
        if (one["model"], one["minus"]) == (minus, model):
            return {"value": -one["value"], "low": -one["high"], "high": -one["low"]}
    return None
