"""`kill -9` at any moment, and the same command again: the same bytes (contracts 1 and 4)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "kill_runs.py"


def prove(folder: Path, *options: str) -> list[list[str]]:
    """Runs the script in a folder and returns the words of its table's rows: number, run, victim, place…"""
    words = [sys.executable, str(SCRIPT), "--runs-dir", str(folder), *options]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    return [row for row in rows if row and row[0].isdigit() and not row[1].startswith("kill")]


@pytest.mark.contract(number=1)
@pytest.mark.contract(number=4)
def test_three_kills(tmp_path: Path) -> None:
    # This seed draws its moments late enough (at 66, 82 and 93 % of the run) for each victim to be at work.
    kills = prove(tmp_path, "--kills", "3", "--seed", "1927", "--stages", "sft_qlora", "dpo_qlora", "--uniform-only")
    assert [kill[2] for kill in kills] == ["stage", "parent", "group"]


@pytest.mark.slow
@pytest.mark.contract(number=1)
@pytest.mark.contract(number=4)
def test_twenty_kills_and_the_chosen_points(tmp_path: Path) -> None:
    kills = prove(tmp_path, "--kills", "20", "--seed", "20")
    assert {"stage", "parent", "group", "server"} <= {kill[2] for kill in kills}
    assert len(kills) == 28
