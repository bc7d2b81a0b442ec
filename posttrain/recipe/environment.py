"""`${NAME}` in strings becomes the environment's value; `$${` stands for a plain `${`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.recipe.problems import Problem
from posttrain.recipe.yaml12 import KeyPath

_VARIABLE = re.compile(r"\$\$\{|\$\{([^{}]*)\}?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(?:^|[_-])(?:token|key|secret|password|credential)s?(?:$|[_-])", re.IGNORECASE)


@dataclass(frozen=True)
class Substituted:
    """A recipe's tree with variables replaced."""

    value: Any
    shown: Any
    """The same, where secrets still read `${NAME}`: what errors and records may show."""
    secrets: dict[KeyPath, tuple[str, str]]
    """Path -> (text in the recipe, text with the secret)."""
    problems: list[Problem]


def substitute(tree: Any, env: Mapping[str, str]) -> Substituted:
    """Replaces `${NAME}` in every string value (not in keys) of a tree, which is left alone.

    A value is secret when a key on its path, or its variable, is named like one (token, key, secret,
    password, credential).
    """
    walk = _Walk(env)
    value, shown = walk.visit(tree, ())
    return Substituted(value, shown, walk.secrets, walk.problems)


def escape(tree: Any) -> Any:
    """Writes `${` in every string as `$${`, so that `substitute` gives the tree back."""
    if isinstance(tree, dict):
        return {key: escape(inner) for key, inner in tree.items()}
    if isinstance(tree, list):
        return [escape(inner) for inner in tree]
    return tree.replace("${", "$${") if isinstance(tree, str) else tree


@dataclass
class _Walk:
    env: Mapping[str, str]
    secrets: dict[KeyPath, tuple[str, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def visit(self, value: Any, path: KeyPath) -> tuple[Any, Any]:
        """Returns (with variables replaced, as it may be shown)."""
        if isinstance(value, dict):
            pairs = {key: self.visit(inner, (*path, key)) for key, inner in value.items()}
            return {key: pair[0] for key, pair in pairs.items()}, {key: pair[1] for key, pair in pairs.items()}
        if isinstance(value, list):
            items = [self.visit(inner, (*path, index)) for index, inner in enumerate(value)]
            return [item[0] for item in items], [item[1] for item in items]
        if isinstance(value, str) and "${" in value:
            return self.text(value, path)
        return value, value

    def text(self, value: str, path: KeyPath) -> tuple[str, str]:
        """Replaces the variables of one string."""
        names: list[str] = []

        def replace(match: re.Match[str]) -> str:
            if match.group() == "$${":
                return "${"
            name = match.group(1)
            if not match.group().endswith("}") or not _NAME.fullmatch(name):
                todo = "write ${NAME}, or $${ for the two characters themselves"
                self.problems.append(Problem(path, f"`{match.group()}` names no variable", todo))
            elif name not in self.env:
                self.problems.append(Problem(path, f"the variable {name} is not set", f"export {name}=…"))
            else:
                names.append(name)
                return self.env[name]
            return match.group()

        replaced = _VARIABLE.sub(replace, value)
        words = [part for part in path if isinstance(part, str)] + names
        if names and any(_SECRET.search(word) for word in words):
            self.secrets[path] = (value, replaced)
            return replaced, value
        return replaced, replaced
