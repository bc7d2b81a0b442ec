"""Trains with one process and with two, and shows that it is the same run, also when a process of it dies.

    python scripts/prove_ranks.py [--runs-dir DIR] [--stages sft_lora dpo_lora] [--accelerate-config fsdp2] [--quick]

The recipe of `kill_runs.py`, with rows of unequal length and without dropout (whose draws differ from process
to process), runs with one process and, on the same base, with two. Of every stage are compared: the loss of
each step, the order of the rows, the names, shapes and numbers of all tensors, and the certificates of merges.

Then the last SFT and the last DPO stage of two processes are disturbed, one thing after another in one run,
each start going on from the checkpoint of the one before:

    stop      SIGTERM to `posttrain run`, as Ctrl-C: all save a checkpoint, exit code 130
    error 1   the last process finds no file descriptor left and raises when it saves
    kill 1    kill -9 of the last process
    kill 0    kill -9 of the first process
    launcher  kill -9 of the process that started both

Each has to end the command within a minute, with an error that names the process that died, and to leave none.
At last two processes go on to the end, whose files are to the byte those of the run that nothing disturbed;
and one process does, from the same checkpoint. `--quick` kills a process of one DPO stage, lets two go on, and
compares it with one process. Exit code 0 when all of it holds, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from kill_runs import compare, cut_recipe, digests
from killable import CHECKPOINTS, RUN_SECONDS, Command, Failure, read_bytes, wait_for
from safetensors.torch import load_file

from posttrain.pretraining.checkpoint import checkpoint_steps
from posttrain.pretraining.metrics import FILE, read_metrics

TWO = ("--set", "runtime.num_processes=2")
LOSS, NUMBER, NORM = 1e-4, 1e-3, 1e-4
"""Largest relative difference of a step's loss; of a number, relative to the largest in its tensor; of a tensor.

Adam makes as much of a gradient that rounding alone keeps from zero as of any other: single numbers may be further
apart than a tensor is.
"""
EXACT = ("step", "tokens", "supervised_tokens", "rows", "learning_rate")
NEAR = ("mean_token_accuracy", "entropy", "logits/chosen", "logits/rejected")
"""TRL's means over the tokens of a piece, which pieces of pairs join by their pairs: they depend on the cut."""
END_SECONDS = 60.0
"""Within which the command ends after a process of its died."""
GONE_SECONDS, QUICK = 2.0, "dpo_lora"


@dataclass(frozen=True)
class Alike:
    """How far a stage of two runs agrees."""

    stage: str
    steps: int
    loss: float
    """Largest relative difference of a step's loss."""
    tensors: int
    number: float
    """Largest difference of a number, relative to the largest in its tensor."""
    norm: float
    """Largest norm of the difference of two tensors, relative to the tensor's."""


@dataclass(frozen=True)
class End:
    """How a disturbed run ended."""

    stage: str
    what: str
    step: int
    """The last that was finished when it was disturbed."""
    seconds: float
    """From then to the end of the command."""
    code: int
    said: str
    """The line of the command that says why."""
    checkpoint: int
    """The newest that it left."""


Disturb = Callable[[Command, dict[int, int]], None]


def prepare_recipe(stages: list[str], folder: Path) -> Path:
    """Copies the recipe, some of its stages only, with conversations of unequal length and without dropout."""
    path = cut_recipe(stages, folder)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for stage in recipe["stages"].values():
        for method in stage.get("method", {}).values():
            method["lora_dropout"] = 0.0
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    rows = [json.loads(line) for line in (folder / "chat.jsonl").read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows):
        answer = row["messages"][-1]
        answer["content"] = " ".join([answer["content"]] * (1 + number % 4))
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def begin_from(done: Command, stages: list[str], command: Command) -> Command:
    """Gives a command some finished stages of another; returns it."""
    for stage in stages:
        shutil.copytree(done.run_dir / stage, command.run_dir / stage)
    return command


def run(command: Command) -> Command:
    """Runs a command to its good end; returns it."""
    with contextlib.closing(command):
        command.start()
        command.finish()
    return command


