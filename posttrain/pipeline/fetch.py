"""Puts on disk what a plan's stages read from the hub, so that they run where there is no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.data.hub import load_hub_rows
from posttrain.data.read import SourceSpec
from posttrain.models.files import verify_tokenizer_files, verify_weight_files
from posttrain.models.lineage import lineage_of
from posttrain.pipeline.plan import Plan
from posttrain.pipeline.preflight import Problems
from posttrain.recipe.load import LoadedRecipe
from posttrain.recipe.schema import Source
from posttrain.stages.context import Job, ModelInput
from posttrain.stages.parents import model_folder
from posttrain.stages.sources import source_spec


def fetch(loaded: LoadedRecipe, planned: Plan) -> None:
    """Downloads the hub models and data sets of every stage that a plan runs; what the caches hold is not asked for.

    Raises:
        UserError: what cannot be had, with its place; RecipeErrors when there are several.
    """
    problems = Problems()
    for stage in planned.stages:
        if stage.action not in ("run", "redo"):
            continue
        for label, given in stage.job.inputs.items():
            if given["folder"] is None:
                with problems.noted():
                    _fetch_model(label, given)
        for spec in _sources(stage.job):
            with problems.noted():
                next(load_hub_rows(str(spec.path), spec.name, spec.split, spec.revision), None)
    problems.refuse()


def _fetch_model(label: str, given: dict[str, Any]) -> None:
    """Fetches a model as its stage will, and checks that its files are all there."""
    tokenizer_alone = label == "tokenizer"
    folder = model_folder(ModelInput(given["ref"], None, given["revision"]), weights=not tokenizer_alone)
    if tokenizer_alone:
        verify_tokenizer_files(folder)
    else:
        verify_weight_files(lineage_of(folder, given["ref"]).base.folder)


def _sources(job: Job) -> list[SourceSpec]:
    """The data of a stage that lie on the hub, each once."""
    given = [*job.config.get("data", {}).get("sources", ())]
    given += [source for suite in job.config.get("suites", ()) for source in suite["data"]]
    specs = {}
    for source in given:
        spec = source_spec(Source.model_validate(source), Path(job.recipe_dir))
        if isinstance(spec.path, str):
            specs[(spec.path, spec.name, spec.split, spec.revision)] = spec
    return list(specs.values())
