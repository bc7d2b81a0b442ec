"""A cluster of one: Slurm's commands as fakes on the PATH, and a node that runs what they took."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runs_support import FAKES


class Cluster:
    """Fake commands in a folder, and the jobs that were given to them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for name in ("sbatch", "squeue", "scontrol", "scancel"):
            program = self.bin / name
            program.write_text(f"#!{sys.executable} -S\n{(FAKES / 'fake_slurm.py').read_text()}")
            program.chmod(0o755)

    def jobs(self) -> dict[str, dict[str, Any]]:
        """All jobs, by id."""
        path = self.folder / "jobs.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def states(self) -> dict[str, str]:
        """Stage -> state of its last job."""
        return {Path(job["script"]).stem: job["state"] for job in self.jobs().values()}

    def options(self, stage: str) -> dict[str, str]:
        """What the last job of a stage was submitted with."""
        return [job["options"] for job in self.jobs().values() if Path(job["script"]).stem == stage][-1]

    def work(self, meanwhile: Callable[[subprocess.Popen[bytes]], None] = lambda _: None, **env: str) -> dict[str, str]:
        """Runs the jobs that wait, each once what it depends on ended well, as a node would; returns their states.

        Args:
            meanwhile: is called with the process of each job.
            env: environment of the node.
        """
        jobs = self.jobs()
        for job, told in jobs.items():
            if told["state"] != "pending":
                continue
            after = told["options"].get("dependency", "").removeprefix("afterok:")
            told["state"] = "running" if not after or jobs[after]["state"] == "completed" else "cancelled"
            if told["state"] == "running":
                self._write(jobs)
                told["state"] = "completed" if self.start(job, meanwhile, **env) == 0 else "failed"
        self._write(jobs)
        return self.states()

    def start(self, job: str, meanwhile: Callable[[subprocess.Popen[bytes]], None], **env: str) -> int:
        """Runs the script of one job to its end; returns its exit code."""
        told = self.jobs()[job]
        environment = {**os.environ, "SLURM_JOB_ID": job, **env}
        with Path(told["options"]["output"]).open("ab") as log:
            process = subprocess.Popen(
                ["bash", told["script"]],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=told["options"]["chdir"],
                env=environment,
            )
        meanwhile(process)
        return process.wait(timeout=60)

    def _write(self, jobs: dict[str, dict[str, Any]]) -> None:
        (self.folder / "jobs.json").write_text(json.dumps(jobs))