def compare_stage(one: Path, other: Path) -> Alike:
    """Compares the folders that a stage of two runs has left.

    Raises:
        Failure: other files, tensors, rows or steps; or numbers that are too far apart.
    """
    files = [sorted(json.loads((folder / "stage.json").read_text())["files"]) for folder in (one, other)]
    if files[0] != files[1]:
        raise Failure(f"{other} has other files than {one}: {sorted(set(files[0]) ^ set(files[1]))}")
    curves = [read_metrics(folder / FILE) for folder in (one, other)]
    if any(len(curve) != len(curves[0]) for curve in curves):
        raise Failure(f"{other} has logged {len(curves[1])} steps, {one} {len(curves[0])}")
    loss = max((compare_line(*lines) for lines in zip(*curves, strict=True)), default=0.0)
    compare_order(one / "data_order.npz", other / "data_order.npz")
    numbers, norms = zip(*compare_tensors(one, other), strict=True)
    found = Alike(one.name, len(curves[0]), loss, len(numbers), max(numbers), max(norms))
    compare_certificates(one / "certificate.json", other / "certificate.json")
    if not (found.loss <= LOSS and found.number <= NUMBER and found.norm <= NORM):
        raise Failure(f"{other} is too far from {one}: {found}")
    return found


def compare_line(one: dict[str, float], other: dict[str, float]) -> float:
    """Returns the relative difference of the losses of a step; Failure where counts or other figures differ."""
    figures = one.keys() - {"loss", "seconds", "tokens_per_second"}
    far = {name: 5e-2 if name in NEAR else 1e-3 for name in figures}
    odd = {name for name in figures if not np.isclose(other.get(name, np.nan), one[name], far[name], far[name])}
    odd |= one.keys() ^ other.keys() | {name for name in EXACT if other.get(name) != one[name]}
    if odd:
        raise Failure(f"{[(name, one.get(name), other.get(name)) for name in sorted(odd)]} in {other}")
    return abs(other["loss"] / one["loss"] - 1)


def compare_order(one: Path, other: Path) -> None:
    """Raises Failure where two stages have read their rows in another order; a merge has none."""
    if not (one.exists() or other.exists()):
        return
    with np.load(one) as first, np.load(other) as second:
        same = first.files == second.files and all(np.array_equal(first[name], second[name]) for name in first.files)
    if not same:
        raise Failure(f"{other} is another order than {one}")


def compare_tensors(one: Path, other: Path) -> Iterator[tuple[float, float]]:
    """Yields how far each tensor is from its like: (number, norm), see `Alike`; Failure where it has none."""
    for path in sorted(one.glob("*.safetensors")):
        ours, theirs = load_file(path), load_file(other / path.name)
        if ours.keys() != theirs.keys():
            raise Failure(f"{other / path.name} has other tensors: {sorted(ours.keys() ^ theirs.keys())}")
        for name, tensor in ours.items():
            found = theirs[name]
            if found.shape != tensor.shape or found.dtype != tensor.dtype or not found.isfinite().all():
                raise Failure(f"{other / path.name}: {name} is not whole")
            gap, size = found.double() - tensor.double(), tensor.double()
            zero = 1e-300  # a tensor of zeros has its like in zeros alone
            yield (gap.abs().max() / (size.abs().max() + zero)).item(), (gap.norm() / (size.norm() + zero)).item()


def compare_certificates(one: Path, other: Path) -> None:
    """Raises Failure where two merges are not both certified, on as many tensors and tokens."""
    if not one.exists():
        return
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (one, other))
    for part, name in (("weights", "tensors"), ("logits", "tokens"), ("rows", "rows")):
        if first[part][name] != second[part][name]:
            raise Failure(f"{other}: {second[part][name]} {part}.{name}, {one}: {first[part][name]}")
    if (first["verdict"], second["verdict"]) != ("pass", "pass"):
        raise Failure(f"{other}: {second['verdict']}; {one}: {first['verdict']}")


def stop(command: Command, ranks: dict[int, int]) -> None:
    """Asks the command to stop, and waits until it has passed that on."""
    assert command.process is not None
    command.process.send_signal(signal.SIGTERM)
    wait_for(lambda: "stopping" in command.tail(), END_SECONDS, "it did not hear SIGTERM", pause=0.05)
    time.sleep(0.5)


def exhaust(command: Command, ranks: dict[int, int]) -> None:
    """Leaves the last process without file descriptors: the next file that it opens is an error."""
    hard = resource.prlimit(ranks[1], resource.RLIMIT_NOFILE)[1]
    resource.prlimit(ranks[1], resource.RLIMIT_NOFILE, (1, hard))


