"""What `runtime.slurm` may hold: long options of `sbatch`, without those that a submission sets itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.recipe.problems import Problem
from posttrain.recipe.yaml12 import KeyPath

_NAME = re.compile(r"[a-z][a-z0-9-]*")
_FIXED = "leave it out: it is set for each stage's job"
_OURS = {
    "nodes": "set runtime.num_machines",
    "ntasks": "set runtime.num_processes",
    **dict.fromkeys(["ntasks-per-node", "ntasks-per-gpu"], "set runtime.num_processes and num_machines"),
    **dict.fromkeys(["ntasks-per-core", "ntasks-per-socket"], "set runtime.num_processes and threads"),
    "clusters": "set SLURM_CLUSTERS where you submit: sbatch, squeue and scancel all read it",
    **dict.fromkeys(["dependency", "kill-on-invalid-dep", "hold", "array", "wrap", "parsable", "test-only"], _FIXED),
    **dict.fromkeys(["job-name", "chdir", "output", "error", "open-mode", "input", "signal"], _FIXED),
    **dict.fromkeys(["export", "export-file", "wait", "quiet", "verbose", "help", "usage", "version"], _FIXED),
}
"""Option -> what to do instead."""


def check_slurm(path: KeyPath, options: Mapping[str, Any]) -> Iterator[Problem]:
    """Yields the options that `sbatch` cannot get through a recipe.

    Args:
        path: place of the block.
        options: of the types that the schema allows; others are its own problem.
    """
    for name, value in options.items():
        if not _NAME.fullmatch(str(name)):
            near = str(name).lower().strip("-").replace("_", "-")
            todo = f"write {near}" if _NAME.fullmatch(near) else ""
            yield Problem((*path, name), "is no long option of sbatch", todo)
        elif name in _OURS:
            yield Problem((*path, name), "cannot be set here", _OURS[name])
        elif value is False:
            yield Problem((*path, name), "false is no value of an option", "leave it out; true gives a bare --option")
        elif isinstance(value, str) and not (value and value.isprintable()):
            yield Problem((*path, name), "is not one line of text", "give the value that follows --option=")
