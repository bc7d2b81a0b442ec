"""Four questions to a Slurm cluster, through its own commands: submit, ask, release, cancel."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from posttrain.errors import UserError

_COMMANDS = ("sbatch", "squeue", "scontrol", "scancel")
_ID = re.compile(r"([0-9]+)(;\S+)?")
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_JWT")
_UNKNOWN = "Invalid job id"
"""What `squeue` and `scancel` say, with an exit code, of a single job that ended some minutes ago."""


def find_commands() -> None:
    """Raises UserError where Slurm's commands are not on the PATH."""
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    if missing:
        todo = "submit from a login node of the cluster, or leave out --executor slurm"
        raise UserError(", ".join(missing), "not on the PATH", todo)


def submit(script: Path, options: Sequence[str]) -> str:
    """Submits a script and returns the job's id.

    Raises:
        UserError: the cluster refuses it.
    """
    done = _run("sbatch", "--parsable", *options, str(script))
    found = _ID.fullmatch(done.stdout.strip())
    if done.returncode or found is None:
        said = _said(done) or f"it answered {done.stdout.strip()!r}, no job id"
        raise UserError("sbatch", said, "change runtime.slurm of the recipe to what the cluster takes")
    return found[1]


def in_queue(jobs: Iterable[str]) -> list[str]:
    """Returns those of some jobs that wait or run.

    Raises:
        UserError: the cluster does not answer.
    """
    asked = list(jobs)
    if not asked:
        return []
    done = _run("squeue", "--noheader", f"--jobs={','.join(asked)}", "--format=%i")
    if done.returncode and _UNKNOWN not in done.stderr:
        raise UserError("squeue", _said(done), "try again once the cluster answers")
    there = set(done.stdout.split())
    return [job for job in asked if job in there]


def release(job: str) -> None:
    """Lets a job that was submitted on hold begin; raises UserError where the cluster refuses."""
    done = _run("scontrol", "release", job)
    if done.returncode:
        raise UserError(f"scontrol release {job}", _said(done), "nothing was started: submit again")


def cancel(jobs: Sequence[str]) -> str:
    """Cancels jobs, the last first so that none of them begins; returns what went wrong, or an empty text."""
    if not jobs:
        return ""
    done = _run("scancel", *reversed(jobs))
    return _said(done) if done.returncode and _UNKNOWN not in done.stderr else ""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=_environment())


def _environment() -> dict[str, str]:
    """Ours, without the variables of a job that we may stand in, whose sizes a new one would inherit, or of a view."""
    theirs = ("SLURM_", "SQUEUE_")
    return {name: value for name, value in os.environ.items() if not name.startswith(theirs) or name in _KEPT}


def _said(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout).strip().splitlines()
    return (
        "; ".join(line.partition("error: ")[2] or line for line in lines) or f"ended with exit code {done.returncode}"
    )
