"""Intervals against published figures, closed forms and exhaustive enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.evaluation.statistics import _CELLS_AT_ONCE, RESAMPLES, paired_difference, proportion, ratio


@pytest.mark.parametrize(
    ("successes", "rows", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_published_figures(successes: int, rows: int, low: float, high: float) -> None:
    figure = proportion(successes, rows)
    assert figure.value == successes / rows
    assert (figure.low, figure.high) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_ends_solve_the_score_equation(case: tuple[int, int]) -> None:
    """Both ends p satisfy |share - p| = z sqrt(p(1-p)/n): the definition, not the formula."""
    successes, rows = case
    figure = proportion(successes, rows)
    assert 0 <= figure.low <= figure.value <= figure.high <= 1
    for end in (figure.low, figure.high):
        assert abs(figure.value - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / rows), abs=1e-6)


@pytest.mark.parametrize(("successes", "rows"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_shares_are_refused(successes: int, rows: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        proportion(successes, rows)


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=900)
    figure = ratio(values)
    half = 1.96 * values.std() / 30
    assert figure.value == pytest.approx(values.mean())
    assert (figure.low, figure.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)


def test_bootstrap_equals_the_enumeration_of_all_resamples() -> None:
    values, weights = [0.0, 1.0, 5.0, 6.0], [1.0, 2.0, 3.0, 1.0]
    drawn = [list(rows) for rows in itertools.product(range(4), repeat=4)]
    every = [sum(values[i] for i in rows) / sum(weights[i] for i in rows) for rows in drawn]
    figure = ratio(values, weights, seed=3)
    assert figure.value == 12 / 7
    # 256 outcomes, 10,000 draws: the ends are outcomes, or neighbours of the exact quantile.
    assert figure.low == pytest.approx(np.quantile(every, 0.025), abs=0.15)
    assert figure.high == pytest.approx(np.quantile(every, 0.975), abs=0.15)


def test_seed_decides_and_resampling_is_bounded_in_memory() -> None:
    values = np.random.default_rng(0).random(5000)  # more than one chunk of resamples
    assert RESAMPLES * len(values) > 3 * _CELLS_AT_ONCE
    assert ratio(values, seed=7) == ratio(values, seed=7)
    assert ratio(values, seed=7) != ratio(values, seed=8)


def test_pairing_removes_what_the_rows_share() -> None:
    generator = np.random.default_rng(5)
    hardness = generator.normal(0, 10, size=200)
    later = hardness + 1 + generator.normal(0, 0.5, size=200)
    difference = paired_difference(hardness, later)
    assert difference.value == pytest.approx((later - hardness).mean())
    assert 0.9 < difference.low < difference.value < difference.high < 1.1
    assert ratio(later).high - ratio(later).low > 10 * (difference.high - difference.low)


def test_equal_models_differ_by_nothing() -> None:
    assert paired_difference([1, 0, 1], [1, 0, 1]) == paired_difference([0, 1, 1], [0, 1, 1])
    assert paired_difference([1, 0, 1], [1, 0, 1]).high == 0


def test_difference_of_ratios_weighs_rows_by_size() -> None:
    assert paired_difference([10, 40], [12, 40], weights=[10, 40]).value == pytest.approx(2 / 50)


def test_rows_must_match() -> None:
    with pytest.raises(ValueError, match="3 rows of one model, 2"):
        paired_difference([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="0 values"):
        ratio([])


@pytest.mark.slow
def test_intervals_hold_the_truth_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(11)
    inside = 0
    for trial in range(400):
        earlier, later = generator.random(150) < 0.45, generator.random(150) < 0.70
        figure = paired_difference(earlier.astype(float), later.astype(float), seed=trial)
        inside += figure.low <= 0.25 <= figure.high
    assert 0.92 <= inside / 400 <= 0.98
