"""The process of one stage: `python -m posttrain.stages <stage>.partial/job.json`.

It is told everything by its job file and, through the environment, by two inherited descriptors:
`POSTTRAIN_EVENTS_FD` (where progress is written) and `POSTTRAIN_LIFELINE_FD` (end of file = the parent
died). Both may be absent: a stage also starts by hand or under a user's own `accelerate launch`.

`POSTTRAIN_KILL_AT=STAGE:before_record|after_record` makes that stage's process kill itself at that point;
it exists for the tests of atomicity alone.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter

from posttrain.artifact import Artifact, Record, describe_files, publish_folder, write_record
from posttrain.errors import Interrupted, PosttrainError, StageError
from posttrain.pretraining.ranks import own_rank
from posttrain.recipe.schema import AnyStage, Runtime
from posttrain.stages import KINDS
from posttrain.stages.context import Clock, Context, Events, Job, ModelInput, Summary
from posttrain.stages.fork_server import FLAG, serve
from posttrain.stages.provenance import provenance

LAUNCHER = "POSTTRAIN_LAUNCHER"
"""Set for the workers of our own launcher."""
_PR_SET_PDEATHSIG = 1
STOP_SECONDS = 60.0
"""How long a stage that was asked to stop may take to save its checkpoint."""


class Stop:
    """Whether the stage was asked to checkpoint and exit.

    A stage that never looks has nothing to save and ends at once; one that looks has `STOP_SECONDS`.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._watched = False

    def __call__(self) -> bool:
        self._watched = True
        return self._asked.is_set()

    def request(self, *_: Any) -> None:
        """Asks for the stop; fit as a signal handler and as a thread's target."""
        if self._asked.is_set():
            return
        self._asked.set()
        if not self._watched:
            _leave()
        timer = threading.Timer(STOP_SECONDS, _leave)
        timer.daemon = True
        timer.start()

    def listen(self, lifeline: int | None) -> None:
        """Obeys SIGTERM, SIGINT, and the end of the parent (the lifeline's end of file)."""
        signal.signal(signal.SIGTERM, self.request)
        signal.signal(signal.SIGINT, self.request)
        if lifeline is not None:
            threading.Thread(target=self._follow, args=(lifeline,), daemon=True).start()

    def _follow(self, lifeline: int) -> None:
        os.read(lifeline, 1)  # nobody ever writes: it returns when the last writer is gone
        print("the parent process is gone: stopping", file=sys.stderr, flush=True)
        self.request()


def _leave() -> None:
    os._exit(Interrupted.exit_code)  # safe at any moment: every file of value is written by rename


def main(arguments: list[str]) -> int:
    """Runs the stage of one job file, or a server that forks stages; returns the exit code of the process."""
    if arguments[:1] == [FLAG]:
        forked_for = serve(arguments[1:])
        if forked_for is not None:
            _leave_at_once(run_stage(forked_for))
        return 0
    if len(arguments) != 1:
        print("usage: python -m posttrain.stages JOB", file=sys.stderr)
        return 2
    code = run_stage(Path(arguments[0]).absolute())
    if own_rank().world > 1:
        _leave_at_once(code)
    return code


def run_stage(job: Path) -> int:
    """Runs the stage of one job file with the descriptors and signals of its process; returns the exit code."""
    stop = Stop()
    stop.listen(inherited("POSTTRAIN_LIFELINE_FD", os.O_RDONLY))
    _die_with_the_launcher()
    return run_job(job, Events(_listener(), errors_only=not own_rank().first), stop)


def _listener() -> int | None:
    """Where events go: the descriptor that the parent passed on, or a file where it could not, on another machine."""
    if "POSTTRAIN_EVENTS_FILE" in os.environ:
        return os.open(os.environ["POSTTRAIN_EVENTS_FILE"], os.O_WRONLY | os.O_APPEND)
    return inherited("POSTTRAIN_EVENTS_FD", os.O_WRONLY)


