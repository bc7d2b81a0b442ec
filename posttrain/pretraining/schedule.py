"""When a model-only snapshot is kept for good."""

from __future__ import annotations


def snapshot_steps(total: int, every: int | None, step_zero: bool, powers_of_two: bool) -> set[int]:
    """Returns the steps after which a snapshot is kept.

    `step_zero`, `powers_of_two` (below `every`) and `every` together give Pythia's spacing: 0, 1, 2,
    4 … 512, 1000, 2000 … (Biderman et al. 2023).
    """
    steps = {0} if step_zero else set()
    if every:
        steps |= set(range(every, total + 1, every))
    if powers_of_two:
        limit, power = every or total + 1, 1
        while power < limit and power <= total:
            steps.add(power)
            power *= 2
    return steps
