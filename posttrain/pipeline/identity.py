"""What gives a stage's output its identity, and the job that its process is told.

Identity and execution part here: paths, devices, process counts, names of stages and publish targets go
into the job alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.artifact import fingerprint
from posttrain.chat.templates import load_template, names_file
from posttrain.errors import ChatError, UserError
from posttrain.pipeline.inputs import Input, Inputs
from posttrain.pipeline.runtime import resolve_runtime
from posttrain.recipe.load import LoadedRecipe
from posttrain.recipe.schema import AnyStage, Dpo, Merge, Pretrain, Recipe, Sft
from posttrain.recipe.trainer_lists import identity_of, resolve_trainer
from posttrain.stages import KINDS
from posttrain.stages.context import Job

At = Callable[..., str]
"""Spells the place of a key of the stage, given as its path."""

_APART = {"kind", "runtime", "seed", "trainer", "model", "models", "report", "chat_template", "data", "suites"}
"""Fields of a stage that enter its identity in another form, or (`runtime`) not at all."""
_EXECUTION = {"to", "hub", "private"}
"""Fields of a `publish` stage that say where it goes, not what it is."""


def describe(loaded: LoadedRecipe, name: str, inputs: Inputs) -> Job:
    """Returns the job of one stage, its identity and fingerprint included.

    The stages it reads must have been described before: `inputs.fingerprints` holds theirs.

    Raises:
        UserError: an input that does not exist or cannot be resolved, or a secret that would be recorded.
    """
    recipe, stage = loaded.recipe, loaded.recipe.stages[name]

    def at(*path: str | int) -> str:
        return loaded.where("stages", name, *path)

    _refuse_secrets(loaded, name)
    config = stage.model_dump(mode="json", by_alias=True, exclude_none=True)
    seed = recipe.seed if stage.seed is None else stage.seed
    by_content, resolved = _resolve(config, inputs, at)
    reads = {label: inputs.model(ref, at(*label.split(".", 1))) for label, ref in references(stage).items()}
    trainer: dict[str, Any] = {}
    if isinstance(stage, (Pretrain, Sft, Dpo)):
        trainer = resolve_trainer(stage.kind, stage.trainer, trains_adapter(recipe, stage, inputs.recipe_dir))
    identity = {
        "kind": stage.kind,
        "version": KINDS[stage.kind].version,
        "seed": seed,
        "precision": recipe.precision,
        "trainer": identity_of(stage.kind, trainer) if isinstance(stage, (Pretrain, Sft, Dpo)) else None,
        **{key: value for key, value in config.items() if key not in _APART | _EXECUTION | reads.keys()},
        "order": list(stage.models) if isinstance(stage, Merge) and stage.models else None,
        **_of_inputs(reads),
        **by_content,
    }
    identity = without_none(identity)
    return Job(
        run_dir=str(inputs.run_dir.absolute()),
        recipe_dir=str(inputs.recipe_dir.absolute()),
        stage=name,
        kind=stage.kind,
        config={**config, **resolved},
        trainer=trainer,
        seed=seed,
        precision=recipe.precision,
        runtime=resolve_runtime(loaded, name),
        inputs={label: read.job for label, read in reads.items()},
        identity=identity,
        fingerprint=fingerprint(identity),
    )


def references(stage: AnyStage) -> dict[str, str]:
    """Returns what a stage reads, as the recipe spells it: label -> `@stage`, path or hub id."""
    given = stage.model_dump(include={"model", "models", "base_model", "report", "tokenizer"})
    found = {label: ref for label, ref in given.items() if isinstance(ref, str)}
    return found | {f"models.{column}": ref for column, ref in (given.get("models") or {}).items()}


def trains_adapter(recipe: Recipe, stage: AnyStage, recipe_dir: Path) -> bool:
    """Whether a stage leaves an adapter: by its method, or (dpo without one) because the model it starts from is one.

    A hub id counts as a whole model until the stage has it.
    """
    if isinstance(stage, (Sft, Dpo)) and stage.method is not None:
        return stage.method.kind != "full"
    if not isinstance(stage, Dpo):
        return False
    if stage.model.startswith("@"):
        parent = recipe.stages.get(stage.model[1:])
        return parent is not None and trains_adapter(recipe, parent, recipe_dir)
    return (recipe_dir / Path(stage.model).expanduser() / "adapter_config.json").is_file()


def without_none(value: Any) -> Any:
    """Drops absent settings at every depth, so that a new optional one changes no fingerprint."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_none(inner) for inner in value]
    return value


def _of_inputs(reads: dict[str, Input]) -> dict[str, Any]:
    columns = {label.removeprefix("models."): read.identity for label, read in reads.items() if "." in label}
    single = {label: read.identity for label, read in reads.items() if "." not in label}
    return {**single, "models": columns or None}


def _refuse_secrets(loaded: LoadedRecipe, name: str) -> None:
    """Refuses secrets from the environment in a stage: its settings are written into its record."""
    for path, (text, _) in loaded.secrets.items():
        if path[:2] == ("stages", name):
            todo = "leave it out: libraries read their tokens from the environment (HF_TOKEN, WANDB_API_KEY)"
            raise UserError(loaded.where(*path), f"the secret {text} would be recorded in the run folder", todo)


def _resolve(config: dict[str, Any], inputs: Inputs, at: At) -> tuple[dict[str, Any], dict[str, Any]]:
    """Resolves data sources, template and target of a stage: (fields of the identity, fields of the job)."""
    identity: dict[str, Any] = {}
    job: dict[str, Any] = {}
    if "data" in config:
        identity["data"], job["data"] = _sources(config["data"], "sources", inputs, at, ("data",))
    if "suites" in config:
        suites = [_sources(suite, "data", inputs, at, ("suites", i)) for i, suite in enumerate(config["suites"])]
        identity["suites"], job["suites"] = [one for one, _ in suites], [one for _, one in suites]
    if config.get("chat_template") is not None:
        job["chat_template"] = _template(config["chat_template"], inputs, at("chat_template"))
        identity["chat_template"] = _template_digest(job["chat_template"], inputs, at("chat_template"))
    if config.get("to") is not None:
        job["to"] = str(Path(config["to"]).expanduser().absolute())
    return identity, job


def _sources(
    block: dict[str, Any], key: str, inputs: Inputs, at: At, path: tuple[str | int, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a block with its list of sources by content, and with the list as the stage reads it."""
    pairs = [inputs.source(source, at(*path, key, i, "path")) for i, source in enumerate(block[key])]
    return {**block, key: [identity for identity, _ in pairs]}, {**block, key: [settings for _, settings in pairs]}


def _template(name: str, inputs: Inputs, where: str) -> str:
    """A bundled template's bare name as it stands; a `.jinja` file as an absolute path."""
    return str(inputs.path(Path(name), where)) if names_file(name) else name


def _template_digest(name: str, inputs: Inputs, where: str) -> str:
    try:
        return load_template(name, inputs.recipe_dir).digest
    except ChatError:
        raise  # it names the template's file and line
    except UserError as error:
        raise UserError(where, f"{error.where}: {error.found}", error.todo) from None
