"""Kills runs with `kill -9` and shows that the same command, given again, leaves the same bytes.

    python scripts/kill_runs.py [--kills 20] [--seed 1] [--runs-dir DIR] [--stages sft_lora dpo_lora] [--uniform-only]

`scripts/kill_runs/recipe.yaml` runs once without interruption: its weights' SHA-256 are the truth. Then it
runs again in fresh folders and is killed: at `--kills` moments drawn uniformly over the run, and at chosen
points that such moments seldom meet (inside a checkpoint save, inside a merge, before the record is
written, between the record and the rename). Victims are, in turn:

    stage   the process that works
    parent  the `posttrain run` process alone; its orphan must save and let go of the run's lock
    group   all processes of the run at once
    server  the process that forks stages (and with it the stage at work)

A victim that does not live yet is waited for. After every kill each folder under a final name must be
complete and right; then the same command starts again. Exit code 0 when every final safetensors file (and
data order) is the uninterrupted run's, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from killable import CHECKPOINTS, RUN_SECONDS, Command, Failure, wait_for

HERE = Path(__file__).resolve().parent / "kill_runs"
VICTIMS = ("stage", "parent", "group", "server")
KILLS_PER_RUN = 5
PROVED = ("*.safetensors", "data_order.npz")


@dataclass(frozen=True)
class Moment:
    """A point of a run: seconds after a stage began, or after the command did (`stage` empty)."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class Point:
    """A point of a run that is recognised by what lies in the stage's folder, or that a stage finds itself."""

    stage: str
    kind: str
    """`checkpoint`: while one is being written. `merge`: while a shard is. Else a value of POSTTRAIN_KILL_AT."""


POINTS = (
    Point("base", "checkpoint"),
    Point("sft_full", "before_record"),
    Point("sft_qlora", "checkpoint"),
    Point("dpo_full", "checkpoint"),
    Point("dpo_lora", "checkpoint"),
    Point("dpo_qlora", "after_record"),
    Point("merge_lora", "merge"),
    Point("merge_qlora", "merge"),
)


@dataclass(frozen=True)
class Kill:
    """What one kill hit."""

    run: str
    victim: str
    planned: str
    place: str
    """Stage at work, its last finished step and its newest checkpoint."""


def digests(run_dir: Path) -> dict[str, str]:
    """SHA-256 of what a run has left under final names, resume checkpoints aside.

    Raises:
        Failure: a folder under a final name without its record.
    """
    found = {}
    for folder in sorted(path for path in run_dir.glob("[!.]*") if path.is_dir() and path.suffix != ".partial"):
        if not (folder / "stage.json").is_file():
            raise Failure(f"{folder} has its final name and no record")
        paths = sorted(path for pattern in PROVED for path in folder.rglob(pattern))
        for path in paths:
            name = path.relative_to(run_dir)
            if CHECKPOINTS not in name.parts:
                found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def compare(found: dict[str, str], truth: dict[str, str], whole: bool) -> None:
    """Raises Failure where bytes differ from the uninterrupted run's; `whole`: no file may be missing either."""
    wrong = [name for name, digest in found.items() if truth.get(name) != digest]
    missing = sorted(truth.keys() - found.keys()) if whole else []
    if wrong or missing:
        raise Failure(f"differ from the uninterrupted run: {', '.join(wrong) or 'none'}; missing: {missing or 'none'}")


def draw_moments(command: Command, count: int, rng: random.Random, seconds: float) -> list[Moment]:
    """Draws moments uniformly over a finished run that took some seconds, in their order."""
    begins = {stage: began - command.started for stage, began in command.began.items()}
    moments = []
    for at in sorted(rng.uniform(0, seconds) for _ in range(count)):
        before = [stage for stage in begins if begins[stage] <= at]
        moments.append(Moment(before[-1], at - begins[before[-1]]) if before else Moment("", at))
    return moments


def reach(command: Command, moment: Moment, victim: str) -> bool:
    """Waits for a moment, and for its victim to live; False when the run ended first.

    A stage that an earlier start has finished does not begin again: the first that does stands for it.
    """

    def there() -> bool:
        began = command.began.get(moment.stage)
        if not moment.stage:
            began = command.started
        elif began is None and (command.run_dir / moment.stage).exists():
            began = min(command.began.values(), default=None)
        if began is None or time.time() < began + moment.seconds:
            return False
        return victim == "group" or victim in command.processes()

    return command.wait(there, str(moment))


def freeze(command: Command, point: Point) -> bool:
    """Stops the stage while files are half written, and still are once it stands; False when the run ended first."""
    folder = command.run_dir / f"{point.stage}.partial"
    place, prefix = (folder / CHECKPOINTS, ".checkpoint-") if point.kind == "checkpoint" else (folder, ".model")

    def torn() -> bool:
        return any(name.startswith(prefix) for name in list_names(place))

    if not command.wait(lambda: point.stage in command.began, str(point), pause=0.005):
        return False
    stage = command.processes().get("stage", 0)
    while stage in command.processes().values():
        wait_for(lambda: torn() or not Path(f"/proc/{stage}").exists(), RUN_SECONDS, str(point), pause=0.0002)
        with contextlib.suppress(ProcessLookupError):
            os.kill(stage, signal.SIGSTOP)
            time.sleep(0.002)
            if torn():
                return True
            os.kill(stage, signal.SIGCONT)
    return command.wait(lambda: False, "its end")


