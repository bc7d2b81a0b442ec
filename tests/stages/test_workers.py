"""Work in forked processes: in order, with the first error, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from posttrain.errors import ChatError, DataError, StageError
from posttrain.stages.workers import in_order


def uneven(number: int) -> tuple[int, int]:
    """Later pieces are done sooner."""
    time.sleep(0.002 * (number % 3))
    return number * number, os.getpid()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_order_from_as_many_processes(processes: int) -> None:
    results = list(in_order(uneven, range(40), processes, alone=0))
    assert [value for value, _ in results] == [number * number for number in range(40)]
    pids = {pid for _, pid in results}
    assert len(pids) == processes
    assert (os.getpid() in pids) == (processes == 1)
    assert no_children()


def test_few_pieces_are_done_here() -> None:
    assert {pid for _, pid in in_order(uneven, range(3), 2, alone=3)} == {os.getpid()}
    pids = [pid for _, pid in in_order(uneven, range(5), 2, alone=3)]
    assert set(pids[:3]) == {os.getpid()}
    assert os.getpid() not in pids[3:]


def broken_at(*bad: int) -> object:
    def work(number: int) -> int:
        if number in bad:
            time.sleep(0.05 if number == min(bad) else 0)
            raise ChatError(f"row {number}", "found", "todo")
        return number

    return work


@pytest.mark.parametrize("processes", [1, 3])
def test_the_first_broken_piece_is_the_one_that_is_raised(processes: int) -> None:
    done: list[int] = []
    with pytest.raises(ChatError) as error:
        done.extend(in_order(broken_at(5, 6, 7), range(20), processes, alone=0))  # type: ignore[arg-type]
    assert done == [0, 1, 2, 3, 4]
    assert (error.value.where, error.value.found, error.value.todo) == ("row 5", "found", "todo")
    assert no_children()


@pytest.mark.parametrize(("bad", "raised"), [((), DataError), ((8,), ChatError)])
def test_an_error_in_reading_waits_for_what_stands_before_it(bad: tuple[int, ...], raised: type[Exception]) -> None:
    def pieces() -> Iterator[int]:
        yield from range(10)
        raise DataError("file:11", "broken", "mend")

    for processes in (1, 3):
        with pytest.raises(raised):
            list(in_order(broken_at(*bad), pieces(), processes, alone=0))  # type: ignore[arg-type]


def test_a_fault_of_ours_is_raised_with_its_place() -> None:
    with pytest.raises(ZeroDivisionError) as error:
        list(in_order(lambda number: 1 // number, [1, 0], 2, alone=0))
    assert "in <lambda>" in error.value.__notes__[0]


def test_a_worker_that_is_killed_is_an_error() -> None:
    with pytest.raises(StageError, match="killed"):
        list(in_order(lambda _: os.kill(os.getpid(), signal.SIGKILL), [1, 2], 2, alone=0))
    assert no_children()


PARENT = """
import os, signal, sys, time
from posttrain.stages.workers import in_order
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts the tests in the background ignores it
def work(number):
    open(f"{sys.argv[1]}/{os.getpid()}", "w").close()
    time.sleep(0.05)
for _ in in_order(work, range(10**6), 2, alone=0): pass
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_parent(tmp_path: Path, number: int) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [int(path.name) for path in tmp_path.iterdir()]
    parent.send_signal(number)
    parent.wait(timeout=20)
    wait_until(lambda: not any(alive(pid) for pid in workers))


def wait_until(true: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def no_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False
