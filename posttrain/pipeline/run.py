"""Runs a plan: stage after stage, each in its own process, every output published by one rename."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain import torchrun
from posttrain.artifact import Artifact, move_aside, publish_folder, write_atomically
from posttrain.console import Console, State
from posttrain.errors import Interrupted, StageError, UserError
from posttrain.launch import LOCK, Interruption, attend, forkable, interruptible, locked, sign, start
from posttrain.pipeline.inputs import JOB
from posttrain.pipeline.plan import Plan, StagePlan, has_checkpoints, partial_of, plan
from posttrain.pipeline.preflight import Validated, preflight
from posttrain.recipe.load import LoadedRecipe
from posttrain.recipe.yaml12 import dump
from posttrain.stages import KINDS
from posttrain.stages.fork_server import ForkServer
from posttrain.stages.provenance import versions

ASIDE = ".aside"


@dataclass(frozen=True)
class Request:
    """What the user asked for besides the recipe; see `plan`."""

    redo: tuple[str, ...] = ()
    until: str | None = None
    verify: bool = False
    other_versions: bool = False

    def plan(self, loaded: LoadedRecipe, run_dir: Path) -> Plan:
        """Plans a run; raises what `posttrain.pipeline.plan.plan` raises."""
        return plan(loaded, run_dir, self.redo, self.until, self.verify, self.other_versions)


def run_recipe(loaded: LoadedRecipe, runs_dir: Path, request: Request, console: Console) -> None:
    """Plans a recipe and runs what its run folder lacks.

    A mistake of the user's that is found before any stage ran leaves every folder as it was.

    Raises:
        UserError: the folder is in use, the recipe was changed, or an input cannot be used.
        StageError: a stage failed, or its gates did not hold.
        Interrupted: the user stopped the run; the same recipe goes on from there.
    """
    with opened(loaded, runs_dir / loaded.recipe.name, request) as (planned, validated, lock), interruptible() as asked:
        sign(lock)
        _Run(planned, validated, loaded, console, lock, asked).all()
    if torchrun.launched():
        torchrun.dismiss()


@contextlib.contextmanager
def opened(loaded: LoadedRecipe, run_dir: Path, request: Request) -> Iterator[tuple[Plan, Validated, int]]:
    """Plans a recipe, checks its inputs, and holds its run folder: yields the plan, what it found whole, and the lock.

    A UserError, of the block too, leaves every folder as it was if none was made in a new run folder.

    Raises:
        UserError: the folder is in use, the recipe was changed, or an input cannot be used.
    """
    ready = None
    if not (run_dir / LOCK).exists():
        ready = _prepare(loaded, run_dir, request)  # before the folder exists: a mistake leaves nothing behind
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with locked(run_dir, signed=False) as lock:
            yield (*(ready or _prepare(loaded, run_dir, request)), lock)
    except UserError:
        if made and not any(path.is_dir() for path in run_dir.iterdir()):
            shutil.rmtree(run_dir)
            for folder in made[1:]:
                if not any(folder.iterdir()):
                    folder.rmdir()
        raise


def _prepare(loaded: LoadedRecipe, run_dir: Path, request: Request) -> tuple[Plan, Validated]:
    """Plans a run and checks its inputs; raises what makes it impossible."""
    planned = request.plan(loaded, run_dir)
    planned.refuse()
    for stage in planned.stages:
        if stage.action in ("run", "redo") and KINDS[stage.job.kind].trains:
            torchrun.refuse_other_count(stage.stage, stage.job.runtime)
    return planned, preflight(loaded, planned)


@dataclass
class _Run:
    plan: Plan
    validated: Validated
    loaded: LoadedRecipe
    console: Console
    lock: int
    asked: Interruption
    server: ForkServer | None = None

    def all(self) -> None:
        """Does what the plan says, in order."""
        jobs = [stage.job for stage in self.plan.stages if stage.action in ("run", "redo")]
        environment = forkable([job.runtime for job in jobs])
        if environment is not None:
            self.server = ForkServer(self.plan.run_dir, [job.kind for job in jobs], environment)
        try:
            self._all()
        finally:
            if self.server is not None:
                self.server.close()

    def _all(self) -> None:
        run_dir = self.plan.run_dir
        self.console.begin([stage.stage for stage in self.plan.stages])
        move_all_aside(self.plan, self.console.note)
        write_atomically(run_dir / "recipe.yaml", _copy(self.loaded))
        self.plan.pins.save()
        for stage in self.plan.stages:
            if self.asked.count:
                raise Interrupted(str(run_dir), "stopped between two stages")
            self._one(stage)
            self.plan.cache.save()
            self.validated.save()

    def _one(self, stage: StagePlan) -> None:
        final = self.plan.run_dir / stage.stage
        began = time.monotonic()
        if stage.action == "publish":
            publish_folder(partial_of(self.plan.run_dir, stage.stage), final)
        elif stage.action != "skip":
            self._launch(stage)
        artifact = Artifact.read(final)
        if artifact is None:
            raise StageError(f"stage {stage.stage}", "ended without leaving its output", f"see its log in {final}")
        summary = artifact.record.summary
        failed = tuple(summary.get("failed", ()))
        state: State = "skipped" if stage.action == "skip" else "done"
        self.console.finish(
            stage.stage,
            "failed" if failed else state,
            summary.get("headline", ""),
            time.monotonic() - began,
            summary.get("table", ""),
        )
        if stage.reason and stage.action == "skip":
            self.console.note(f"{stage.stage}: {stage.reason}")
        refuse_failed(final, failed)

    def _launch(self, stage: StagePlan) -> None:
        partial = partial_of(self.plan.run_dir, stage.stage)
        fresh = not partial.exists()
        partial.mkdir(exist_ok=True)
        job = replace(stage.job, versions=versions())
        write_atomically(partial / JOB, job.dump())
        self.console.start(stage.stage, stage.reason)

        def listen(event: dict[str, Any]) -> None:
            self.console.event(stage.stage, event)

        try:
            running = start(partial / JOB, job.kind, job.runtime, self.lock, self.server)
            attend(stage.stage, running, self.asked, listen)
        except UserError:
            if fresh and not has_checkpoints(partial):
                shutil.rmtree(partial)  # the message says it all, and nothing was computed yet
            raise


def move_all_aside(planned: Plan, note: Callable[[str], None]) -> None:
    """Moves every output that a plan makes stale out of the way, and says so."""
    aside = [folder for stage in planned.stages for folder in stage.aside]
    for folder in reversed([*aside, *planned.aside]):  # readers first: a kill leaves none beside a new output
        target = move_aside(folder, planned.run_dir / ASIDE)
        note(f"moved {folder.name} to {ASIDE}/{target.name}")


def refuse_failed(final: Path, failed: Sequence[str]) -> None:
    """Raises StageError for a finished stage some of whose gates did not hold."""
    if failed:
        todo = f"its output is in {final}; change what it depends on, or its limits, then --redo {final.name}"
        raise StageError(f"stage {final.name}", "did not hold: " + "; ".join(failed), todo)


def _copy(loaded: LoadedRecipe) -> str:
    """The recipe as it was understood: defaults and overrides filled in, secrets left out."""
    head = f"# {loaded.path.name} as it ran, with its defaults; relative paths start from {loaded.folder}\n"
    return head + dump(loaded.redacted())
