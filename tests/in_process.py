"""Runs a recipe's stages in the test's own process: torch and trl are imported once for many runs."""

from __future__ import annotations

import time
from pathlib import Path

from posttrain.artifact import Artifact, write_atomically
from posttrain.pipeline.inputs import JOB
from posttrain.pipeline.plan import partial_of, plan
from posttrain.recipe.load import LoadedRecipe
from posttrain.stages.__main__ import Stop, complete
from posttrain.stages.context import Events


def run_in_process(loaded: LoadedRecipe, run_dir: Path, until: str = "") -> dict[str, Artifact]:
    """Plans a fresh run and completes every stage here, as a stage process would; returns what they left."""
    run_dir.mkdir(parents=True, exist_ok=True)
    left = {}
    for stage in plan(loaded, run_dir).stages:
        partial = partial_of(run_dir, stage.stage)
        partial.mkdir()
        write_atomically(partial / JOB, stage.job.dump())
        complete(stage.job, partial, Events(None), Stop(), time.time())
        artifact = Artifact.read(run_dir / stage.stage)
        assert artifact is not None
        left[stage.stage] = artifact
        if stage.stage == until:
            break
    return left
