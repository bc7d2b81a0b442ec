"""One stage, one process group: started, listened to, stopped, and buried.

The stage inherits three descriptors: where it writes events, a lifeline whose end of file means that
we died, and the lock of the run folder, which is therefore free when the last of us is dead.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain import torchrun
from posttrain.errors import Interrupted, StageError, UserError
from posttrain.stage_process import EVENTS, LOG, across_nodes, command, spreads, stage_command, stage_environment
from posttrain.stages.fork_server import Forked, ForkServer

LOCK = ".lock"
STOP_SECONDS = 60.0
"""How long a stage may take to save its checkpoint after it was asked to stop."""
FAILED_SECONDS = 15.0
"""How long the processes of a stage may go on after one of them failed: a collective without it may hang."""
TAIL_LINES = 15
FORK_STAGES = True
"""Whether stages on the CPU are forked from one process that has their imports; off, each starts anew."""
_POLL = 0.2

Listener = Callable[[dict[str, Any]], None]


@dataclass
class Interruption:
    """How often the user asked us to stop (Ctrl-C or SIGTERM)."""

    count: int = 0

    def note(self, *_: Any) -> None:
        """A signal handler: counts, and leaves the acting to the loop that waits for the stage."""
        self.count += 1


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Counts SIGINT and SIGTERM instead of dying of them, until the block ends."""
    asked = Interruption()
    before = {number: signal.signal(number, asked.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def locked(run_dir: Path, signed: bool = True) -> Iterator[int]:
    """Holds the lock of an existing run folder and yields its descriptor, which stages inherit.

    Args:
        signed: write at once who holds it; otherwise the holder calls `sign` when it begins to change something.

    Raises:
        UserError: another run holds it, or a stage of one that is still stopping.
    """
    descriptor = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise UserError(
                str(run_dir),
                f"another run is using this folder (started by process {holder})",
                "wait for it to end, or stop it; the lock is free once its last stage process is gone",
            ) from None
        if signed:
            sign(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)  # never unlocked by hand: a stage that outlives us still holds it


def sign(lock: int) -> None:
    """Writes into a lock that this process holds it."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


@dataclass
class Running:
    """A stage's process as its parent holds it."""

    process: subprocess.Popen[bytes] | Forked
    log: Path
    events: int
    """Read end of the stage's events."""
    lifeline: int
    """Write end that nobody writes to: closing it, as our death does, tells the stage to stop."""
    error: dict[str, Any] | None = None
    """The first that came: other processes fail because of it, and say so later."""
    killed: dict[str, Any] | None = None
    """Which of several processes died before it could say why."""
    slurm_job: str | None = None
    """Set where srun runs the stage on several nodes: it takes a signal as its own end, not that of its tasks."""
    _pending: bytes = field(default=b"", repr=False)

    def listen(self, listener: Listener, seconds: float) -> bool:
        """Passes on the events that come within some seconds; False once there can be no more."""
        if not select.select([self.events], [], [], seconds)[0]:
            return True
        block = os.read(self.events, 1 << 16)
        *lines, self._pending = (self._pending + block).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "error" and self.error is None:
                self.error = event
            elif event["event"] == "killed":
                self.killed = event
            listener(event)
        return bool(block)

    def ask_to_stop(self) -> None:
        """Asks the stage to save a checkpoint; its leader alone: data workers must live until the save is done."""
        if self.slurm_job is None:
            self.process.terminate()
        else:
            subprocess.run(["scancel", "--signal=TERM", self.slurm_job], check=False)

    def kill(self) -> None:
        """Kills the whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def bury(self) -> None:
        """Kills what is left of the group and closes our ends."""
        self.kill()
        self.process.wait()
        os.close(self.events)
        os.close(self.lifeline)


def start(job: Path, kind: str, runtime: Mapping[str, Any], lock: int, server: ForkServer | None = None) -> Running:
    """Starts a stage in a process group of its own, its output appended to the log beside its job file.

    Args:
        server: forks the stage if it has the stage's environment.
    """
    lifeline_read, lifeline_write = os.pipe()
    environment = stage_environment(runtime, os.environ)
    with_others = torchrun.launched() and spreads(runtime)
    nodes = across_nodes(runtime, environment)
    by_file = with_others or nodes
    events_read, events_write = _event_file(job.with_name(EVENTS)) if by_file else os.pipe()
    log = job.parent / LOG
    process: subprocess.Popen[bytes] | Forked | None = None
    try:
        with log.open("ab") as output:
            output.write(f"=== {time.strftime('%Y-%m-%dT%H:%M:%S%z')} {job.parent.name}\n".encode())
            output.flush()
            if server is not None and server.environment == environment:
                process = server.fork(job, kind, (output.fileno(), events_write, lifeline_read, lock))
            if process is None:
                told = {"POSTTRAIN_EVENTS_FD": str(events_write), "POSTTRAIN_LIFELINE_FD": str(lifeline_read)}
                if by_file:
                    told["POSTTRAIN_EVENTS_FILE"] = str(job.with_name(EVENTS))
                if with_others:
                    told |= torchrun.call(job)
                process = subprocess.Popen(
                    stage_command(job) if with_others else command(job, runtime, environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**environment, **told},
                    start_new_session=True,
                    pass_fds=(events_write, lifeline_read, lock),
                )
    finally:
        os.close(events_write)
        os.close(lifeline_read)
    return Running(process, log, events_read, lifeline_write, slurm_job=environment["SLURM_JOB_ID"] if nodes else None)


def _event_file(path: Path) -> tuple[int, int]:
    """Opens a new file of events, for processes on machines that inherit no descriptor: (our end, theirs)."""
    path.write_bytes(b"")
    return os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY | os.O_APPEND)


def forkable(runtimes: Sequence[Mapping[str, Any]]) -> dict[str, str] | None:
    """Returns the environment that a server for these stages needs, or None where none would help.

    Stages are forked only when there are several, all of one process and one environment, and none of
    them can see a GPU.
    """
    environments = [stage_environment(runtime, os.environ) for runtime in runtimes]
    if not FORK_STAGES or len(environments) < 2 or any(environment != environments[0] for environment in environments):
        return None
    if any(map(spreads, runtimes)):
        return None
    gpu = environments[0].get("CUDA_VISIBLE_DEVICES") != "" and Path("/dev/nvidiactl").exists()
    return None if gpu else environments[0]


def attend(stage: str, running: Running, asked: Interruption, listener: Listener) -> None:
    """Waits for a stage, passing on its events and the user's wish to stop.

    The first request reaches the stage as SIGTERM, so that it saves a checkpoint; a second one, or
    `STOP_SECONDS`, kills its group.

    Raises:
        PosttrainError: the stage's own error with its exit code; StageError when it died without one;
            Interrupted when it was asked to stop.
    """
    deadline, failed = None, False
    try:
        while running.process.poll() is None:
            if not running.listen(listener, _POLL):
                time.sleep(_POLL / 10)  # the pipe is closed: the process is about to end
            if asked.count and deadline is None:
                deadline = time.monotonic() + STOP_SECONDS
                listener({"event": "phase", "text": "stopping: saving a checkpoint (Ctrl-C again kills it)"})
                running.ask_to_stop()
            if (running.error or running.killed) and not failed:
                failed, deadline = True, time.monotonic() + FAILED_SECONDS
            if asked.count > 1 or (deadline is not None and time.monotonic() > deadline):
                running.kill()
        while running.listen(listener, 0) and select.select([running.events], [], [], 0)[0]:
            pass
    finally:
        running.bury()
    _judge(stage, running, asked)


def _judge(stage: str, running: Running, asked: Interruption) -> None:
    """Raises what a stage's end means; returns when it ended well."""
    code = running.process.wait()
    if code == 0:
        return
    error = running.error
    failed = error is not None and error["exit_code"] != Interrupted.exit_code
    stopped = asked.count or code in (Interrupted.exit_code, -signal.SIGTERM, -signal.SIGINT)
    if stopped and not failed and running.killed is None:
        raise Interrupted(f"stage {stage}", "stopped before its end", "")
    if running.killed is not None:
        rank, name = running.killed["rank"], running.killed["signal"]
        raise StageError(f"stage {stage}, rank {rank}", _death(name, running.log), f"the whole log is in {running.log}")
    if error is not None and error["exit_code"] == UserError.exit_code:
        raise UserError(error["where"], error["found"], error["todo"])
    todo = f"the whole log is in {running.log}"
    if error is not None:
        raise StageError(error["where"], error["found"], f"{error['todo']}\n  -> {todo}".removeprefix("\n  -> "))
    how = (
        _death(signal.Signals(-code).name, running.log)
        if code < 0
        else _end(f"ended with exit code {code}", running.log)
    )
    raise StageError(f"stage {stage}", how, todo)


def _death(name: str, log: Path) -> str:
    """What the death of a process by a signal is to people."""
    guess = " (often the system's out-of-memory killer)" if name == "SIGKILL" else ""
    return _end(f"was killed by {name}{guess}", log)


def _end(how: str, log: Path) -> str:
    return f"its process {how}\n{tail(log)}"


def tail(log: Path, lines: int = TAIL_LINES) -> str:
    """Returns the last lines of a log, indented."""
    try:
        with log.open(encoding="utf-8", errors="replace") as file:
            return "".join(f"  | {line}" for line in deque(file, lines)).rstrip()
    except OSError:
        return "  | (no log)"
