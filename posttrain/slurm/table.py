"""What was submitted, for people."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from posttrain.slurm.submit import Submitted


def show_jobs(jobs: Sequence[Submitted], stream: IO[str], quiet: bool = False) -> None:
    """Prints a table of jobs, and what watches and stops them; nothing when quiet."""
    from rich.console import Console
    from rich.table import Table

    width = None if stream.isatty() else 1000  # in a file no path is broken over lines
    console = Console(file=stream, highlight=False, soft_wrap=True, width=width, quiet=quiet)
    if not jobs:
        console.print("nothing to submit: every stage is finished")
        return
    table = Table("stage", "job", "nodes x processes", "GPUs", "CPUs", "log", box=None, padding=(0, 2, 0, 0))
    for one in jobs:
        asked = one.resources
        size = f"{asked.nodes} x {asked.processes}"
        gpus, cpus = (str(count * asked.nodes) if count else "-" for count in (asked.gpus, asked.cpus))
        table.add_row(one.stage, one.job, size, gpus, cpus, _short(one.log))
    console.print(table)
    ids = [one.job for one in jobs]
    console.print(f"watch: squeue -j {','.join(ids)}; tail -F {shlex.quote(_short(jobs[0].log))}", markup=False)
    console.print(f"stop:  scancel {' '.join(reversed(ids))}", markup=False)


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
