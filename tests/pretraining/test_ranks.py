"""Processes that train together: who has which rows, and who goes first."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import TCPStore

from posttrain.errors import StageError
from posttrain.pretraining import world
from posttrain.pretraining.ranks import ALONE, Rank, divide, own_rank

COSTS = st.lists(st.integers(0, 50), max_size=40)


def heaviest(costs: list[int], parts: list[list[int]]) -> int:
    return max(sum(costs[index] for index in part) for part in parts)


class TestDivide:
    @given(COSTS, st.integers(1, 9))
    def test_every_row_has_one_process(self, costs: list[int], processes: int) -> None:
        parts = divide(costs, processes)
        assert len(parts) == processes
        assert sorted(index for part in parts for index in part) == list(range(len(costs)))
        assert all(part == sorted(part) for part in parts)
        assert divide(list(costs), processes) == parts

    @given(COSTS)
    def test_one_process_has_them_as_they_come(self, costs: list[int]) -> None:
        assert divide(costs, 1) == [list(range(len(costs)))]

    @given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(2, 3))
    @settings(deadline=None, max_examples=60)
    def test_the_heaviest_part_is_near_the_best(self, costs: list[int], processes: int) -> None:
        best = min(
            max(sum(c for c, owner in zip(costs, owners, strict=True) if owner == one) for one in range(processes))
            for owners in product(range(processes), repeat=len(costs))
        )
        assert heaviest(costs, divide(costs, processes)) <= (4 / 3 - 1 / (3 * processes)) * best + 1e-9

    @given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 9))
    def test_nobody_is_idle_while_another_has_two(self, costs: list[int], processes: int) -> None:
        sizes = [len(part) for part in divide(costs, processes)]
        assert min(sizes) > 0 or max(sizes) <= 1

    def test_the_worst_case_is_reached(self) -> None:
        # Graham's own: 2n - 1, 2n - 1, ..., n + 1, n + 1, n, n, n on n processes; the best part holds 3n.
        costs = [5, 5, 4, 4, 3, 3, 3]
        assert heaviest(costs, divide(costs, 3)) == 11


class TestOwnRank:
    def test_nobody_said_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        assert own_rank() == ALONE == Rank(0, 1)
        assert own_rank().first

    def test_as_torchrun_tells_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setenv("WORLD_SIZE", "8")
        assert own_rank() == Rank(3, 8)
        assert not own_rank().first


def test_one_process_says_nothing_to_anybody() -> None:
    with world.in_turn("data", ALONE):
        pass
    world.wait()
    assert world.total(0.1, 2) == [0.1, 2]
    assert (world.least(3), world.any_of(True), world.any_of(False), world.from_first("x")) == (3, True, False, "x")


WORKER = """
import sys, time
from pathlib import Path
from posttrain.pretraining.ranks import own_rank
from posttrain.pretraining.world import in_turn

rank, folder, how = own_rank(), Path(sys.argv[1]), sys.argv[2]

def tell(text):
    with (folder / "told.txt").open("a") as file:
        file.write(f"{rank.index} {text}\\n")

for name in ("data", "again", "third"):
    if rank.first and how == "late":
        time.sleep(0.4)
    with in_turn(name, rank):
        tell(f"{name} in")
        if rank.first and how == "fails":
            raise RuntimeError("the first one broke")
        time.sleep(0.1 if rank.first else 0)
        tell(f"{name} out")
tell("end")
if rank.first:
    time.sleep(1)  # it serves the meeting place
"""


def start(folder: Path, how: str, rank: int, port: int, agent: bool = False) -> subprocess.Popen[bytes]:
    """Starts one of two processes; with `agent` they meet at a store that someone else keeps, as under torchrun."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    environment = {**os.environ, **place, "TORCHELASTIC_USE_AGENT_STORE": str(agent)}
    with (folder / f"{rank}.txt").open("wb") as errors:
        return subprocess.Popen([sys.executable, "-c", WORKER, str(folder), how], env=environment, stderr=errors)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class TestInTurn:
    def test_the_first_goes_first_block_by_block(self, tmp_path: Path) -> None:
        port = free_port()
        both = [start(tmp_path, "late", rank, port) for rank in (1, 0)]
        assert [one.wait(timeout=120) for one in both] == [0, 0], (tmp_path / "1.txt").read_text()
        told = (tmp_path / "told.txt").read_text().splitlines()
        for name in ("data", "again", "third"):
            assert told.index(f"0 {name} in") < told.index(f"0 {name} out") < told.index(f"1 {name} in")
        assert told.index("1 data out") < told.index("0 again in")  # it was not held up longer than that

    def test_when_the_first_fails_the_others_wait_for_the_launcher_to_end_them(self, tmp_path: Path) -> None:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        both = [start(tmp_path, "fails", rank, store.port, agent=True) for rank in (0, 1)]
        assert both[0].wait(timeout=120) == 1
        assert "the first one broke" in (tmp_path / "0.txt").read_text()
        time.sleep(0.5)
        assert both[1].poll() is None
        both[1].terminate()
        assert both[1].wait(timeout=20) == -signal.SIGTERM
        assert (tmp_path / "told.txt").read_text().splitlines() == ["0 data in"]

    def test_a_place_that_is_not_there_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MASTER_PORT", raising=False)
        world._meeting_place.cache_clear()
        with pytest.raises(StageError, match="do not find one another") as refused, world.in_turn("data", Rank(1, 2)):
            pass
        assert "MASTER_PORT" in refused.value.todo
