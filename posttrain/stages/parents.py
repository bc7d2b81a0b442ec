"""What a stage starts from, as far as files tell it: where it lies, which method fits, whose template. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.artifact import Artifact
from posttrain.errors import CheckpointError, RecipeError
from posttrain.models.hub import fetch_model
from posttrain.models.lineage import Lineage
from posttrain.recipe.schema import Method
from posttrain.stages.context import ModelInput


def model_folder(given: ModelInput, weights: bool = True) -> Path:
    """Returns the folder of an input, fetching a hub id at its pinned commit first; its tokenizer alone if asked."""
    if given.folder is not None:
        return given.folder
    name = given.ref.partition("@")[0]
    return fetch_model(name, given.revision or "main", weights)


def resolve_method(method: Method | None, parents: Lineage, stage: str) -> Method:
    """Fills in the method of a `dpo` stage that names none: full on a full model, the parent's shape on an adapter.

    Raises:
        RecipeError: the method does not fit the parent.
    """
    where = f"stages.{stage}.method"
    if method is None:
        return _parents_method(parents) if parents.adapters else Method.model_validate("full")
    if method.kind == "full" and parents.adapters:
        raise RecipeError(where, "full on top of an adapter", "merge the adapter first and train the merged model")
    if method.kind == "continue" and not parents.adapters:
        raise RecipeError(where, "continue, but the model is not an adapter", "use lora, qlora, dora or full")
    if parents.quantization and method.kind in ("lora", "dora"):
        raise RecipeError(where, f"{method.kind} above an adapter trained on a 4-bit base", "use qlora, or merge first")
    if parents.adapters and method.kind == "qlora" and not parents.quantization:
        raise RecipeError(where, "qlora above an adapter trained on an unquantised base", "use lora, or merge first")
    return method


def _parents_method(parents: Lineage) -> Method:
    """The shape of the newest parent adapter; its token rows stay with it.

    Raises:
        CheckpointError: its `adapter_config.json` does not tell.
    """
    path = parents.adapters[-1].folder / "adapter_config.json"
    try:
        return _method_of(json.loads(path.read_text(encoding="utf-8")), parents)
    except KeyError as error:
        raise CheckpointError(str(path), f"lacks {error}", "name the stage's `method`") from None
    except ValidationError as error:
        first = error.errors()[0]
        found = f"`{first['loc'][-1]}` cannot be taken over: {first['msg']}"
        raise CheckpointError(str(path), found, "name the stage's `method`") from None


def _method_of(config: dict[str, Any], parents: Lineage) -> Method:
    target = config["target_modules"]
    settings: dict[str, Any] = {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config["lora_dropout"],
        "target_modules": sorted(target) if isinstance(target, list) else target,
        "use_rslora": config["use_rslora"],
        "rank_pattern": config["rank_pattern"],
        "alpha_pattern": config["alpha_pattern"],
        "trainable_tokens": "none",
    }
    if parents.quantization:
        quantization = parents.quantization
        settings |= {
            "bnb_4bit_quant_type": quantization.quant_type,
            "bnb_4bit_use_double_quant": quantization.double_quant,
        }
        return Method.model_validate({"qlora": settings})
    return Method.model_validate({"dora" if config.get("use_dora") else "lora": settings})


def template_is_settled(artifact: Artifact | None) -> bool:
    """Whether a model was left by a stage of ours that trained or carried a template."""
    return artifact is not None and artifact.record.kind in ("sft", "dpo", "merge")
