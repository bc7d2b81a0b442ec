"""Gates: spelling checked first, bounds judged on figures and on differences in either direction."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.errors import UserError
from posttrain.evaluation.gates import GateRule, check_gates, judge
from posttrain.evaluation.questions import CheckRule
from posttrain.evaluation.suites import Suite
from posttrain.recipe.consistency import METRICS

SUITE = Suite("qa", "generate", [], rules=(CheckRule("right", "exact", "answer"),))
MODELS = ["base", "aligned"]


def tables() -> list[dict[str, Any]]:
    right = {
        "unit": "share",
        "models": {"aligned": {"value": 0.74, "low": 0.67, "high": 0.80, "rows": 150}},
        "differences": [{"model": "aligned", "minus": "base", "value": 0.25, "low": 0.1, "high": 0.4, "rows": 150}],
        "undecided": {},
    }
    return [{"name": "qa", "metrics": {"right": right}}]


@pytest.mark.parametrize(
    ("gate", "passed"),
    [
        (GateRule("qa", "right", "aligned", min=0.74), True),
        (GateRule("qa", "right", "aligned", min=0.75), False),
        (GateRule("qa", "right", "aligned", max=0.74), True),
        (GateRule("qa", "right", "aligned", max=0.73), False),
        (GateRule("qa", "right", "aligned", interval_above=0.67), False),  # above, not at
        (GateRule("qa", "right", "aligned", minus="base", min=0.25, interval_above=0), True),
        (GateRule("qa", "right", "base", minus="aligned", max=-0.25), True),
        (GateRule("qa", "right", "base", minus="aligned", interval_above=-0.4), False),
        (GateRule("qa", "right", "base", minus="aligned", interval_above=-0.41), True),
        (GateRule("qa", "right", "base", min=0), False),  # not measured
    ],
)
def test_bounds(gate: GateRule, passed: bool) -> None:
    check_gates([gate], [SUITE], MODELS)
    assert judge(gate, tables())["passed"] is passed


@pytest.mark.parametrize(
    ("gate", "where", "todo"),
    [
        (GateRule("qq", "right", "aligned", min=0), "require[0].suite", "there are: qa"),
        (GateRule("qa", "rigth", "aligned", min=0), "require[0].metric", "did you mean right"),
        (GateRule("qa", "right", "alined", min=0), "require[0].model", "did you mean aligned"),
        (GateRule("qa", "right", "aligned", minus="instruct", min=0), "require[0].minus", "there are: base, aligned"),
        (GateRule("qa", "right", "aligned", minus="aligned", min=0), "require[0].minus", "another model"),
        (GateRule("qa", "right", "aligned"), "require[0]", "give `min`"),
    ],
)
def test_gates_that_cannot_be_judged_are_refused(gate: GateRule, where: str, todo: str) -> None:
    with pytest.raises(UserError) as caught:
        check_gates([gate], [SUITE], MODELS)
    assert caught.value.where == where
    assert todo in caught.value.todo


@pytest.mark.parametrize("kind", ["bits_per_byte", "preference", "generate"])
def test_recipes_know_the_figures_of_every_suite(kind: str) -> None:
    rules = (CheckRule("right", "stops"),) if kind == "generate" else ()
    units = Suite("suite", kind, [], rules=rules).units()
    assert [name for name in units if name != "right"] == list(METRICS[kind])
