"""As many processes as there are, the same run: killed, resumed and compared by the script that proves it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "prove_ranks.py"
TRAINED = ["sft_full", "sft_lora", "sft_qlora", "dpo_full", "dpo_lora", "dpo_qlora"]


def prove(folder: Path, *options: str) -> list[list[str]]:
    """Runs the script in a folder and returns the words of the rows of its tables."""
    words = [sys.executable, str(SCRIPT), "--runs-dir", str(folder), *options]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in done.stdout.splitlines() if line.startswith("  ")]


@pytest.mark.contract(number=1)
@pytest.mark.contract(number=4)
def test_a_killed_process_and_a_resume(tmp_path: Path) -> None:
    rows = prove(tmp_path, "--quick")
    assert [row[0] for row in rows] == ["dpo_lora", "stage", "dpo_lora"]
    assert "rank 1: its process was killed by SIGKILL" in " ".join(rows[0])


@pytest.mark.slow
@pytest.mark.contract(number=1)
@pytest.mark.contract(number=4)
def test_every_way_of_training_and_every_end(tmp_path: Path) -> None:
    rows = prove(tmp_path)
    compared = [row[0] for row in rows if len(row) == 6]
    assert compared == ["stage", *TRAINED, "merge_lora", "merge_qlora", "stage", "sft_qlora", "dpo_qlora"]
    ends = [(row[0], " ".join(row[1:3])) for row in rows if "exit" in row]
    wanted = ["stop after", "error 1", "kill 1", "kill 0", "launcher after"]
    assert ends == [(stage, end) for stage in ("sft_qlora", "dpo_qlora") for end in wanted]


@pytest.mark.slow
@pytest.mark.contract(number=4)
def test_a_model_that_is_cut_over_two_processes(tmp_path: Path) -> None:
    chosen = ["sft_full", "dpo_full", "sft_lora", "dpo_lora", "merge_lora"]
    rows = prove(tmp_path, "--accelerate-config", "fsdp2", "--stages", *chosen)
    compared = [row[0] for row in rows if len(row) == 6]
    trained = ["sft_full", "sft_lora", "dpo_full", "dpo_lora"]
    assert compared == ["stage", *trained, "merge_lora", "stage", "sft_lora", "dpo_lora"]
    assert sum("exit" in row for row in rows) == 10
