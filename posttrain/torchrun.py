"""A run that torchrun or `accelerate launch` has started: `accelerate launch ... -m posttrain run RECIPE`.

The first process plans the recipe and runs it. For each stage that is spread over processes it calls the others,
and each starts the stage's process in its own place; every other stage runs beside the first process alone.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.pretraining.ranks import own_rank
from posttrain.stage_process import EVENTS, LOG, spreads, stage_command, stage_environment

_POLL = 0.2
_calls = itertools.count()


def launched() -> bool:
    """Whether this process is a worker of torchrun, which `accelerate launch` uses as well."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def follows() -> bool:
    """Whether this process is to do what the first one says, and nothing else."""
    return launched() and not own_rank().first


def refuse_other_count(stage: str, runtime: Mapping[str, Any]) -> None:
    """Raises UserError where a stage asks for another number of processes than were launched."""
    wanted, got = runtime.get("num_processes") or 1, own_rank().world
    if launched() and wanted != got:
        found = f"{wanted}, and {got} processes were launched"
        raise UserError(f"stages.{stage}.runtime.num_processes", found, f"add --set runtime.num_processes={got}")


def call(job: Path) -> dict[str, str]:
    """Has the other processes start a stage; returns what the first one's own stage process needs to meet theirs."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    _store().set(_turn(), json.dumps({"job": str(job), "port": port}))
    return _meeting(port)


def dismiss() -> None:
    """Lets the other processes end."""
    _store().set(_turn(), json.dumps({"job": None}))


def follow() -> int:
    """Starts this process's part of every stage that the first one calls for; returns the exit code."""
    while True:
        told = _wait_for(_turn())
        if told["job"] is None:
            return 0
        code = _take_part(Path(told["job"]), told["port"])
        if code:
            return code


def _turn() -> str:
    return f"posttrain/stage/{next(_calls)}"


def _wait_for(key: str) -> dict[str, Any]:
    while not _store().check([key]):
        time.sleep(_POLL)  # when the first process fails, torchrun ends this one
    return json.loads(_store().get(key))


@functools.cache
def _store() -> Any:
    """The launcher's own store: it is there before and after every stage."""
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False)


def _meeting(port: int) -> dict[str, str]:
    """Each stage meets at a port of its own, served by its first process: the launcher's store keeps what was said."""
    return {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _take_part(job: Path, port: int) -> int:
    """Runs one process of a stage to its end, its output beside that of the others; returns its exit code."""
    runtime = json.loads(job.read_text(encoding="utf-8"))["runtime"]
    assert spreads(runtime)
    lifeline, ours = os.pipe()
    told = {"POSTTRAIN_EVENTS_FILE": str(job.with_name(EVENTS)), "POSTTRAIN_LIFELINE_FD": str(lifeline)}
    with job.with_name(LOG).open("ab") as output:
        process = subprocess.Popen(
            stage_command(job),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**stage_environment(runtime, os.environ), **_meeting(port), **told},
            pass_fds=(lifeline,),
        )
    os.close(lifeline)

    def pass_on(number: int, _: Any) -> None:
        process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    code = process.wait()
    os.close(ours)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(1))
    if code < 0:
        died = {"event": "killed", "rank": own_rank().index, "signal": signal.Signals(-code).name}
        with job.with_name(EVENTS).open("a", encoding="utf-8") as events:
            events.write(json.dumps(died) + "\n")
    return abs(code)
