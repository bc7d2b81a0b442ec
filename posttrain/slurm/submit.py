"""Submits what a run lacks: one job for each stage, each after the one before."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from posttrain.artifact import publish_folder, write_atomically
from posttrain.errors import UserError
from posttrain.pipeline.fetch import fetch
from posttrain.pipeline.plan import Plan, StagePlan, partial_of
from posttrain.pipeline.run import Request, move_all_aside, opened, refuse_failed
from posttrain.recipe.load import LoadedRecipe
from posttrain.slurm import cluster
from posttrain.slurm.resources import Resources, resources
from posttrain.slurm.script import job_script, offline

FOLDER = ".slurm"
"""Of a run folder: a numbered folder for each submission, and `jobs.json`."""
JOBS = "jobs.json"


@dataclass(frozen=True)
class Submitted:
    """One stage's job."""

    stage: str
    job: str
    resources: Resources
    log: Path


def submit_recipe(
    loaded: LoadedRecipe, runs_dir: Path, request: Request, overrides: Sequence[str], note: Callable[[str], None]
) -> list[Submitted]:
    """Plans and checks a recipe as a run does, and submits a job for each stage that must run, in their order.

    Every job takes a copy of the recipe, made now. The first is held until all were taken, so that either all or
    none of them run.

    Args:
        overrides: the `--set` texts that `loaded` was read with.
        note: told what is done besides submitting.

    Raises:
        UserError: what a run would refuse, jobs of this run in the queue, inputs that are not on disk and cannot be
            fetched, or a job that the cluster refuses.
        StageError: a finished stage some of whose gates did not hold.
    """
    cluster.find_commands()
    run_dir = (runs_dir / loaded.recipe.name).absolute()
    _refuse_queued(run_dir)  # before a job that runs is found to hold the folder: this says more
    with opened(loaded, run_dir, request) as (planned, validated, _):
        _refuse_queued(run_dir)
        for stage in planned.stages:
            refuse_failed(run_dir / stage.stage, stage.failed)
        lacking = [stage for stage in planned.stages if stage.action in ("run", "redo")]
        _refuse_pushes(loaded, lacking)
        fetch(loaded, planned)
        submission = _Submission(loaded, run_dir, request, overrides)
        with submission.cancelled():
            jobs = submission.all(lacking)
            _settle(planned, note)
        planned.cache.save()
        validated.save()
    if jobs:  # the folder is free again: the first job takes it
        with submission.cancelled():
            cluster.release(jobs[0].job)
    return jobs


def _refuse_queued(run_dir: Path) -> None:
    """Refuses while jobs of an earlier submission wait or run."""
    path = run_dir / FOLDER / JOBS
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = cluster.in_queue(known.values())
    if found:
        stages = ", ".join(f"{stage} ({job})" for stage, job in known.items() if job in found)
        todo = f"wait for them, or stop them: scancel {' '.join(reversed(found))}"
        raise UserError(str(run_dir), f"jobs of this run are in the queue: {stages}", todo)


def _refuse_pushes(loaded: LoadedRecipe, lacking: Sequence[StagePlan]) -> None:
    """Refuses stages that push to the hub from a job without a network."""
    for stage in lacking:
        if stage.job.config.get("hub") and offline():
            todo = (
                "submit with --until the stage before it, then `posttrain run` where there is a network;"
                " or set HF_HUB_OFFLINE=0 where the jobs have one"
            )
            raise UserError(loaded.where("stages", stage.stage, "hub"), "jobs run offline and cannot push", todo)


def _settle(planned: Plan, note: Callable[[str], None]) -> None:
    """Does what a run would do before its first stage: old outputs move aside, and complete ones get their names."""
    move_all_aside(planned, note)
    for stage in planned.stages:
        if stage.action == "publish":
            publish_folder(partial_of(planned.run_dir, stage.stage), planned.run_dir / stage.stage)
    planned.pins.save()


class _Submission:
    """The folder of one submission, and the jobs that the cluster took so far."""

    def __init__(self, loaded: LoadedRecipe, run_dir: Path, request: Request, overrides: Sequence[str]) -> None:
        self.loaded, self.request, self.overrides = loaded, request, overrides
        self.run_dir, self.root = run_dir, run_dir / FOLDER
        earlier = [int(path.name) for path in self.root.glob("*") if path.name.isdigit()]
        self.folder = self.root / str(max(earlier, default=0) + 1)
        self.jobs: dict[str, str] = {}

    def all(self, lacking: Sequence[StagePlan]) -> list[Submitted]:
        """Submits the stages, each after the one before, the first on hold."""
        if not lacking:
            return []
        self.folder.mkdir(parents=True)
        self._recipe().write_text(self.loaded.source_text, encoding="utf-8")
        return [self._one(stage) for stage in lacking]

    @contextlib.contextmanager
    def cancelled(self) -> Iterator[None]:
        """Cancels the jobs, and removes the folder, when the block does not end well."""
        try:
            yield
        except BaseException as error:
            if went_wrong := cluster.cancel(list(self.jobs.values())):
                where, found = (
                    (error.where, error.found) if isinstance(error, UserError) else ("submission", repr(error))
                )
                todo = f"its jobs could not be cancelled ({went_wrong}): scancel {' '.join(self.jobs.values())}"
                raise UserError(where, found, todo) from None
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.root / JOBS).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.root.rmdir()  # of the first submission
            raise

    def _one(self, stage: StagePlan) -> Submitted:
        asked = resources(stage.job.kind, stage.job.runtime)
        log = self.folder / f"{stage.stage}.out"
        options = [
            f"--job-name={self.loaded.recipe.name}-{stage.stage}",
            f"--chdir={Path.cwd()}",
            f"--output={str(log).replace('%', '%%')}",
            "--open-mode=append",  # a requeued job goes on, and so does its log
            "--export=ALL",
            *asked.options,
        ]
        script = self.folder / f"{stage.stage}.sbatch"
        script.write_text(job_script(options, self._command(stage.stage)), encoding="utf-8")
        before = list(self.jobs.values())
        after = [f"--dependency=afterok:{before[-1]}", "--kill-on-invalid-dep=yes"] if before else ["--hold"]
        try:
            self.jobs[stage.stage] = cluster.submit(script, [*after, *options])
        except UserError as error:
            raise error.at(f"stage {stage.stage}") from None
        write_atomically(self.root / JOBS, json.dumps(self.jobs, indent=2))
        return Submitted(stage.stage, self.jobs[stage.stage], asked, log)

    def _recipe(self) -> Path:
        return self.folder / self.loaded.path.name

    def _command(self, stage: str) -> list[str]:
        words = [sys.executable, "-m", "posttrain", "run", str(self._recipe())]
        words += ["--paths-from", str(self.loaded.folder), "--runs-dir", str(self.run_dir.parent)]
        words += [word for override in self.overrides for word in ("--set", override)]
        words += ["--other-versions"] if self.request.other_versions else []
        return [*words, "--until", stage]
