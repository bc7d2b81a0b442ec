"""The parts of the sparse methods: TIES' threshold, DARE's mask, the elected sign."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from posttrain.merging.methods import drop_mask, elect, slerp_factors, trim_thresholds

GOLDEN = "011000100000101101100011"
"""Computed once: a mask must not change between releases."""


@pytest.mark.parametrize("kind", ["normal", "few values", "zeros", "tiny", "huge"])
@pytest.mark.parametrize("keep", [1, 2, 499, 500, 999, 1000])
def test_threshold_is_the_nth_largest_magnitude(kind: str, keep: int) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    values = {
        "normal": values,
        "few values": values.mul(2).round(),
        "zeros": values * (torch.arange(1000) % 3 == 0),
        "tiny": values * 1e-42,
        "huge": values * 1e37,
    }[kind]
    other = values.flip(0) * 0.5
    found = trim_thresholds(lambda: ([values[a : a + 7], other[a : a + 7]] for a in range(0, 1000, 7)), 2, keep)
    assert found == [float(np.sort(np.abs(t.numpy()))[::-1][keep - 1]) for t in (values, other)]


def test_mask_depends_on_position_alone() -> None:
    whole = drop_mask(5, "model.w", 1, 0.3, 0, 1000)
    for size in (1, 3, 8, 333):
        pieces = [drop_mask(5, "model.w", 1, 0.3, start, min(size, 1000 - start)) for start in range(0, 1000, size)]
        assert torch.equal(torch.cat(pieces), whole)
    assert "".join(map(str, whole[:24].int().tolist())) == GOLDEN


def test_masks_are_independent_and_of_the_right_density() -> None:
    masks = [
        drop_mask(seed, name, index, 0.3, 0, 100_000).double()
        for seed, name, index in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))
    ]
    assert all(float(mask.mean()) == pytest.approx(0.3, abs=0.01) for mask in masks)
    assert torch.corrcoef(torch.stack(masks)).sub(torch.eye(4)).abs().max() < 0.02


def test_sign_is_elected_by_mass() -> None:
    deltas = [torch.tensor([3.0, 1.0, 0.0, 2.0, 0.0]), torch.tensor([-1.0, -2.0, 4.0, -2.0, 0.0])]
    deltas.append(torch.tensor([-1.0, -2.0, -1.0, 0.0, 0.0]))
    change, kept = elect(deltas, (1.0, 1.0, 1.0), normalize=False)
    assert change.tolist() == [3.0, -2.0, 4.0, 0.0, 0.0]
    assert kept == [1, 2, 1]
    change, _ = elect(deltas, (1.0, 3.0, 1.0), normalize=True)
    assert change.tolist() == [-1.0, -2.0, 4.0, -2.0, 0.0]  # weights vote: first -1*3 -1 against 3; fourth -6 against 2


def test_slerp_factors() -> None:
    east, north = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    assert slerp_factors(0.5, lambda: iter([[east, north]])) == pytest.approx((0.5**0.5, 0.5**0.5))
    for other in (east, -east, 0 * east):
        assert slerp_factors(0.25, lambda other=other: iter([[east, other]])) == (0.75, 0.25)
