"""How the process of a stage is started: its command line and its environment. Imports nothing heavy."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOG, EVENTS = "log.txt", ".events.jsonl"
_LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_", "ROLE_", "GROUP_", "POSTTRAIN_LAUNCHER")
_PLACES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def stage_environment(runtime: Mapping[str, Any], base: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a stage: the given one, made quiet, deterministic and of the right size.

    Args:
        runtime: the stage's runtime block as plain values.
        base: what the stage inherits; threads set there hold unless the recipe names its own.
    """
    processes = (runtime.get("num_processes") or 1) // (runtime.get("num_machines") or 1)
    share = str(max(1, len(os.sched_getaffinity(0)) // processes))
    threads = str(runtime["threads"]) if runtime.get("threads") else base.get("OMP_NUM_THREADS", share)
    inherited = base if spreads(runtime) else {name: value for name, value in base.items() if not _of_launcher(name)}
    environment = {
        **inherited,
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": base.get(
            "OMP_WAIT_POLICY", "PASSIVE"
        ),  # spinning threads stall when other work is on the cores
        "TOKENIZERS_PARALLELISM": base.get("TOKENIZERS_PARALLELISM", "true"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",  # a folder called `datasets` where the user stands must not be imported
        "CUBLAS_WORKSPACE_CONFIG": base.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),  # or cuBLAS is not deterministic
    }
    if runtime.get("device") == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def command(job: Path, runtime: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """Returns the command line of a stage: one process, several on this machine, or a launcher on each of several."""
    if not spreads(runtime):
        return stage_command(job)
    launcher = [sys.executable, "-m", "posttrain.stages.launcher", str(job)]
    if across_nodes(runtime, environment):
        machines = str(runtime["num_machines"])
        srun = ["srun", "--nodes", machines, "--ntasks", machines, "--ntasks-per-node", "1", "--kill-on-bad-exit=1"]
        return [*srun, *launcher]
    return launcher


def stage_command(job: Path) -> list[str]:
    """The command line of one process of a stage."""
    return [sys.executable, "-m", "posttrain.stages", str(job)]


def spreads(runtime: Mapping[str, Any]) -> bool:
    """Whether a stage needs the launcher: several processes, or a config of Accelerate's."""
    return (runtime.get("num_processes") or 1) > 1 or runtime.get("accelerate_config") is not None


def across_nodes(runtime: Mapping[str, Any], environment: Mapping[str, str]) -> bool:
    """Whether a stage runs on several machines of a Slurm allocation."""
    return (runtime.get("num_machines") or 1) > 1 and "SLURM_JOB_ID" in environment


def _of_launcher(name: str) -> bool:
    """Whether a variable says something of processes that train together: a stage that is alone must not see it."""
    return name in _PLACES or name.startswith(_LAUNCHERS)
