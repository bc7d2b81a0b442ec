"""A `posttrain run` that may be started again and again, with the ids of its processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

ORPHAN_SECONDS = 90.0
"""How long an orphaned stage may take to save and end: it promises 60 s once it is asked to."""
SURVIVED_SECONDS = 5.0
"""After which a run that goes on has survived the death of its victim."""
RUN_SECONDS = 600.0
CHECKPOINTS = "checkpoints"


class Failure(Exception):
    """A contract that did not hold."""


class Command:
    """`posttrain run` of one recipe into one runs folder, which may be started many times.

    Args:
        recipe: the YAML file.
        runs: folder of runs; the output of every start is appended to `command.log` in it.
        options: of `posttrain run`, besides.
    """

    def __init__(self, recipe: Path, runs: Path, options: Sequence[str] = ()) -> None:
        self.recipe, self.runs, self.options = recipe, runs, list(options)
        self.stages: list[str] = list(yaml.safe_load(recipe.read_text(encoding="utf-8"))["stages"])
        self.run_dir = runs / yaml.safe_load(recipe.read_text(encoding="utf-8"))["name"]
        self.log = runs / "command.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.started = 0.0
        self.began: dict[str, float] = {}
        """Stage -> when its process was first seen, since the last start."""

    def start(self, **environment: str) -> None:
        """Starts the command in a session of its own."""
        self.runs.mkdir(parents=True, exist_ok=True)
        words = [
            sys.executable,
            "-m",
            "posttrain",
            "run",
            str(self.recipe),
            "--runs-dir",
            str(self.runs),
            *self.options,
        ]
        self.started, self.began = time.time(), {}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*words, *self.options],
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def ended(self) -> bool:
        """Whether the command ended; Failure when it ended by itself with an error."""
        assert self.process is not None
        code = self.process.poll()
        if code not in (None, 0):
            raise Failure(f"exit code {code} though nothing was killed\n{self.tail()}")
        return code == 0

    def finish(self) -> None:
        """Waits for a good end, looking at its stages."""
        self.wait(lambda: False, "its end")

    def wait(self, what: Callable[[], object], spelled: str, pause: float = 0.1) -> bool:
        """Waits until something holds, looking at the stages; False when the run came to its end first."""

        def over() -> bool:
            self.look()
            return bool(what()) or self.ended()

        wait_for(over, RUN_SECONDS, f"{self.log}: never came to {spelled}", pause)
        return not self.ended()

    def close(self) -> None:
        """Kills what is left of it; nothing after a good end."""
        if self.process is not None and self.process.poll() is None:
            self.kill("group")

    def tail(self) -> str:
        """The end of what it printed."""
        return "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-12:])

    def look(self) -> None:
        """Notes which stage's process is seen at work for the first time since this start."""
        if "stage" not in self.processes():
            return
        for stage in self.stages:
            with contextlib.suppress(FileNotFoundError):
                written = (self.run_dir / f"{stage}.partial" / "job.json").stat().st_mtime
                if written > self.started:
                    self.began.setdefault(stage, time.time())

    def processes(self) -> dict[str, int]:
        """Ids of its living processes, by the names of victims."""
        assert self.process is not None
        found = {} if self.process.poll() is not None else {"parent": self.process.pid}
        for child in children(self.process.pid):
            if b"--serve" in read_bytes(Path(f"/proc/{child}/cmdline")):
                found["server"] = child
                found.update(("stage", forked) for forked in children(child))
            else:
                found["stage"] = child
        return found

    def ranks(self) -> dict[int, int]:
        """Ids of the living processes that train the stage at work together, by rank; none where it is one process."""
        found = {}
        for child in children(self.processes().get("stage", 0)):
            told = dict(
                entry.split(b"=", 1) for entry in read_bytes(Path(f"/proc/{child}/environ")).split(b"\0") if entry
            )
            if b"RANK" in told:
                found[int(told[b"RANK"])] = child
        return found

    def kill(self, victim: str) -> str:
        """Kills a victim, the parent where it does not live, and whatever of the run survives its victim's death.

        Returns:
            Who was killed.
        """
        assert self.process is not None
        living = self.processes()
        chosen = list(living) if victim == "group" else [victim if victim in living else "parent"]
        self._kill(living, chosen)
        try:
            self.process.wait(timeout=SURVIVED_SECONDS)
        except subprocess.TimeoutExpired:  # between two stages the run goes on without its server
            living = self.processes()
            self._kill(living, list(living))
            self.process.wait()
            return f"{victim}, then group"
        return victim if victim == "group" else chosen[0]

    @staticmethod
    def _kill(living: dict[str, int], names: list[str]) -> None:
        for name in names:
            with contextlib.suppress(KeyError, ProcessLookupError):
                os.kill(living[name], signal.SIGKILL)

    def wait_until_free(self) -> None:
        """Waits until the last process of the run has let go of its lock."""
        wait_for(self.free, ORPHAN_SECONDS, f"{self.run_dir}: an orphan still holds the lock")

    def free(self) -> bool:
        """Whether nobody holds the lock of the run folder."""
        try:
            with (self.run_dir / ".lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
        return True

    def place(self) -> str:
        """Where the run is: the stage at work, its last finished step, its newest checkpoint."""
        self.look()
        at_work = [stage for stage in self.began if (self.run_dir / f"{stage}.partial").exists()]
        if not at_work:
            return "between stages" if self.began else "start"
        folder = self.run_dir / f"{at_work[-1]}.partial"
        lines = read_bytes(folder / "metrics.jsonl").splitlines()
        saved = [int(path.name.rpartition("-")[2]) for path in (folder / CHECKPOINTS).glob("checkpoint-*")]
        step = f", step {json.loads(lines[-1])['step']}" if lines else ""
        return at_work[-1] + step + (f", checkpoint {max(saved)}" if saved else "")


def children(parent: int) -> list[int]:
    """Ids of the living children of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        state, owner, *_ = read_bytes(path).rpartition(b")")[2].split() or [b"", b""]
        if owner == str(parent).encode() and state != b"Z":
            found.append(int(path.parent.name))
    return found


def read_bytes(path: Path) -> bytes:
    """Content of a file, or nothing where it is gone."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def wait_for(what: Callable[[], object], seconds: float, complaint: str, pause: float = 0.01) -> None:
    """Waits until something holds; raises Failure when it does not in time."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise Failure(complaint)
        time.sleep(pause)