def _die_with_the_launcher() -> None:
    """Has Linux kill a worker when its launcher is killed: the launcher holds the lock of the run folder."""
    if LAUNCHER in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _leave_at_once(code: int) -> NoReturn:
    """Ends the process without tearing down the interpreter.

    That would copy all that a fork server imported; and the threads of a process group, torn down with it, now and
    then abort a process whose work is done ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()  # of experiment trackers, say
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def inherited(variable: str, mode: int) -> int | None:
    """Returns the descriptor that a variable names, or None where it is not set.

    Our launcher inherits it and torch closes it for the workers, so they open it again through the launcher.
    """
    value = os.environ.get(variable)
    if value is None:
        return None
    if LAUNCHER not in os.environ:
        return int(value)
    try:
        return os.open(f"/proc/{os.getppid()}/fd/{value}", mode)
    except OSError:
        return None


def run_job(path: Path, events: Events, stop: Stop) -> int:
    """Runs one job and reports how it ended; a user's mistake leaves no traceback in the log."""
    started = time.time()
    try:
        complete(read_job(path), path.parent, events, stop, started)
    except PosttrainError as error:
        print(f"error: {error}", file=sys.stderr)
        where = _with_rank(error.where) if error.exit_code == StageError.exit_code else error.where
        events("error", where=where, found=error.found, todo=error.todo, exit_code=error.exit_code)
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        text = (str(error).strip().splitlines() or [""])[0]
        found = f"unexpected {type(error).__name__}: {text}"
        where = _with_rank(f"stage {path.parent.name.removesuffix('.partial')}")
        events("error", where=where, found=found, todo="see the log for the traceback", exit_code=1)
        return 1
    return 0


def _with_rank(where: str) -> str:
    rank = own_rank()
    return where if rank.world == 1 else f"{where}, rank {rank.index}"


def read_job(path: Path) -> Job:
    """Reads a job file; raises StageError when it is not one of this version."""
    try:
        return Job(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise StageError(str(path), f"not a job file ({error})", "start stages with `posttrain run`") from None


def context_of(job: Job, folder: Path, events: Events, stop: Stop, clock: Clock | None = None) -> Context:
    """Turns a job's plain values into what a stage works with."""
    inputs = {}
    for label, given in job.inputs.items():
        place = Path(given["folder"]) if given["folder"] else None
        inputs[label] = ModelInput(given["ref"], place, given["revision"], Artifact.read(place) if place else None)
    return Context(
        run_dir=Path(job.run_dir),
        recipe_dir=Path(job.recipe_dir),
        stage=job.stage,
        folder=folder,
        seed=job.seed,
        precision=job.precision,
        runtime=Runtime.model_validate(job.runtime),
        trainer=job.trainer,
        inputs=inputs,
        identity=job.identity,
        fingerprint=job.fingerprint,
        events=events,
        should_stop=stop,
        clock=clock or Clock(),
    )


def complete(job: Job, folder: Path, events: Events, stop: Stop, started: float) -> None:
    """Runs the stage in its partial folder, writes the record and gives the folder its final name."""
    clock = Clock()
    first = own_rank().first
    for leftover in folder.glob(".*.tmp") if first else ():
        leftover.unlink()  # of a process that was killed while it wrote
    kind = KINDS[job.kind]
    config = TypeAdapter(AnyStage).validate_json(json.dumps(job.config))
    events("phase", text="starting")
    module = importlib.import_module(kind.module)
    summary: Summary = module.run(config, context_of(job, folder, events, stop, clock))
    if not first:
        return
    events("phase", text="recording")
    clock.enter("recording")
    known = {name: seen for name, seen in summary.digests.items() if name in summary.files}
    files = known | describe_files(folder, (name for name in summary.files if name not in known))
    record = Record(
        stage=job.stage,
        kind=job.kind,
        version=kind.version,
        fingerprint=job.fingerprint,
        identity=job.identity,
        inputs=job.spelled_inputs(),
        lineage=summary.lineage,
        files=files,
        summary={
            "headline": summary.headline,
            "metrics": summary.metrics,
            "table": summary.table,
            "failed": summary.failed,
        },
        ledger=summary.ledger,
        provenance={"parts": clock.parts(), **provenance(started, time.time())},
    )
    if "POSTTRAIN_EVENTS_FILE" in os.environ:
        Path(os.environ["POSTTRAIN_EVENTS_FILE"]).unlink()  # who listens has it open
    _kill_at(job.stage, "before_record")
    write_record(folder, record)
    _kill_at(job.stage, "after_record")
    publish_folder(folder, Path(job.run_dir) / job.stage)
    events("done", headline=summary.headline, failed=summary.failed)


def _kill_at(stage: str, point: str) -> None:
    if os.environ.get("POSTTRAIN_KILL_AT") == f"{stage}:{point}":
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
