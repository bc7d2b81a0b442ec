"""`metrics.jsonl`: one line per logged step, without doubles after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.artifact import write_atomically

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends metrics of steps to a file.

    Args:
        path: the file; created on the first line.
        resume_step: lines of later steps are removed, because those steps run again. None: the file is left as it
            is, by a process that never writes.
    """

    def __init__(self, path: Path, resume_step: int | None) -> None:
        self.path = path
        if resume_step is None:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
        if path.exists():
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line; it must have `step`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads all whole lines; a line cut off by a kill is left out. Absent file: no lines."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break  # only the last line can be torn: the file is append-only
    return lines
