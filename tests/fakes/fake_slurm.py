"""`sbatch`, `squeue`, `scontrol` and `scancel` over one JSON file: what a test puts on the PATH under these names.

`FAKE_SLURM` names the folder of the file; `FAKE_SLURM_REFUSE` the job that `sbatch` refuses, by its name's end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ALIVE = ("held", "pending", "running")


def main(command: str, words: list[str]) -> int:
    """Runs one command; returns its exit code."""
    path = Path(os.environ["FAKE_SLURM"]) / "jobs.json"
    jobs: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    options = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
    names = [word for word in words if not word.startswith("--")]
    code = {"sbatch": sbatch, "squeue": squeue, "scontrol": scontrol, "scancel": scancel}[command](jobs, options, names)
    path.write_text(json.dumps(jobs, indent=1))
    return code


def sbatch(jobs: dict[str, dict[str, Any]], options: dict[str, str], names: list[str]) -> int:
    if options["job-name"].endswith(os.environ.get("FAKE_SLURM_REFUSE") or "\0"):
        print("sbatch: error: invalid partition specified: moon", file=sys.stderr)
        print("sbatch: error: Batch job submission failed: Invalid partition name specified", file=sys.stderr)
        return 1
    job = str(101 + len(jobs))
    inherited = sorted(name for name in os.environ if name.startswith(("SLURM_", "SQUEUE_")))
    jobs[job] = {
        "options": options,
        "script": names[0],
        "state": "held" if "hold" in options else "pending",
        "inherited": inherited,
    }
    print(f"{job};far" if os.environ.get("SLURM_CLUSTERS") else job)
    return 0


def squeue(jobs: dict[str, dict[str, Any]], options: dict[str, str], names: list[str]) -> int:
    asked = options["jobs"].split(",")
    if len(asked) == 1 and asked[0] not in jobs:
        print("slurm_load_jobs error: Invalid job id specified", file=sys.stderr)
        return 1
    if os.environ.get("FAKE_SLURM_DOWN"):
        print("squeue: error: Unable to contact slurm controller (connect failure)", file=sys.stderr)
        return 1
    print("\n".join(job for job in asked if job in jobs and jobs[job]["state"] in ALIVE))
    return 0


def scontrol(jobs: dict[str, dict[str, Any]], options: dict[str, str], names: list[str]) -> int:
    if os.environ.get("FAKE_SLURM_NO_RELEASE"):
        print("Access/permission denied", file=sys.stderr)
        return 1
    jobs[names[1]]["state"] = "pending"
    return 0


def scancel(jobs: dict[str, dict[str, Any]], options: dict[str, str], names: list[str]) -> int:
    for name in names:
        jobs[name]["state"] = "cancelled"
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[0]).name, sys.argv[1:]))
