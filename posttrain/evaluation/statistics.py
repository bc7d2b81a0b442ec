"""Figures with their 95 % intervals, and differences of two models on the same rows.

A figure is `sum(values) / sum(weights)` over rows: a share (0/1, weight 1), a mean (weight 1) or a ratio
(bits over bytes). Intervals speak of the rows: what to expect on other rows drawn like these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
RESAMPLES = 10_000
_CELLS_AT_ONCE = 10_000_000  # resamples times rows: bounds a part to 80 MB


@dataclass(frozen=True)
class Interval:
    """A figure, the ends of its 95 % interval, and the number of rows behind it."""

    value: float
    low: float
    high: float
    rows: int


def proportion(successes: int, rows: int) -> Interval:
    """Share of rows with Wilson's score interval, which stays inside [0, 1] and holds at 0 % and 100 %.

    centre = (p + z²/2n) / (1 + z²/n), half width = z/(1 + z²/n) · sqrt(p(1-p)/n + z²/4n²)
    (E. B. Wilson, JASA 22, 1927; recommended by Brown, Cai and DasGupta, Statistical Science 16, 2001).

    Raises:
        ValueError: no rows, or more successes than rows.
    """
    if rows < 1 or not 0 <= successes <= rows:
        raise ValueError(f"{successes} successes in {rows} rows")
    share, z2 = successes / rows, Z95 * Z95
    shrink = 1 + z2 / rows
    centre = (share + z2 / (2 * rows)) / shrink
    half = Z95 / shrink * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows * rows))
    # At 0 and n successes one end is the share itself; the subtraction would leave it an ulp away.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == rows else centre + half
    return Interval(share, low, high, rows)


def ratio(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Interval:
    """Mean (or weighted ratio `sum(values) / sum(weights)`) with a percentile bootstrap interval over rows.

    Args:
        values: one figure per row.
        weights: one positive weight per row; None = 1 each, which makes a mean.
        seed: of the resampling; the same seed and length draw the same rows.

    Raises:
        ValueError: no rows, or lengths that differ.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
    """
    numerators, denominators = _columns(values, weights)
    low, high = _percentiles(numerators, denominators, seed)
    return Interval(float(numerators.sum() / denominators.sum()), low, high, len(numerators))


def paired_difference(
    earlier: Sequence[float], later: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0
) -> Interval:
    """Figure of the later model minus the earlier's, rows resampled for both at once.

    Pairing removes what the rows have in common (hard questions are hard for both), so the interval is the
    one to read when two models answered the same rows. 10,000 resamples, percentile interval.

    Args:
        earlier: one figure per row.
        later: the other model's figures of the same rows, in the same order.
        weights: shared by both models (bytes of the text); None = 1 each.
        seed: of the resampling.

    Raises:
        ValueError: no rows, or lengths that differ.

    Source: Efron and Tibshirani 1993, chapter 13; for comparing systems, Koehn, EMNLP 2004.
    """
    if len(earlier) != len(later):
        raise ValueError(f"{len(earlier)} rows of one model, {len(later)} of the other")
    gained = np.asarray(later, dtype=np.float64) - np.asarray(earlier, dtype=np.float64)
    # With shared weights, the difference of two ratios is the ratio of the differences.
    return ratio(gained.tolist(), weights, seed)


def _columns(values: Sequence[float], weights: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    numerators = np.asarray(values, dtype=np.float64)
    denominators = np.ones_like(numerators) if weights is None else np.asarray(weights, dtype=np.float64)
    if numerators.size == 0 or numerators.shape != denominators.shape:
        raise ValueError(f"{numerators.size} values, {denominators.size} weights")
    return numerators, denominators


def _percentiles(numerators: np.ndarray, denominators: np.ndarray, seed: int) -> tuple[float, float]:
    """Ends of the 95 % interval of `sum(numerators) / sum(denominators)` over resampled rows."""
    columns = np.stack([numerators, denominators], axis=1)
    rows, sums = len(numerators), []
    resamples = max(1, _CELLS_AT_ONCE // rows)
    for part, start in enumerate(range(0, RESAMPLES, resamples)):
        sums.append(_drawn_counts(rows, min(resamples, RESAMPLES - start), seed, part) @ columns)
    tops, bottoms = np.concatenate(sums).T
    low, high = np.quantile(tops / bottoms, [0.025, 0.975])
    return float(low), float(high)


@lru_cache(maxsize=1)  # the figures of one suite share their rows, and so their resamples
def _drawn_counts(rows: int, resamples: int, seed: int, part: int) -> np.ndarray:
    """How often each row is drawn in each resample of `rows` draws; float64 (resamples, rows)."""
    drawn = np.random.default_rng([seed, part]).integers(0, rows, size=(resamples, rows))
    drawn += rows * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * rows).reshape(resamples, rows).astype(np.float64)
