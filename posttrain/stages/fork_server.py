"""A process that has imported what stages need and forks one per job: each saves seconds of start-up.

Only for the CPU: a process that has touched a GPU must not be forked. The server itself computes
nothing. A forked stage is like any other: a session and process group of its own, the same descriptors,
the same log, the same code from `__main__.run_job` on.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.stages import KINDS

FLAG = "--serve"
_BYTES = 1 << 16


@dataclass
class Forked:
    """A stage that the server forked; has the verbs of `subprocess.Popen` that the launcher uses."""

    pid: int
    server: socket.socket
    returncode: int | None = None

    def poll(self) -> int | None:
        """Returns the exit code, or None while the stage runs."""
        if self.returncode is None and select.select([self.server], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """Waits for the exit code; a server that died leaves its stage to be killed."""
        if self.returncode is None:
            message = _receive(self.server)
            self.returncode = json.loads(message)["code"] if message else -signal.SIGKILL
        return self.returncode

    def terminate(self) -> None:
        """Asks the stage to stop."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)


class ForkServer:
    """Our end of a server.

    Args:
        run_dir: of the run; stands in the server's command line so that people can tell whose it is.
        kinds: kinds of the stages to come; imported in this order.
        environment: of every stage it may fork.
    """

    def __init__(self, run_dir: Path, kinds: Sequence[str], environment: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, "-m", "posttrain.stages", FLAG, str(run_dir), str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                [*words, *dict.fromkeys(kinds)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )

    def fork(self, job: Path, kind: str, descriptors: Sequence[int]) -> Forked | None:
        """Forks a stage; None when the server is gone (its imports failed): start the stage without it.

        Args:
            descriptors: log, events, lifeline, lock; the stage gets copies.
        """
        message = json.dumps({"job": str(job), "kind": kind}).encode()
        try:
            socket.send_fds(self._socket, [message], list(descriptors))
        except OSError:
            return None
        reply = _receive(self._socket)
        return Forked(json.loads(reply)["pid"], self._socket) if reply else None

    def close(self) -> None:
        """Ends the server; a stage that still runs is not touched."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def serve(arguments: Sequence[str]) -> Path | None:
    """Forks stages until the launcher hangs up; in a forked stage, returns the job it has to run.

    Args:
        arguments: run folder, the connection's descriptor, and kinds of stages.
    """
    connection, kinds = socket.socket(fileno=int(arguments[1])), arguments[2:]
    importlib.import_module(KINDS[kinds[0]].module)
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _BYTES, 4)
        if not message:
            return None
        given = json.loads(message)
        importlib.import_module(KINDS[given["kind"]].module)
        gc.freeze()  # a collection in the stage must not touch, and so copy, what was imported here
        child = os.fork()
        if child == 0:
            connection.close()
            _become_stage(descriptors)
            return Path(given["job"])
        for descriptor in descriptors:
            os.close(descriptor)
        try:
            connection.send(json.dumps({"pid": child}).encode())
            for kind in kinds:  # while the first stage works
                importlib.import_module(KINDS[kind].module)
            _, status = os.waitpid(child, 0)
            connection.send(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())
        except OSError:
            return None  # the launcher is gone; its stage sees that by itself


def _become_stage(descriptors: Sequence[int]) -> None:
    """Leaves the server's session and takes over log, events and lifeline; the lock is only held."""
    os.setsid()
    log, events, lifeline, _ = descriptors
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.environ["POSTTRAIN_EVENTS_FD"], os.environ["POSTTRAIN_LIFELINE_FD"] = str(events), str(lifeline)


def _receive(connection: socket.socket) -> bytes:
    try:
        return connection.recv(_BYTES)
    except ConnectionError:
        return b""
