"""Merges over and over, each time in a child process that is killed at another moment.

    python killed_merge.py BASE ADAPTER FOLDER

Every step of a merge that touches FOLDER's files, a base's or an adapter's (each file opened, folder made, file
renamed or removed) is a moment. The child that is killed at moment n works in FOLDER/n; the first child that comes
to its end is the last. Prints the number of moments.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from posttrain.merging.merge import merge

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}


def killed_at(moment: int, base: Path, adapter: Path, folder: Path) -> bool:
    """Whether a merge that dies at that moment of its life died of it."""
    child = os.fork()
    if child == 0:
        left = moment

        def count(event: str, given: tuple[Any, ...]) -> None:
            nonlocal left
            if event in EVENTS and str(given[0]).startswith((str(base), str(adapter), str(folder))):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        merge(base, [adapter], folder / "out", "bfloat16", max_shard_size=9_000)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) != (status != 0) or (status and os.WTERMSIG(status) != signal.SIGKILL):
        raise SystemExit(f"moment {moment}: status {status}")
    return status != 0


if __name__ == "__main__":
    os.fsync = os.fdatasync = lambda _: None  # what was written outlives a process, synced or not
    base, adapter, work = (Path(argument) for argument in sys.argv[1:])
    moment = 0
    while True:
        (work / str(moment)).mkdir()
        if not killed_at(moment, base, adapter, work / str(moment)):
            break
        moment += 1
    print(moment)
