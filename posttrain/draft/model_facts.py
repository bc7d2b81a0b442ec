"""What can be known of a model before it is downloaded: its size, its longest row, its chat template."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.chat.templates import load_template, read_folder_template
from posttrain.errors import UserError
from posttrain.estimate.shapes import architecture_of
from posttrain.models.hub import HubId, fetch_description, parse_reference
from posttrain.models.known_shapes import known_shape

_BY_TOKEN = {"<start_of_turn>": "gemma", "<|start_header_id|>": "llama3.1", "<|im_start|>": "chatml"}
"""A control token of the vocabulary -> the bundled template that is written with it."""
_BY_TYPE = {"gemma": "gemma", "gemma2": "gemma", "gemma3_text": "gemma3", "qwen2": "chatml", "qwen3": "qwen3",
            "olmo2": "olmo2", "phi3": "phi3"}  # fmt: skip
_PLAIN = "zephyr"
"""Its role tags are plain text, so that it needs nothing but an end-of-text token."""
_INSTRUCTED = ("instruct", "chat", "-it", "-sft", "-dpo", "zephyr")


@dataclass(frozen=True)
class ModelFacts:
    """A model as a recipe speaks of it."""

    reference: str
    """Hub id, or a path from the recipe's folder."""
    parameters: int
    positions: int | None
    """Longest sequence, where the config says."""
    chat_template: str | None
    """Bundled name; None: the model's own."""
    rewrites: bool
    """The template leaves parts of earlier answers out, so that each answer needs a row of its own."""
    refuses_system: bool
    license: str | None
    chosen: tuple[str, ...]


def read_model(text: str, recipe_dir: Path) -> ModelFacts:
    """Looks at a model's config and tokenizer, here, in the cache, on the hub, or among the known shapes.

    Args:
        text: folder (from the working directory) or hub id.
        recipe_dir: absolute folder of the recipe.

    Raises:
        UserError: no model, or nothing is known of it.
    """
    local = Path(text).expanduser()
    reference = local if local.is_dir() else _hub_id(text)
    if isinstance(reference, HubId):
        shape, folder = known_shape(reference.id), fetch_description(reference)
        config = _config(folder) if folder is not None else shape.config if shape is not None else None
        if config is None:
            todo = f"connect once, or download it: hf download {reference.id} config.json tokenizer.json"
            raise UserError(f"--model {text}", "its shape is not known, and the hub cannot be asked", todo)
        spelled, licence = str(reference), shape.license if shape is not None else None
    else:
        folder, config, licence = local, _config(local), None
        spelled = spell_path(local, recipe_dir)
    template, why = _template(folder, config, text)
    facts = load_template(template, recipe_dir).facts if template is not None else _own_facts(folder)
    built = architecture_of(config, f"--model {text}")
    return ModelFacts(
        reference=spelled,
        parameters=built.parameters,
        positions=built.positions,
        chat_template=template,
        rewrites=facts is not None and facts.history == "rewritten",
        refuses_system=facts is not None and facts.system == "refused",
        license=licence,
        chosen=(f"model: {spelled}, {built.parameters / 1e9:.2f} B parameters", f"chat template: {why}"),
    )


def spell_path(path: Path, recipe_dir: Path) -> str:
    """A path as a recipe in `recipe_dir` spells it: relative to that, in the form that is no hub id."""
    near = os.path.relpath(path.absolute(), recipe_dir)
    return near if near.startswith("..") else f"./{near}"


def _hub_id(text: str) -> HubId:
    todo = "give a model's folder, or owner/name of the hub"
    try:
        reference = parse_reference(text)
    except UserError:
        raise UserError(f"--model {text}", "is neither a folder nor a hub id", todo) from None
    if not isinstance(reference, HubId):
        raise UserError(f"--model {text}", "is no folder", todo)
    return reference


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        found = "is an adapter" if (folder / "adapter_config.json").is_file() else "holds no model (no config.json)"
        raise UserError(f"--model {folder}", found, "give the folder of a whole model; adapters are merged first")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _template(folder: Path | None, config: Mapping[str, Any], text: str) -> tuple[str | None, str]:
    """The bundled template to train with (None: the model's own), and why."""
    if folder is not None and read_folder_template(folder) is not None:
        return None, "the model's own"
    vocabulary = _vocabulary(folder)
    if vocabulary:
        token = next((token for token in _BY_TOKEN if token in vocabulary), None)
        name = _family(config) if token == "<|im_start|>" and _family(config) == "salamandra" else None
        name = name or (_BY_TOKEN[token] if token is not None else _BY_TYPE.get(str(config.get("model_type")), _PLAIN))
        why = f"its vocabulary has {token}" if token is not None else "no control tokens of a chat in its vocabulary"
        return name, f"{name} ({why})"
    if any(mark in text.lower() for mark in _INSTRUCTED):
        return None, "the model's own, as its name says that it was instructed"
    name = _family(config)
    return name, f"{name} (by its family; its tokenizer could not be looked at)"


def _family(config: Mapping[str, Any]) -> str:
    kind, entries = str(config.get("model_type")), config.get("vocab_size")
    if kind == "llama" and entries in (128256, 256000):
        return "llama3.1" if entries == 128256 else "salamandra"
    return _BY_TYPE.get(kind, _PLAIN)


def _vocabulary(folder: Path | None) -> set[str]:
    path = folder / "tokenizer.json" if folder is not None else None
    if path is None or not path.is_file():
        return set()
    told = json.loads(path.read_text(encoding="utf-8"))
    return {str(token["content"]) for token in told.get("added_tokens", [])} | set(told["model"].get("vocab") or ())


def _own_facts(folder: Path | None) -> Any:
    template = read_folder_template(folder) if folder is not None else None
    return template.facts if template is not None else None
