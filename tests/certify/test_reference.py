"""Step 0 of DPO: our known losses against TRL's own expressions, run on policy = reference."""

from __future__ import annotations

import ast
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from posttrain.certify.reference import LOG2, loss_at_zero, step_zero_problems

PAIRED = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired"]
TYPES = [*PAIRED, "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]


@pytest.fixture(scope="module")
def loss_loop() -> ast.For:
    """The loop over loss types in DPOTrainer._compute_loss, read from TRL's source without importing TRL."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "trainer" / "dpo_trainer.py").read_text()
    loops = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For)]
    (loop,) = [
        node for node in loops if "per_sequence_loss" in ast.unparse(node) and "loss_weight" in ast.unparse(node)
    ]
    return loop


def trl_loss(loop: ast.For, types: list[str], weights: list[float], beta: float, smoothing: float) -> float:
    torch.manual_seed(0)
    mask = torch.tensor([[0, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    per_token = -torch.rand(4, 3) * mask[:, 1:]
    chosen, rejected = per_token.sum(1).chunk(2)
    zero = torch.zeros(2)
    names: dict[str, Any] = {
        "torch": torch,
        "F": F,
        "loss": 0.0,
        "device": "cpu",
        "completion_mask": mask,
        "shift_completion_mask": mask[:, 1:],
        "per_token_logps": per_token,
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
        "self": SimpleNamespace(
            loss_types=types,
            loss_weights=weights,
            beta=beta,
            label_smoothing=smoothing,
            use_weighting=False,
            args=SimpleNamespace(discopop_tau=0.05),
        ),
    }
    names |= dict.fromkeys(
        ("chosen_logratios", "rejected_logratios", "chosen_scores", "rejected_scores", "delta_score"), zero
    )
    module = ast.fix_missing_locations(ast.Module(body=[loop], type_ignores=[]))
    exec(compile(module, "dpo_trainer", "exec"), names)
    return float(names["loss"])


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("name", [name for name in TYPES if name != "sft"])
def test_value_is_trl_s_own(loss_loop: ast.For, name: str, smoothing: float, beta: float) -> None:
    expected = trl_loss(loss_loop, [name], [1.0], beta, smoothing)
    assert loss_at_zero([name], beta=beta, label_smoothing=smoothing) == pytest.approx(expected, rel=1e-5)


def test_every_loss_type_of_trl_is_known(loss_loop: ast.For) -> None:
    compared = {
        node.comparators[0].value
        for node in ast.walk(loss_loop)
        if isinstance(node, ast.Compare)
        and ast.unparse(node.left) == "loss_type"
        and isinstance(node.comparators[0], ast.Constant)
    }
    assert compared == set(TYPES)


def test_weighted_sum_is_trl_s_own(loss_loop: ast.For) -> None:
    types, weights = ["sigmoid", "bco_pair", "ipo"], [0.8, 0.2, 1.0]
    expected = trl_loss(loss_loop, types, weights, 0.1, 0.0)
    assert loss_at_zero(types, weights, beta=0.1) == pytest.approx(expected, rel=1e-5)


def test_values_people_know() -> None:
    assert loss_at_zero(["sigmoid"]) == LOG2 == math.log(2)
    assert loss_at_zero(["hinge"]) == 1
    assert loss_at_zero(["ipo"], beta=0.1) == pytest.approx(25)


def test_losses_that_depend_on_data_are_not_known() -> None:
    assert loss_at_zero(["sft"]) is None
    assert loss_at_zero(["sigmoid", "sft"], [1.0, 0.5]) is None
    assert loss_at_zero(["sigmoid", "sft"], [1.0, 0.0]) == LOG2
    assert loss_at_zero(["sigmoid"], use_weighting=True) is None
    assert loss_at_zero(["sigmoid"], aux_loss=True) is None


def test_unknown_type_and_uneven_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown loss type 'sigmiod'"):
        loss_at_zero(["sigmiod"])
    with pytest.raises(ValueError, match="2 loss types, 1 weights"):
        loss_at_zero(["sigmoid", "ipo"], [1.0])


@pytest.mark.parametrize(("dtype", "allowed"), [("float32", 1e-5), ("bfloat16", 1e-2), ("float16", 1e-2)])
def test_threshold_is_per_token(dtype: str, allowed: float) -> None:
    within, beyond = 10 * allowed * 0.99, 10 * allowed * 1.01
    assert step_zero_problems([-5.0 + within], [-5.0], [10], dtype) == []
    (problem,) = step_zero_problems([-5.0, -5.0 - beyond], [-5.0, -5.0], [10, 10], dtype)
    assert problem.startswith("sequence 1:")


def test_nan_and_empty_answers_are_problems() -> None:
    assert len(step_zero_problems([math.nan, -1.0], [-1.0, math.inf], [3, 3], "float32")) == 2
    assert step_zero_problems([0.0], [0.0], [0], "float32") == ["sequence 0: no supervised token"]
    with pytest.raises(ValueError, match="different length"):
        step_zero_problems([0.0], [0.0, 1.0], [1, 1], "float32")
    with pytest.raises(ValueError, match="nothing to compare"):
        step_zero_problems([], [], [], "float32")
