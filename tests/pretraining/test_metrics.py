"""metrics.jsonl: whole lines only, and no step twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.pretraining.metrics import MetricsLog, read_metrics


def write(path: Path, steps: range, resume_step: int = 0) -> None:
    log = MetricsLog(path, resume_step)
    for step in steps:
        log.write({"step": step, "loss": step / 10})


def steps_of(path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(path)]


def test_an_absent_file_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    MetricsLog(tmp_path / "metrics.jsonl", 0)
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("resume_step", [0, 3, 5])
def test_steps_that_run_again_are_written_once(tmp_path: Path, resume_step: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 6))
    write(path, range(resume_step + 1, 9), resume_step)
    assert steps_of(path) == list(range(1, 9))


@pytest.mark.parametrize("cut", [1, 5, 21])
def test_a_line_torn_by_a_kill_is_left_out_and_its_place_used_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 5))
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps_of(path) == ([1, 2, 3, 4] if cut == 1 else [1, 2, 3])  # cut == 1: only its end of line is gone
    write(path, range(4, 7), resume_step=3)
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
