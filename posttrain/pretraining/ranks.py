"""One process among those that train a stage together, and its part of every optimizer step."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Rank:
    """One process's part of every optimizer step."""

    index: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files."""
        return self.index == 0


ALONE = Rank()


def own_rank() -> Rank:
    """This process's place among those that were launched together, as torchrun and srun tell it."""
    return Rank(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


def divide(costs: list[int], world: int) -> list[list[int]]:
    """Divides the rows of one optimizer step: the largest first, each to the process with the least so far.

    At most 4/3 - 1/(3 world) of the best division's heaviest part (Graham 1969, longest processing time first).

    Args:
        costs: tokens of each row.

    Returns:
        `world` lists of indices, ascending; every index stands in exactly one.
    """
    parts: list[list[int]] = [[] for _ in range(world)]
    loads = [0] * world
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        lightest = loads.index(min(loads))
        parts[lightest].append(index)
        loads[lightest] += costs[index]
    return [sorted(part) for part in parts]