def list_names(folder: Path) -> list[str]:
    """Names in a folder, none where it is not there."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def at_moment(command: Command, moment: Moment, victim: str) -> Kill | None:
    """Kills a victim at a moment; None when the run ended first."""
    command.start()
    if not reach(command, moment, victim):
        return None
    place = command.place()
    victim = command.kill(victim)
    return Kill(command.runs.name, victim, f"{moment.stage or 'start'} +{moment.seconds:.1f} s", place)


def at_point(command: Command, point: Point, victim: str) -> Kill | None:
    """Kills a victim at a point; None when the run ended first."""
    planned = f"{point.stage}: {point.kind}"
    if point.kind in ("checkpoint", "merge"):
        command.start()
        if not freeze(command, point):
            return None
        place = command.place()
        killed = command.kill("group" if victim == "parent" else victim)  # a frozen orphan could not let go
        return Kill(command.runs.name, killed, f"{planned} being written", place)
    command.start(POSTTRAIN_KILL_AT=f"{point.stage}:{point.kind}")
    assert command.process is not None
    command.process.wait(timeout=RUN_SECONDS)
    partial = command.run_dir / f"{point.stage}.partial"
    if (partial / "stage.json").exists() != (point.kind == "after_record"):
        raise Failure(f"{planned}: the stage did not die there\n{command.tail()}")
    return Kill(command.runs.name, "stage", planned, point.stage)


def interrupt(
    command: Command, plan: Sequence[Moment | Point], victims: Iterator[str], truth: dict[str, str]
) -> list[Kill]:
    """Kills one run again and again, lets it end, and proves what it left.

    Returns:
        The kills that hit; a plan that the run overtook is left out.
    """
    kills = []
    with contextlib.closing(command):
        for place in plan:
            victim = next(victims)
            done = at_moment(command, place, victim) if isinstance(place, Moment) else at_point(command, place, victim)
            if done is None:
                break
            command.wait_until_free()
            compare(digests(command.run_dir), truth, whole=False)
            kills.append(done)
            print(f"  {done.victim:<18} {done.planned:<38} {done.place}", flush=True)
        command.start()
        command.finish()
    compare(digests(command.run_dir), truth, whole=True)
    return kills


def cut_recipe(keep: list[str], folder: Path) -> Path:
    """Copies the recipe with its rows, and only some of its stages and those they stand on."""
    shutil.copytree(HERE, folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    wanted = set(keep or recipe["stages"])
    for name, stage in reversed(recipe["stages"].items()):
        if name in wanted and "model" in stage:
            wanted.add(stage["model"].removeprefix("@"))
    recipe["stages"] = {name: stage for name, stage in recipe["stages"].items() if name in wanted}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


def cycle(rng: random.Random) -> Iterator[str]:
    """Victims without end: each as often as the others, stage, parent and group first."""
    yield from VICTIMS[:3]
    while True:
        yield from rng.sample(VICTIMS, len(VICTIMS))


def prove(folder: Path, kills: int, seed: int, stages: list[str], points: bool) -> list[Kill]:
    """Does everything below a folder and returns the kills; Failure when a contract did not hold."""
    rng = random.Random(seed)
    recipe = cut_recipe(stages, folder / "recipe")
    whole = Command(recipe, folder / "uninterrupted")
    began = time.time()
    with contextlib.closing(whole):
        whole.start()
        whole.finish()
    seconds, truth = time.time() - began, digests(whole.run_dir)
    print(f"uninterrupted: {len(whole.stages)} stages in {seconds:.1f} s, {len(truth)} files", flush=True)
    victims, number = cycle(rng), 0
    done: list[Kill] = []
    while len(done) < kills:
        number += 1
        if number > kills + 3:
            raise Failure(f"only {len(done)} of {kills} moments could be hit")
        plan = draw_moments(whole, min(KILLS_PER_RUN, kills - len(done)), rng, seconds)
        print(f"run {number}", flush=True)
        done += interrupt(Command(recipe, folder / f"run-{number}"), plan, victims, truth)
    left = [point for point in POINTS if points and point.stage in whole.stages]
    for attempt in range(1, 4):
        if not left:
            break
        print(f"chosen points, run {attempt}", flush=True)
        command = Command(recipe, folder / f"points-{attempt}")
        hit = interrupt(command, left, victims, truth)
        done, left = done + hit, left[len(hit) :]
    if left:
        raise Failure(f"could not be hit: {left}")
    return done


def main() -> int:
    """Parses the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="moments drawn uniformly over the run")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; drawn and printed when absent")
    parser.add_argument("--runs-dir", type=Path, help="new folder to work in, kept; a temporary one when absent")
    parser.add_argument("--stages", nargs="+", default=[], help="only these, and those they stand on")
    parser.add_argument("--uniform-only", action="store_true", help="leave out the chosen points")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    if options.runs_dir and options.runs_dir.exists() and any(options.runs_dir.iterdir()):
        parser.error(f"{options.runs_dir} is not empty")
    folder = (options.runs_dir or Path(tempfile.mkdtemp(prefix="posttrain-kills-"))).resolve()
    print(f"seed {seed}, in {folder}", flush=True)
    began = time.monotonic()
    try:
        kills = prove(folder, options.kills, seed, options.stages, not options.uniform_only)
    except Failure as failure:
        print(f"FAILED (seed {seed}): {failure}\nkept: {folder}")
        return 1
    for number, kill in enumerate(kills, 1):
        print(f"{number:3}  {kill.run:<9} {kill.victim:<18} {kill.planned:<38} {kill.place}")
    print(f"{len(kills)} kills, seed {seed}, {time.monotonic() - began:.0f} s: every file is the uninterrupted run's")
    if not options.runs_dir:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
