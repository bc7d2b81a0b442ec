"""Work on pieces in forked processes, in order, as if it were done here.

Workers are forked, not started anew: they share what was imported and loaded, and nothing of the work needs to be
sent. They compute nothing on a device. Each ends when its pipe does, so none outlives its parent, however that ends.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from posttrain.errors import PosttrainError, StageError

C = TypeVar("C")
R = TypeVar("R")
_AHEAD = 4
"""Pieces that each worker may be ahead of the one that is waited for."""


def cpu_count() -> int:
    """Processors that this process may use; 1 where processes cannot be forked safely."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else 1


def in_order(work: Callable[[C], R], pieces: Iterable[C], processes: int, alone: int) -> Iterator[R]:
    """Yields what `work` makes of each piece, in order; what it raises for the first broken piece is raised here.

    Args:
        processes: 1 = all is done here.
        alone: this many pieces are done here before anything is forked, so that few are not worth a fork.

    Raises:
        StageError: a worker was killed.
    """
    remaining = iter(pieces)
    for piece in islice(remaining, alone if processes > 1 else None):
        yield work(piece)
    for piece in islice(remaining, 1):
        with _team(work, processes) as team:
            yield from _collect(team, chain([piece], remaining))


@contextlib.contextmanager
def _team(work: Callable[[Any], Any], processes: int) -> Iterator[list[Connection]]:
    """Forks workers; yields our ends of their pipes."""
    fork = multiprocessing.get_context("fork")
    ends: list[Connection] = []
    members = []
    try:
        for _ in range(processes):
            ours, theirs = fork.Pipe()
            ends.append(ours)
            member = fork.Process(target=_serve, args=(work, theirs, list(ends)), daemon=True)
            member.start()
            theirs.close()
            members.append(member)
        yield ends
    finally:
        for end in ends:
            end.close()
        for member in members:
            member.kill()
            member.join()


def _collect(team: list[Connection], pieces: Iterator[Any]) -> Generator[Any, None, None]:
    """Keeps every worker busy, and yields results in the order of the pieces."""
    idle, busy = list(team), dict[Connection, int]()
    results: dict[int, Any] = {}
    upcoming = _Upcoming(pieces)
    sent = due = 0
    while True:
        while due in results:
            yield _unpacked(results.pop(due))
            due += 1
        while idle and sent - due < _AHEAD * len(team) and upcoming.ready():
            worker = idle.pop()
            worker.send(upcoming.take())
            busy[worker] = sent
            sent += 1
        if not busy:
            break
        upcoming.ready()  # read ahead: a worker that comes back is not to wait for the reading
        for worker in [worker for worker in wait(list(busy)) if isinstance(worker, Connection)]:
            results[busy.pop(worker)] = _received(worker)
            idle.append(worker)
    upcoming.raise_error()


class _Upcoming:
    """The next piece, read ahead; an error in reading waits until all that stands before it is done."""

    def __init__(self, pieces: Iterator[Any]) -> None:
        self._pieces, self._held = pieces, list[Any]()
        self._error: PosttrainError | None = None
        self._ended = False

    def ready(self) -> bool:
        """Whether there is another piece."""
        if not self._held and not self._ended:
            try:
                self._held.append(next(self._pieces))
            except StopIteration:
                self._ended = True
            except PosttrainError as error:
                self._error, self._ended = error, True
        return bool(self._held)

    def take(self) -> Any:
        """Returns it."""
        return self._held.pop()

    def raise_error(self) -> None:
        """Raises what ended the reading, if it was an error."""
        if self._error is not None:
            raise self._error


def _received(worker: Connection) -> tuple[Any, BaseException | None]:
    try:
        return worker.recv()
    except EOFError:
        todo = "is memory short? set runtime.dataset_num_proc: 1"
        raise StageError("data preparation", "one of its processes was killed", todo) from None


def _unpacked(result: tuple[Any, BaseException | None]) -> Any:
    value, error = result
    if error is not None:
        raise error
    return value


def _serve(work: Callable[[Any], Any], pipe: Connection, others: list[Connection]) -> None:
    """The life of a worker: a piece in, its result out, until the pipe ends.

    Args:
        others: the parent's ends that the fork has copied, which would keep pipes open after the parent's death.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    for other in others:
        other.close()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of the parent are not here, and would be waited for
    gc.freeze()  # a collection must not touch, and so copy, what the parent has
    with contextlib.suppress(EOFError, OSError):
        while True:
            pipe.send(_result(work, pipe.recv()))


def _result(work: Callable[[Any], Any], piece: Any) -> tuple[Any, BaseException | None]:
    try:
        return work(piece), None
    except PosttrainError as error:
        return None, error
    except Exception as error:  # a fault of ours: the parent raises it, with the place where it arose
        error.add_note(traceback.format_exc())
        with contextlib.suppress(Exception):
            pickle.loads(pickle.dumps(error))
            return None, error
        return None, RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
