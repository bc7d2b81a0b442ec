"""A tiny run folder and what a stage is told, for tests that call stages and their helpers directly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.artifact import RECORD, Artifact, Record, write_record
from posttrain.recipe.schema import Runtime
from posttrain.recipe.trainer_lists import resolve_trainer
from posttrain.stages.context import Context, Events, ModelInput, Summary

TURNS = ("What is it?", "A country.", "And this one?", "A town by the sea.")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chats(count: int) -> list[dict[str, Any]]:
    """Conversations of one or two answers, of unequal lengths."""
    rows = []
    for number in range(count):
        turns = [f"{turn} {'x' * (7 * number % 11)}" for turn in TURNS[: 2 + 2 * (number % 2)]]
        roles = ("user", "assistant") * 2
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
        rows.append({"messages": messages})
    return rows


def preferences(count: int) -> list[dict[str, Any]]:
    """Pairs of unequal lengths."""
    return [
        {"prompt": f"Q{number}", "chosen": "yes" * (1 + number % 4), "rejected": "no" * (1 + number % 3)}
        for number in range(count)
    ]


def make_context(
    run: Path,
    stage: str,
    kind: str,
    trainer: dict[str, Any] | None = None,
    model: str = "base",
    should_stop: Callable[[], bool] = lambda: False,
    runtime: dict[str, Any] | None = None,
) -> Context:
    """What a stage of a run is told; its inputs and data lie in the run folder."""
    folder = run / f"{stage}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    place = run / model
    given = ModelInput(f"@{model}", place, None, Artifact.read(place))
    fingerprint = given.artifact.record.fingerprint if given.artifact else None
    return Context(
        run_dir=run,
        recipe_dir=run,
        stage=stage,
        folder=folder,
        seed=1,
        precision="fp32",
        runtime=Runtime.model_validate({"device": "cpu", **(runtime or {})}),
        trainer=resolve_trainer("dpo" if kind == "dpo" else "sft", {"global_batch_size": 4, **(trainer or {})}),
        inputs={"model": given},
        identity={"model": {"fingerprint": fingerprint}},
        fingerprint=f"print of {stage}",
        events=Events(None),
        should_stop=should_stop,
    )


def finish(context: Context, kind: str, summary: Summary) -> Artifact:
    """Gives a stage's folder its record and its final name, as the stage process does."""
    record = Record(
        stage=context.stage,
        kind=kind,
        version=1,
        fingerprint=context.fingerprint,
        identity=context.identity,
        lineage=summary.lineage,
        summary={"headline": summary.headline, "metrics": summary.metrics},
        ledger=summary.ledger,
    )
    write_record(context.folder, record)
    context.folder.rename(context.run_dir / context.stage)
    artifact = Artifact.read(context.run_dir / context.stage)
    assert artifact is not None
    assert (artifact.folder / RECORD).exists()
    return artifact
