"""What a stage's job asks of a cluster, from the stage's runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

STOP_BEFORE = 120
"""Seconds before its time limit at which a job is told to stop; a stage has 60 of them to save its checkpoint."""
_GPUS = {"gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket", "gres", "tres-per-task"}
_CPUS = {"cpus-per-task", "cpus-per-gpu", "tres-per-task"}


@dataclass(frozen=True)
class Resources:
    """A job's size, and the long `sbatch` options that ask for it."""

    nodes: int
    processes: int
    """On each node."""
    gpus: int
    """On each node; 0 where none is asked for, or the recipe asks for them in its own words."""
    cpus: int
    """On each node; 0 where the cluster's default, or the recipe's own words, decide."""
    options: tuple[str, ...]


def resources(kind: str, runtime: Mapping[str, Any]) -> Resources:
    """Translates a stage's runtime (plain values, processes divisible by machines).

    A GPU for each process is asked for where `device: cuda` says so, except to publish, which computes nothing;
    CPUs where `threads` (of each process) or `dataset_num_proc` say so. An option of `runtime.slurm` about GPUs or
    CPUs takes the place of ours.
    """
    own = runtime.get("slurm") or {}
    nodes = runtime.get("num_machines") or 1
    processes = (runtime.get("num_processes") or 1) // nodes
    gpus = processes if runtime.get("device") == "cuda" and kind != "publish" and not _GPUS & own.keys() else 0
    cpus = max((runtime.get("threads") or 0) * processes, runtime.get("dataset_num_proc") or 0)
    cpus = 0 if _CPUS & own.keys() else cpus
    options = [f"--nodes={nodes}", "--ntasks-per-node=1", f"--signal=B:TERM@{STOP_BEFORE}"]
    options += [f"--gpus-per-node={gpus}"] if gpus else []
    options += [f"--cpus-per-task={cpus}"] if cpus else []
    options += [f"--{name}" if value is True else f"--{name}={value}" for name, value in own.items()]
    return Resources(nodes, processes, gpus, cpus, tuple(options))
