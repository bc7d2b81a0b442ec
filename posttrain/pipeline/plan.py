"""What a run would do with each stage, and why: nothing here writes, and nothing heavy is imported."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from posttrain.artifact import Artifact, DigestCache, differences, sha256
from posttrain.errors import CheckpointError, UserError
from posttrain.pipeline.identity import describe
from posttrain.pipeline.inputs import JOB, Inputs, Pins
from posttrain.recipe.describe import nearest
from posttrain.recipe.load import LoadedRecipe
from posttrain.recipe.references import execution_order
from posttrain.stages.context import Job
from posttrain.stages.provenance import versions

Action = Literal["run", "skip", "publish", "refuse", "redo"]

CHECKPOINTS = "checkpoints"
_RECIPE_WIDE = {"precision"}
"""Identity fields that the recipe sets for all stages at once."""


@dataclass(frozen=True)
class StagePlan:
    """What happens to one stage."""

    job: Job
    action: Action
    """`publish`: the output is complete and only its final name is missing."""
    reason: str = ""
    differences: tuple[tuple[str, Any, Any], ...] = ()
    """Of a refused stage: (place in the recipe, value it ran with, value now)."""
    depends_on: tuple[str, ...] = ()
    """Of a refused stage: the changed stages that it reads, directly or not."""
    aside: tuple[Path, ...] = ()
    """Folders to move out of the way first."""
    failed: tuple[str, ...] = ()
    """Gates that did not hold when the stage ran: its output stands, the run stops here."""
    headline: str = ""

    @property
    def stage(self) -> str:
        """Name of the stage."""
        return self.job.stage

    @property
    def fingerprint(self) -> str:
        """Of the identity it would run with."""
        return self.job.fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        """What gives its output its identity."""
        return self.job.identity


@dataclass(frozen=True)
class Plan:
    """What happens to every stage, in the order of execution."""

    run_dir: Path
    stages: tuple[StagePlan, ...]
    aside: tuple[Path, ...]
    """Outputs beyond `until` that a redone stage makes stale."""
    cache: DigestCache
    pins: Pins

    @property
    def refused(self) -> tuple[StagePlan, ...]:
        """Stages whose output was made with other settings."""
        return tuple(stage for stage in self.stages if stage.action == "refuse")

    def refuse(self) -> None:
        """Raises UserError with every difference when a stage was refused."""
        if not self.refused:
            return
        names = {stage.stage for stage in self.refused}
        roots = [stage.stage for stage in self.refused if not names & set(stage.depends_on)]
        lines = [line for stage in self.refused for line in explain(stage)]
        redo = " ".join(f"--redo {name}" for name in roots)
        todo = (
            f"{redo} runs {', '.join(roots)} again, and what depends on it (old outputs are moved to .aside/, never"
            " deleted); or give the recipe another name"
        )
        raise UserError(str(self.run_dir), "\n  ".join(["the recipe does not match what was run", *lines]), todo)


def plan(
    loaded: LoadedRecipe,
    run_dir: Path,
    redo: Sequence[str] = (),
    until: str | None = None,
    verify: bool = False,
    other_versions: bool = False,
    leave_open: bool = False,
) -> Plan:
    """Decides for each stage whether it runs, is skipped, or is refused.

    Args:
        run_dir: folder of the run; need not exist.
        redo: stages to run again, with everything that depends on them.
        until: last stage of interest.
        verify: recompute digests and compare the SHA-256 of finished files, not only their sizes.
        other_versions: resume checkpoints that other library versions wrote.
        leave_open: hub ids that cannot be resolved without a network are listed in the plan's pins, not refused;
            such a plan is for looking at alone.

    Raises:
        UserError: unknown stage names, inputs that do not exist.
        CheckpointError: a finished stage whose files are not what its record says.
    """
    order = execution_order(loaded.recipe)
    for name in [*redo, *([until] if until else [])]:
        _known_stage(name, order)
    cache = DigestCache(run_dir.parent / ".cache" / "digests.json", verify)
    inputs = Inputs(loaded.folder, run_dir, cache, Pins(run_dir / "revisions.json", leave_open), {})
    jobs: list[Job] = []
    for name in order:
        jobs.append(describe(loaded, name, inputs))
        inputs.fingerprints[name] = jobs[-1].fingerprint
    again = downstream(jobs, redo)
    last = order.index(until) + 1 if until else len(order)
    decided: list[StagePlan] = []
    for job in jobs[:last]:
        if job.stage in again:
            decided.append(_again(job, run_dir, redo))
        else:
            decided.append(_decide(job, run_dir, verify, other_versions))
    later = [folder for job in jobs[last:] if job.stage in again for folder in _present(run_dir, job.stage)]
    return Plan(run_dir, _trace(decided), tuple(later), cache, inputs.pins)


def downstream(jobs: Iterable[Job], names: Iterable[str]) -> set[str]:
    """Returns some stages and all that read them, directly or not; jobs are in the order of execution."""
    found = set(names)
    for job in jobs:
        if found & reads(job):
            found.add(job.stage)
    return found


def reads(job: Job) -> set[str]:
    """Names of the stages that a stage reads."""
    return {given["ref"][1:] for given in job.inputs.values() if given["ref"].startswith("@")}


def explain(stage: StagePlan) -> list[str]:
    """Returns the lines that say why a stage was refused."""
    lines = [f"{place}: {show(old)} -> {show(new)}" for place, old, new in stage.differences]
    if stage.depends_on:
        lines.append(f"{stage.stage}: depends on {', '.join(stage.depends_on)}")
    return lines if stage.differences or stage.depends_on else [f"{stage.stage}: {stage.reason}"]


def show(value: Any) -> str:
    """Spells a value for people: digests are cut, long values too."""
    if value is None:
        return "(unset)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return f"{value[:12]}…"
    return text if len(text) <= 120 else f"{text[:117]}…"


def has_checkpoints(partial: Path) -> bool:
    """Whether a partial folder holds a complete checkpoint: those being written have hidden or other names."""
    folder = partial / CHECKPOINTS
    return folder.is_dir() and any(path.is_dir() and not path.name.startswith(".") for path in folder.iterdir())


def partial_of(run_dir: Path, stage: str) -> Path:
    """Folder in which a stage works until it is complete."""
    return run_dir / f"{stage}.partial"


def read_job(partial: Path) -> Job | None:
    """Reads the job that a partial folder was made for, or None where there is no readable one."""
    try:
        return Job(**json.loads((partial / JOB).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def check_files(artifact: Artifact, verify: bool) -> None:
    """Raises CheckpointError when a finished folder's files are not those of its record.

    Args:
        verify: compare contents; otherwise sizes alone.
    """
    for name, expected in artifact.record.files.items():
        path = artifact.folder / name
        todo = f"restore the file, or run the stage again with --redo {artifact.record.stage}"
        if not path.is_file():
            raise CheckpointError(str(path), "is missing, though its stage had finished", todo)
        if path.stat().st_size != expected["bytes"]:
            found = f"has {path.stat().st_size} bytes, {expected['bytes']} when its stage finished"
            raise CheckpointError(str(path), found, todo)
        if verify and sha256(path) != expected["sha256"]:
            raise CheckpointError(str(path), "its content changed after its stage finished", todo)


def _known_stage(name: str, order: list[str]) -> None:
    if name not in order:
        raise UserError(name, "is no stage of this recipe", nearest(name, order))


def _present(run_dir: Path, stage: str) -> tuple[Path, ...]:
    return tuple(folder for folder in (run_dir / stage, partial_of(run_dir, stage)) if folder.exists())


def _again(job: Job, run_dir: Path, redo: Sequence[str]) -> StagePlan:
    """Plans a stage that was asked for again, or that reads one."""
    present = _present(run_dir, job.stage)
    reason = "asked to run again" if job.stage in redo else f"reads {', '.join(sorted(reads(job)))}"
    return StagePlan(job, "redo" if present else "run", reason, aside=present)


def _decide(job: Job, run_dir: Path, verify: bool, other_versions: bool) -> StagePlan:
    """Decides one stage by what lies in the run folder."""
    final, partial = run_dir / job.stage, partial_of(run_dir, job.stage)
    if final.exists():
        return _decide_final(job, final, verify)
    if partial.exists():
        return _decide_partial(job, partial, other_versions)
    return StagePlan(job, "run")


def _decide_final(job: Job, final: Path, verify: bool) -> StagePlan:
    artifact = Artifact.read(final)
    if artifact is None:
        raise UserError(str(final), "is in the way: it was not left by a stage", "move it elsewhere")
    record = artifact.record
    if record.fingerprint != job.fingerprint:
        return _refuse(job, record.identity, record.inputs, "was run with other settings")
    check_files(artifact, verify)
    return StagePlan(
        job,
        "skip",
        _elsewhere(job, read_job(final)),
        failed=tuple(record.summary.get("failed", ())),
        headline=record.summary.get("headline", ""),
    )


def _decide_partial(job: Job, partial: Path, other_versions: bool) -> StagePlan:
    artifact = Artifact.read(partial)
    if artifact is not None and artifact.record.fingerprint == job.fingerprint:
        check_files(artifact, verify=False)
        return StagePlan(job, "publish", "complete, only its name is missing")
    before = read_job(partial)
    if before is None or before.fingerprint != job.fingerprint:
        if before is not None and has_checkpoints(partial):  # hours of work may lie there: the user decides
            return _refuse(job, before.identity, before.spelled_inputs(), "was begun with other settings")
        return StagePlan(job, "run", f"{partial.name} belongs to other settings and is moved aside", aside=(partial,))
    if not has_checkpoints(partial):
        return StagePlan(job, "run", "begun before, nothing to resume from")
    changed = differences(before.versions, versions()) if before.versions and not other_versions else []
    if changed:
        found = ", ".join(f"{name} {old} -> {new}" for name, old, new in changed)
        todo = f"reinstall those versions, resume all the same with --other-versions, or start over: --redo {job.stage}"
        raise UserError(str(partial), f"its checkpoints are from other library versions ({found})", todo)
    return StagePlan(job, "run", "resumes from its last checkpoint")


def _refuse(job: Job, old: dict[str, Any], old_inputs: dict[str, str], reason: str) -> StagePlan:
    """Refuses a stage; a difference that only follows from a changed stage becomes `depends_on`."""
    found: list[tuple[str, Any, Any]] = []
    upstream: list[str] = []
    inputs = job.spelled_inputs()
    same_stage = {
        label: ref[1:] for label, ref in inputs.items() if ref.startswith("@") and old_inputs.get(label) == ref
    }
    for place, before, now in differences(old, job.identity):
        label = next((name for name in inputs if place == name or place.startswith(f"{name}.")), None)
        if label in same_stage:
            upstream.append(same_stage[label])
        elif label is not None and old_inputs.get(label) != inputs[label]:
            found.append((f"stages.{job.stage}.{label}", old_inputs.get(label), inputs[label]))
        else:
            found.append((place if place in _RECIPE_WIDE else f"stages.{job.stage}.{place}", before, now))
    unique = tuple(difference for i, difference in enumerate(found) if difference not in found[:i])
    return StagePlan(job, "refuse", reason, unique, tuple(dict.fromkeys(upstream)))


def _trace(decided: list[StagePlan]) -> tuple[StagePlan, ...]:
    """Replaces each refused stage's `depends_on` by the stages where the change began."""
    roots: dict[str, tuple[str, ...]] = {}
    traced = []
    for stage in decided:
        found: dict[str, None] = {}
        for name in stage.depends_on:
            found |= dict.fromkeys(roots.get(name) or (name,))
        if stage.action == "refuse":
            roots[stage.stage] = (*found, stage.stage) if stage.differences else tuple(found)
        traced.append(replace(stage, depends_on=tuple(found)))
    return tuple(traced)


def _elsewhere(job: Job, before: Job | None) -> str:
    """Says so when a finished publication went elsewhere than the recipe now says."""
    if before is None or job.kind != "publish":
        return ""
    moved = [key for key in ("to", "hub") if before.config.get(key) != job.config.get(key)]
    told = ", ".join(f"{key}: {before.config.get(key)} -> {job.config.get(key)}" for key in moved)
    return f"published elsewhere ({told}); --redo {job.stage} publishes again" if moved else ""
