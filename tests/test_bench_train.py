"""The benchmarks of training run, every line of them, at a size that takes seconds (`scripts/bench_train.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "bench_train.py"


def bench(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the script."""
    command = [sys.executable, str(SCRIPT), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, timeout=300)


@pytest.mark.slow
def test_ours_and_trl_have_the_same_loss_curves_on_both_tasks(tmp_path: Path, shared_dir: Path) -> None:
    found = bench("--tiny", "--json", str(tmp_path / "out.json"), POSTTRAIN_SHARED=str(shared_dir))
    assert found.returncode == 0, found.stdout + found.stderr
    for task in ("sft", "dpo"):
        figures = json.loads((tmp_path / "out.json").read_text())[task]
        assert figures["loss_difference"] <= 1e-4
        assert set(figures["medians"]) == {"ours", "TRL best", "TRL defaults"}
        trained = {name: runs[0]["rows"] for name, runs in figures["runs"].items()}
        assert trained["ours"] == trained["TRL defaults"] == 8  # two steps of four rows, after the warm-up
        assert all(one["supervised_per_s"] > 0 and 0 < one["mfu"] < 1 for one in figures["medians"].values())


@pytest.mark.slow
def test_the_suite_for_a_gpu_runs_dry(tmp_path: Path) -> None:
    lengths = tmp_path / "lengths.json"
    lengths.write_text(json.dumps([[20 + number % 30, 5 + number % 7, 9] for number in range(64)]))
    words = ["--suite", "gpu", "--tiny", "--lengths", str(lengths), "--profile", str(tmp_path / "profiles")]
    found = bench(*words, "--json", str(tmp_path / "out.json"))
    assert found.returncode == 0, found.stdout + found.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    assert len(figures["judged"]) == 4
    assert len(list((tmp_path / "profiles").glob("*.txt"))) == 5