def kill(rank: int) -> Disturb:
    """What kills one process."""
    return lambda command, ranks: os.kill(ranks[rank], signal.SIGKILL)


def kill_launcher(command: Command, ranks: dict[int, int]) -> None:
    """Kills the process that started the others."""
    os.kill(command.processes()["stage"], signal.SIGKILL)


@dataclass(frozen=True)
class Disturbance:
    """Something that befalls a stage of two processes in the middle of its training."""

    name: str
    act: Disturb
    code: int
    says: tuple[str, ...]
    """What the command has to say."""
    after_save: bool
    """Wait for a checkpoint that is newer than the one the stage began from; else for a step."""
    saves: bool = False
    """Whether it has to leave a newer checkpoint than it found."""


KILL = Disturbance("kill 1", kill(1), 1, ("rank 1", "killed by SIGKILL"), after_save=True)
DISTURBANCES = (
    Disturbance("stop", stop, 130, ("stopped", "posttrain run"), after_save=False, saves=True),
    Disturbance("error 1", exhaust, 1, ("rank 1", "open file"), after_save=False),
    KILL,
    Disturbance("kill 0", kill(0), 1, ("rank 0", "killed by SIGKILL"), after_save=True),
    Disturbance("launcher", kill_launcher, 1, ("killed by SIGKILL",), after_save=False),
)


def disturb(command: Command, stage: str, how: Disturbance) -> End:
    """Starts a command on two processes, disturbs a stage in the middle of its training, and waits for the end.

    Raises:
        Failure: it ended late, with another code or without saying which process failed; or a process is left.
    """
    partial = command.run_dir / f"{stage}.partial"
    before = newest(partial)
    at = command.log.stat().st_size if command.log.exists() else 0
    command.start()
    assert command.process is not None

    def reached() -> bool:
        return newest(partial) > before if how.after_save else last_step(partial) > before

    if not command.wait(reached, f"{stage}: {how.name}", pause=0.005):
        raise Failure(f"{stage} was over before it could be disturbed ({how.name})")
    ranks = command.ranks()
    os.kill(ranks[0], signal.SIGSTOP)  # the others wait for it: the stage stands still while it is disturbed
    step, saved, began = last_step(partial), newest(partial), time.monotonic()
    how.act(command, ranks)
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks[0], signal.SIGCONT)
    code = command.process.wait(timeout=RUN_SECONDS)
    seconds = time.monotonic() - began
    said = command.log.read_bytes()[at:].decode()
    lines = [line.strip() for line in said.splitlines() if how.says[0] in line]
    end = End(stage, how.name, step, seconds, code, lines[0] if lines else "", newest(partial))
    if code != how.code or seconds > END_SECONDS or not all(word in said for word in how.says):
        raise Failure(f"{end}\n{said}")
    if end.checkpoint < saved + how.saves:
        raise Failure(f"checkpoint {saved} before, {end.checkpoint} after: {end}\n{said}")
    wait_for(lambda: not left_of(command), GONE_SECONDS, f"processes are left after {end}: {left_of(command)}")
    if not command.free():
        raise Failure(f"the lock of the run is held after {end}")
    return end


def newest(partial: Path) -> int:
    """Step of the newest checkpoint of a stage at work, 0 where there is none."""
    return max(checkpoint_steps(partial / CHECKPOINTS), default=0)


def last_step(partial: Path) -> int:
    """The last step that a stage at work has logged, 0 where there is none."""
    lines = read_metrics(partial / FILE)
    return lines[-1]["step"] if lines else 0


def left_of(command: Command) -> list[int]:
    """Ids of living processes that were started for a command's runs."""
    found = Path("/proc").glob("[0-9]*/cmdline")
    return [int(path.parent.name) for path in found if str(command.runs).encode() in read_bytes(path)]


