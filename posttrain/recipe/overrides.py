"""`--set stages.dpo.trainer.beta=0.1`: values put into a recipe's tree before it is checked."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from posttrain.errors import RecipeError
from posttrain.recipe.describe import describe, nearest
from posttrain.recipe.yaml12 import KeyPath, parse

_KEY = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[\d+\])*")
_PART = re.compile(r"[^.\[\]]+")


@dataclass
class Overridden:
    """A tree with overrides in it."""

    value: dict[str, Any]
    origins: dict[KeyPath, str] = field(default_factory=dict)
    """Path that was set -> `--set KEY`."""
    problems: list[RecipeError] = field(default_factory=list)


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> Overridden:
    """Returns a copy of a tree with `KEY=VALUE` overrides in it.

    KEY is dotted, with list items as `[0]` or `.0`; VALUE is YAML.
    """
    result = Overridden(_copy(tree))
    for override in overrides:
        key, equals, text = override.partition("=")
        where = f"--set {key}"
        try:
            if not equals:
                raise RecipeError(where, "has no value", "write --set KEY=VALUE")
            path = _put(result.value, _key_parts(key, where), _value(text, where), where)
            result.origins[path] = where
        except RecipeError as error:
            result.problems.append(error)
    return result


def _value(text: str, where: str) -> Any:
    if text.startswith("@"):  # the shell took the quotes that YAML wants around "@stage"
        return text
    document = parse(text, where)
    for _, problem in document.problems:
        raise problem
    return document.value


def _key_parts(key: str, where: str) -> list[str]:
    if not _KEY.fullmatch(key):
        raise RecipeError(where, "is not a key", "write names with dots between: stages.dpo.trainer.beta")
    return _PART.findall(key)


def _put(tree: dict[str, Any], parts: list[str], value: Any, where: str) -> KeyPath:
    """Sets a value in place, making mappings on the way, and returns its path."""
    stages = tree.get("stages")
    if parts[0] == "stages" and len(parts) > 2 and isinstance(stages, dict) and parts[1] not in stages:
        raise RecipeError(where, f"the recipe has no stage `{parts[1]}`", nearest(parts[1], list(stages)))
    node: Any = tree
    path: list[str | int] = []
    for depth, part in enumerate(parts):
        key: str | int = part
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise RecipeError(where, f"`{part}` is no item of a list of {len(node)}", "items count from 0")
            key = int(part)
        elif not isinstance(node, dict):
            above = ".".join(parts[:depth])
            raise RecipeError(where, f"`{above}` is {describe(node)}, which has no keys", f"set {above} as a whole")
        path.append(key)
        if depth == len(parts) - 1:
            node[key] = value
        elif isinstance(node, dict) and node.get(part) is None:
            node[part] = {}
        node = node[key]
    return tuple(path)


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value
