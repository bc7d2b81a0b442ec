"""The script of one stage's job: `posttrain run … --until STAGE` inside the allocation."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

_TEXT = """\
#!/bin/bash
{directives}
# Written by `posttrain run --executor slurm`. Finished stages are skipped, an unfinished one is resumed:
# this job may be stopped, requeued or submitted again at any time.
set -eu
export HF_HUB_OFFLINE="${{HF_HUB_OFFLINE:-1}}"  # what it needs was put on disk before it was submitted
# since 22.05 srun does not take its CPUs from the job
if [ -n "${{SLURM_CPUS_PER_TASK:-}}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
# exec: the signal before the time limit must reach posttrain, not a shell that waits for it
exec {command}
"""


def job_script(options: Sequence[str], command: Sequence[str]) -> str:
    """Returns the text of a job's script.

    Args:
        options: long `sbatch` options, as lines that hold when the script is submitted by hand.
        command: what the job does.
    """
    directives = "\n".join(f"#SBATCH {shlex.quote(option)}" for option in options)
    return _TEXT.format(directives=directives, command=shlex.join(command))


def offline() -> bool:
    """Whether jobs submitted from here keep away from the hub: unless HF_HUB_OFFLINE says that they need not."""
    return os.environ.get("HF_HUB_OFFLINE", "1").upper() in ("1", "ON", "YES", "TRUE")
