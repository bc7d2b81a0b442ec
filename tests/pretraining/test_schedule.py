"""Snapshot schedules."""

from __future__ import annotations

from posttrain.pretraining.schedule import snapshot_steps


def test_pythia_keeps_154_checkpoints_of_143000_steps() -> None:
    steps = snapshot_steps(143_000, every=1000, step_zero=True, powers_of_two=True)
    wanted = {0, *(2**power for power in range(10)), *range(1000, 143_001, 1000)}
    assert steps == wanted
    assert len(steps) == 154


def test_each_part_stands_alone() -> None:
    assert snapshot_steps(10, None, False, False) == set()
    assert snapshot_steps(10, 4, False, False) == {4, 8}
    assert snapshot_steps(10, None, True, False) == {0}
    assert snapshot_steps(10, None, False, True) == {1, 2, 4, 8}
    assert snapshot_steps(8, None, False, True) == {1, 2, 4, 8}
    assert snapshot_steps(10, 4, False, True) == {1, 2, 4, 8}
    assert snapshot_steps(10, 1, False, True) == set(range(1, 11))
