"""Starts the processes of one stage on this machine: `python -m posttrain.stages.launcher JOB`.

It is `torch.distributed.run` with the environment that the stage's Accelerate config means, taken from
Accelerate's own launcher, and with an end that says which process failed first and how. On several
machines it runs once on each, told by Slurm's variables who is first.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import check_cuda_p2p_ib_support, is_deepspeed_available
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, parse_args

from posttrain.errors import PosttrainError, UserError, missing_extra
from posttrain.stages.__main__ import LAUNCHER, read_job
from posttrain.stages.context import Events, Job

_PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}
_PORT = 29400
"""First port of the meeting place of several machines; the job's id is added, so that two jobs do not meet."""


def main(arguments: list[str]) -> int:
    """Runs the processes of a job to their end; returns the exit code of the one that failed first, or 0."""
    if len(arguments) != 1:
        print("usage: python -m posttrain.stages.launcher JOB", file=sys.stderr)
        return 2
    path = Path(arguments[0]).absolute()
    events = Events(int(os.environ["POSTTRAIN_EVENTS_FD"]) if "POSTTRAIN_EVENTS_FD" in os.environ else None)
    try:
        job = read_job(path)
        os.environ.update({LAUNCHER: "1", **_without_peer_access(os.environ)})
        os.environ.update(accelerate_environment(job, os.environ))
        words = launch_words(job.runtime, os.environ)
    except PosttrainError as error:
        print(f"error: {error}", file=sys.stderr)
        events("error", where=error.where, found=error.found, todo=error.todo, exit_code=error.exit_code)
        return error.exit_code
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass_on)
    config, entry, rest = config_from_args(parse_args([*words, "-m", "posttrain.stages", str(path)]))
    try:
        elastic_launch(config, entry)(*rest)
    except ChildFailedError as error:
        return _judge(error.failures, events)
    return 0


def launch_words(runtime: Mapping[str, Any], environment: Mapping[str, str]) -> list[str]:
    """The options of `torch.distributed.run` for a stage's runtime.

    Raises:
        UserError: several machines, and nothing says which of them this is.
    """
    machines = runtime.get("num_machines") or 1
    here = (runtime.get("num_processes") or 1) // machines
    # A stop is for the stage to act on: torch would kill it half a minute later, checkpoint or not.
    words = ["--nproc-per-node", str(here), "--max-restarts", "0", "--signals-to-handle", "SIGHUP"]
    if machines == 1:
        return [*words, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", str(os.getpid())]
    try:
        node, job = environment["SLURM_NODEID"], int(environment["SLURM_JOB_ID"])
        head = first_host(environment["SLURM_JOB_NODELIST"])
    except KeyError as error:
        todo = "run it in a Slurm allocation, or each stage under your own torchrun or accelerate launch"
        raise UserError("runtime.num_machines", f"{machines}, and {error.args[0]} is not set", todo) from None
    port = str(_PORT + job % 10_000)
    return [*words, "--nnodes", str(machines), "--node-rank", node, "--master-addr", head, "--master-port", port]


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `a[03-05,9],b1` -> `a03`."""
    name, bracket, inner = nodes.partition("[")
    if "," in name or not bracket:
        return name.partition(",")[0]
    inside, _, after = inner.partition("]")
    return name + inside.replace("-", ",").partition(",")[0] + after.partition(",")[0]


def accelerate_environment(job: Job, environment: Mapping[str, str]) -> dict[str, str]:
    """What `accelerate launch` would set for a stage's config and processes; empty where it names none.

    Raises:
        UserError: Accelerate refuses the config, or needs a library that is not installed.
    """
    config = job.runtime.get("accelerate_config")
    if config is None:
        return {}
    words = ["--config_file", str(config), "--mixed_precision", _PRECISIONS[job.precision]]
    words += ["--num_processes", str(job.runtime["num_processes"]), "--num_machines", "1", "--main_process_port", "0"]
    try:
        given, defaults, mixed = _validate_launch_command(launch_command_parser().parse_args([*words, "posttrain"]))
        if given.use_deepspeed:
            if not is_deepspeed_available():
                raise missing_extra("deepspeed", "deepspeed")
            fields = list(defaults.deepspeed_config) + (["mixed_precision"] if mixed else [])
            given.deepspeed_fields_from_accelerate_config = ",".join(fields)
            meant = prepare_deepspeed_cmd_env(given)[1]
        else:
            meant = prepare_multi_gpu_env(given)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        found = f"Accelerate refuses it: {str(error).splitlines()[0]}"
        raise UserError(str(config), found, "mend the config, or install what it needs") from None
    ours = {"OMP_NUM_THREADS"}  # the recipe says how many
    return {name: value for name, value in meant.items() if environment.get(name) != value and name not in ours}


def _without_peer_access(environment: Mapping[str, str]) -> dict[str, str]:
    """What several consumer GPUs on an old driver need: Accelerate starts on them only where it is set."""
    if check_cuda_p2p_ib_support():
        return {}
    return {name: "1" for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE") if name not in environment}


def _pass_on(number: int, _: Any) -> None:
    """Hands a signal to the processes of the stage, which then save a checkpoint together."""
    for child in psutil.Process().children():
        child.send_signal(number)


def _judge(failures: Mapping[int, ProcessFailure], events: Events) -> int:
    """Says which process failed first, if it could not say so itself; returns the exit code of the stage.

    Args:
        failures: by rank; those that torch ended because of the first are among them.
    """
    began = min(failure.timestamp for failure in failures.values())
    first = {rank: failure.exitcode for rank, failure in failures.items() if failure.timestamp <= began + 1}
    for rank, code in first.items():
        if -code in _DEADLY:
            events("killed", rank=rank, signal=signal.Signals(-code).name)
            return 1
    codes = list(first.values())
    return UserError.exit_code if UserError.exit_code in codes else codes[0] if codes[0] > 0 else 1


_DEADLY = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
"""Signals that end a process before it can say why; torch sends the first of them half a minute after a failure."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