def disturb_in_turn(two: Command, stage: str, folder: Path) -> tuple[list[End], Alike]:
    """Disturbs one stage of a run in every way, and proves what two processes, and one, make of it in the end.

    Returns:
        How each start ended, and how far one process that goes on agrees with two that nothing disturbed.
    """
    parents = two.stages[: two.stages.index(stage)]
    command = begin_from(two, parents, Command(two.recipe, folder / "two", [*two.options, "--until", stage]))
    with contextlib.closing(command):
        ends = [tell(disturb(command, stage, how)) for how in DISTURBANCES]
        alone = Command(two.recipe, folder / "one", ["--until", stage])
        shutil.copytree(command.run_dir, alone.run_dir)
        run(command)
    record = json.loads((command.run_dir / stage / "stage.json").read_text(encoding="utf-8"))
    if record["summary"]["metrics"]["resumed_from"] != ends[-1].checkpoint:
        raise Failure(f"{stage} went on from step {record['summary']['metrics']['resumed_from']}, not from {ends[-1]}")
    found = digests(command.run_dir)
    compare(found, {name: digest for name, digest in digests(two.run_dir).items() if name in found}, whole=True)
    return ends, compare_stage(two.run_dir / stage, run(alone).run_dir / stage)


def tell(end: End) -> End:
    """Prints how a start ended, and returns it."""
    print(
        f"  {end.stage:<10} {end.what:<8} after step {end.step:>2}: exit {end.code} in {end.seconds:4.1f} s,"
        f" checkpoint {end.checkpoint}  {end.said}",
        flush=True,
    )
    return end


def show(title: str, found: list[Alike]) -> None:
    """Prints a table of comparisons."""
    print(f"{title}\n  {'stage':<12} {'steps':>5} {'loss':>9} {'tensors':>8} {'numbers':>9} {'norms':>9}")
    for one in found:
        far = f"{one.loss:>9.1e} {one.tensors:>8} {one.number:>9.1e} {one.norm:>9.1e}"
        print(f"  {one.stage:<12} {one.steps:>5} {far}", flush=True)


def prove(folder: Path, stages: list[str], spread: str | None) -> None:
    """Does everything below a folder, with a model spread as a config says; Failure when something did not hold."""
    recipe = prepare_recipe(stages, folder / "recipe")
    one = run(Command(recipe, folder / "one"))
    options = [*TWO, *(["--set", f"runtime.accelerate_config={spread}"] if spread else [])]
    two = run(begin_from(one, ["base"], Command(recipe, folder / "two", options)))
    later = [stage for stage in one.stages if stage != "base"]
    show("two processes and one", [compare_stage(one.run_dir / name, two.run_dir / name) for name in later])
    print("disturbed", flush=True)
    alike = []
    for kind in ("sft", "dpo"):
        chosen = [stage for stage in later if stage.startswith(kind)]
        if chosen:
            alike.append(disturb_in_turn(two, chosen[-1], folder / chosen[-1])[1])
    print("resumed by two processes: the same bytes as undisturbed")
    show("resumed by one process, and undisturbed on two", alike)


def prove_quickly(folder: Path) -> None:
    """Kills a process of one stage, lets two go on, and compares what they leave with one process."""
    recipe = prepare_recipe([QUICK], folder / "recipe")
    one = run(Command(recipe, folder / "one"))
    two = begin_from(one, one.stages[:-1], Command(recipe, folder / "two", TWO))
    with contextlib.closing(two):
        tell(disturb(two, QUICK, KILL))
        run(two)
    show("killed and resumed on two processes, and one", [compare_stage(one.run_dir / QUICK, two.run_dir / QUICK)])


def main() -> int:
    """Parses the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs-dir", type=Path, help="new folder to work in, kept; a temporary one when absent")
    parser.add_argument("--stages", nargs="+", default=[], help="only these, and those they stand on")
    parser.add_argument("--accelerate-config", help="how two processes share a model: ddp (default), fsdp2")
    parser.add_argument("--quick", action="store_true", help=f"one kill of {QUICK} alone")
    options = parser.parse_args()
    if options.runs_dir and options.runs_dir.exists() and any(options.runs_dir.iterdir()):
        parser.error(f"{options.runs_dir} is not empty")
    folder = (options.runs_dir or Path(tempfile.mkdtemp(prefix="posttrain-ranks-"))).resolve()
    print(f"in {folder}", flush=True)
    began = time.monotonic()
    try:
        if options.quick:
            prove_quickly(folder)
        else:
            prove(folder, options.stages, options.accelerate_config)
    except Failure as failure:
        print(f"FAILED: {failure}\nkept: {folder}")
        return 1
    print(f"{time.monotonic() - began:.0f} s: as many processes as there are, the same run")
    if not options.runs_dir:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
