"""What the processes that train one stage together tell one another.

Every function is a no-op for a single process. Before a process group exists (`torch.distributed` is
initialised when the trainer is built) only `in_turn` may be used: it waits without any timeout of a
collective, so that an hour of tokenising cannot time a process group out.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from posttrain.errors import StageError
from posttrain.pretraining.ranks import Rank

_POLL = 0.1


@contextlib.contextmanager
def in_turn(name: str, rank: Rank) -> Iterator[None]:
    """Lets the first process do the block alone, and the others after it, who then find what it left.

    Args:
        name: of the block; each block of a process has another.

    Raises:
        StageError: the place where the processes meet cannot be reached.
    """
    if rank.world == 1:
        yield
        return
    store, key = _meeting_place(), f"posttrain/{name}"
    while not rank.first and not store.check([key]):
        time.sleep(_POLL)  # a first process that dies ends all of us: the launcher sees to it
    yield
    if rank.first:
        store.set(key, "done")


@functools.cache
def _meeting_place() -> dist.Store:
    """The store that the process group will be made through; kept, because the first process may be its server."""
    try:
        return next(dist.rendezvous("env://"))[0]
    except (RuntimeError, ValueError) as error:  # torch's DistStoreError is a RuntimeError
        found = f"the processes do not find one another ({str(error).splitlines()[0]})"
        raise StageError("launch", found, "check MASTER_ADDR and MASTER_PORT, and that every node started") from None


def wait() -> None:
    """Waits until every process is here."""
    if _joined():
        dist.barrier()


def total(*values: float) -> list[float]:
    """Sums of what every process gives, in fp64."""
    return _reduce(values, dist.ReduceOp.SUM)


def least(value: int) -> int:
    """The smallest that any process gives."""
    return int(_reduce((value,), dist.ReduceOp.MIN)[0])


def any_of(flag: bool) -> bool:
    """Whether it is so in some process."""
    return _reduce((float(flag),), dist.ReduceOp.MAX)[0] > 0


def sum_table(table: torch.Tensor) -> torch.Tensor:
    """Sum over all processes of a CPU tensor of one shape and dtype."""
    if not _joined():
        return table
    moved = table.to(_device())
    dist.all_reduce(moved)
    return moved.cpu()


def from_first(value: Any) -> Any:
    """What the first process gives, a plain Python value."""
    if not _joined():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _reduce(values: tuple[float, ...], how: Any) -> list[float]:
    if not _joined():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor, op=how)
    return tensor.tolist()
