"""What a stage is told, what it may say while it works, and what it leaves."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from posttrain.artifact import Artifact
from posttrain.pretraining.ranks import Rank, own_rank
from posttrain.recipe.schema import Runtime

Part = Literal[
    "start",  # imports, of those that the process had not done before
    "data",  # tokenizer and template, reading, tokenising, ledger
    "loading",  # model, adapter, trainer
    "proofs",  # isolation of packed documents, DPO step 0, a merge's base
    "reference",  # DPO reference log-probs
    "training",  # the loop, with its set-up and checkpoints
    "generation",
    "scoring",  # of given texts: bits per byte, preferred answers
    "merging",
    "certificate",
    "saving",  # and reading back what was saved
    "recording",  # hashing the outputs
]
"""What a stage spends its time on."""


@dataclass(frozen=True)
class ModelInput:
    """A model (or report) that a stage reads."""

    ref: str
    """As the recipe spells it: `@stage`, path, or hub id."""
    folder: Path | None
    """Where its files lie; None for a hub id that is still to be fetched."""
    revision: str | None = None
    """Commit of a hub id."""
    artifact: Artifact | None = None
    """Set when the folder was left by a stage of ours."""


@dataclass(frozen=True)
class Job:
    """One stage to run, as plain JSON: written by the pipeline, read by the stage process."""

    run_dir: str
    recipe_dir: str
    """Folder that relative input paths of the recipe start from."""
    stage: str
    kind: str
    config: dict[str, Any]
    """The stage's settings, dumped from its schema class (aliases as in the recipe)."""
    trainer: dict[str, Any]
    """Resolved trainer fields: the recipe's plus the installed defaults where they are literals."""
    seed: int
    precision: str
    runtime: dict[str, Any]
    """The recipe's runtime with the stage's own fields on top."""
    inputs: dict[str, dict[str, Any]]
    """Label -> {"ref", "folder", "revision"}; labels: `model`, or `models.NAME`, or `report`."""
    identity: dict[str, Any]
    fingerprint: str
    versions: dict[str, str] = field(default_factory=dict)
    """Installed libraries when the stage began: a checkpoint of others is resumed only when told."""
    format: int = 1

    def dump(self) -> str:
        """The job as JSON text."""
        return json.dumps(self.__dict__, indent=2, ensure_ascii=False)

    def spelled_inputs(self) -> dict[str, str]:
        """What each input is, for people: `@stage`, a path, or a hub id with its commit."""
        return {
            label: f"{given['ref'].split('@')[0]}@{given['revision']}" if given["revision"] else given["ref"]
            for label, given in self.inputs.items()
        }


class Events:
    """One-way lines of JSON from a stage to whoever started it; silent when nobody listens.

    Events: `phase` (text), `step` (step, total, loss, tokens_per_second, learning_rate, …),
    `note` (text), `done` (headline), `error` (where, found, todo, exit_code); of the launcher of several
    processes: `killed` (rank, signal).

    Args:
        errors_only: leave the rest to the first process.
    """

    def __init__(self, descriptor: int | None, errors_only: bool = False) -> None:
        self._descriptor, self._errors_only = descriptor, errors_only

    def __call__(self, event: str, **fields: Any) -> None:
        """Sends one event; a listener that is gone is noticed through the lifeline, not here."""
        if self._descriptor is None or (self._errors_only and event != "error"):
            return
        line = json.dumps({"event": event, **fields}, ensure_ascii=False, default=float) + "\n"
        try:
            os.write(self._descriptor, line.encode())
        except BrokenPipeError:
            self._descriptor = None


class Clock:
    """Adds up what each part of a stage's work took; one part goes on until the next begins."""

    def __init__(self) -> None:
        self._spent: dict[Part, tuple[float, float]] = {}
        self._part: Part = "start"
        self._since = (time.monotonic(), time.process_time())

    def enter(self, part: Part) -> None:
        """From now on the time is this part's."""
        now = (time.monotonic(), time.process_time())
        wall, cpu = self._spent.get(self._part, (0.0, 0.0))
        self._spent[self._part] = (wall + now[0] - self._since[0], cpu + now[1] - self._since[1])
        self._part, self._since = part, now

    def parts(self) -> dict[str, dict[str, float]]:
        """Part -> `seconds` and this process's `cpu_seconds` (all threads) so far, in the order they began."""
        self.enter(self._part)
        return {
            part: {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)} for part, (wall, cpu) in self._spent.items()
        }


@dataclass(frozen=True)
class Context:
    """Everything a stage needs besides its own settings."""

    run_dir: Path
    recipe_dir: Path
    stage: str
    folder: Path
    """The partial folder the stage writes into."""
    seed: int
    precision: str
    runtime: Runtime
    trainer: dict[str, Any]
    inputs: dict[str, ModelInput]
    identity: dict[str, Any]
    fingerprint: str
    events: Events
    should_stop: Callable[[], bool]
    """True once the stage was asked to checkpoint and exit (signal, or its parent died)."""
    clock: Clock = field(default_factory=Clock)
    rank: Rank = field(default_factory=own_rank)
    """Which of the stage's processes this is; the first one alone writes files."""


@dataclass(frozen=True)
class Summary:
    """What a stage leaves behind for its record."""

    headline: str
    """One line for people: the figures that matter."""
    files: list[str]
    """Relative paths of the outputs, to be hashed into the record."""
    digests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """{"sha256", "bytes"} of those of them that were hashed while they were written, and read back."""
    metrics: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] | None = None
    ledger: dict[str, Any] | None = None
    table: str = ""
    """Lines of text that a run shows at its end, skipped or not: the comparison of models, say."""
    failed: list[str] = field(default_factory=list)
    """Gates or limits that did not hold: the artifact stands, the run stops with exit code 1."""
