"""Shapes of known models: config and generation config facts without weights, for estimates and twins."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHAPES = Path(__file__).with_name("shapes")


@dataclass(frozen=True)
class Shape:
    """What is known of a model before a byte of it is downloaded."""

    id: str
    architecture: str
    """Class of the causal language model, e.g. `MistralForCausalLM`."""
    parameters: int
    """Counted on the meta device from `config`; a tied head counts once."""
    license: str
    """SPDX id in lower case, or the publisher's own name for it (`llama3.1`, `gemma`)."""
    dtype: str
    """Of the published weights: `bfloat16`, `float16`, `float32`."""
    config: dict[str, Any]
    """`model_type` and the fields that `AutoConfig.for_model` needs."""
    generation_config: dict[str, Any]
    """Ids of the beginning, the end and the padding of a text."""
    active_parameters: int | None = None
    """Used per token, for a mixture of experts."""


def known_shape(model_id: str) -> Shape | None:
    """Returns the shape of a hub id (`owner/name`, without revision), or None for a model not known here."""
    path = SHAPES / f"{model_id.replace('/', '__')}.json"
    if "/" not in model_id or not path.is_file():
        return None
    return Shape(**json.loads(path.read_text(encoding="utf-8")))


def known_ids() -> list[str]:
    """Lists the hub ids whose shape is known, in alphabetical order."""
    return sorted(path.stem.replace("__", "/", 1) for path in SHAPES.glob("*.json"))
