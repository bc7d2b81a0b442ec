"""The same recipe under somebody else's launcher, with fake stages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs_support import Project

STAGES = ("sft", "instruct", "dpo", "aligned")
TWO = ("--set", "runtime.num_processes=2")


def under_torchrun(project: Project, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = (*project.command(*words)[1:],)
    environment = {**os.environ, "FAKE": "", "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        [sys.executable, *launcher, *words], capture_output=True, text=True, env=environment, timeout=120
    )


def test_two_processes_of_torchrun_leave_what_one_run_leaves(project: Project, finished_template: Path) -> None:
    done = under_torchrun(project, *TWO)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in STAGES:
        expected = (finished_template / f"runs/demo/{stage}/model.safetensors").read_text()
        assert (project.run_dir / stage / "model.safetensors").read_text() == expected
    assert project.stages_run() == {"sft": 2, "instruct": 1, "dpo": 2, "aligned": 1}
    assert not list(project.run_dir.glob("*/.events.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "fake", "code", "said"),
    [
        ((), "", 2, "stages.sft.runtime.num_processes: 1, and 2 processes were launched"),
        (TWO, "sft=die1", 1, "stage sft, rank 1: its process was killed by SIGKILL"),
        (TWO, "sft=break1", 1, "stage sft, rank 1: unexpected RuntimeError: the second broke"),
        (TWO, "sft=user", 2, "rows.jsonl:3: no answer"),
    ],
)
def test_what_fails_is_said_once_and_ends_all(
    project: Project, words: tuple[str, ...], fake: str, code: int, said: str
) -> None:
    done = under_torchrun(project, *words, FAKE=fake)
    assert done.returncode == 1  # torchrun's own, whatever its workers' was
    assert f"exitcode  : {code}" in done.stdout + done.stderr
    assert (done.stdout + done.stderr).count(f"error: {said}") == 1
    assert under_torchrun(project, *TWO).returncode == 0  # goes on
