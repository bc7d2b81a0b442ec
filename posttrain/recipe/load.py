"""Reading a recipe: file or bundled name, overrides, environment, and every problem at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from posttrain.errors import RecipeError, RecipeErrors, UserError
from posttrain.recipe import bundled
from posttrain.recipe.consistency import check_runtime, check_stage
from posttrain.recipe.environment import Substituted, escape, substitute
from posttrain.recipe.overrides import apply_overrides
from posttrain.recipe.problems import Problem, key_text, translate
from posttrain.recipe.references import check_references
from posttrain.recipe.schema import Dpo, Evaluate, Merge, Pretrain, Publish, Recipe, Sft, Stage
from posttrain.recipe.trainer_lists import check_trainer
from posttrain.recipe.yaml12 import KeyPath, decode, parse

_STAGES: dict[str, type[Stage]] = {
    "pretrain": Pretrain, "sft": Sft, "dpo": Dpo, "merge": Merge, "evaluate": Evaluate, "publish": Publish,
}  # fmt: skip
_TRAINING = ("pretrain", "sft", "dpo")


@dataclass(frozen=True)
class Places:
    """Where each key of a recipe came from: a line of its file, or a `--set`."""

    file: str
    lines: dict[KeyPath, int]
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """`file:line  key.path`, or `--set KEY`; a key that is not there stands at the nearest one above it."""
        origin = next((self.origins[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.origins), None)
        text = key_text(path)
        if origin is not None:
            return origin if origin == f"--set {text}" else f"{origin}  {text}"
        return f"{self.file}:{self._line(path)}  {text}".rstrip()

    def rank(self, path: KeyPath) -> int:
        """Sorts problems: by line, and those of `--set` after all lines."""
        overridden = any(path[:n] in self.origins for n in range(len(path), 0, -1))
        return 1 << 60 if overridden else self._line(path)

    def _line(self, path: KeyPath) -> int:
        return next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 1)


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe, and what is needed to speak about its file."""

    recipe: Recipe
    path: Path
    folder: Path
    """Absolute; relative input paths of the recipe start here."""
    source_text: str
    """The file as it is: variables unreplaced, overrides not applied."""
    places: Places
    secrets: dict[KeyPath, tuple[str, str]]

    @property
    def lines(self) -> dict[KeyPath, int]:
        """Key path -> line in the file."""
        return self.places.lines

    def where(self, *path: str | int) -> str:
        """The place of a key for an error's `where`: `file:line  stages.sft.model`, or `--set KEY`."""
        return self.places.where(path)

    def redacted(self) -> dict[str, Any]:
        """The whole recipe with its defaults as plain values, secrets from the environment as `${NAME}`.

        As YAML (`yaml12.dump`) it is a recipe again, and the same one.
        """
        dump = escape(self.recipe.model_dump(by_alias=True, mode="json"))
        for path, (text, _) in self.secrets.items():
            node: Any = dump
            for part in path[:-1]:
                node = node[part]
            node[path[-1]] = text
        return dump


def load_recipe(
    name_or_path: str | Path,
    overrides: list[str] | None = None,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> LoadedRecipe:
    """Reads and checks a recipe.

    Args:
        name_or_path: a file, or the bare name of a bundled recipe.
        overrides: `KEY=VALUE` texts of `--set`, applied in order.
        env: variables for `${NAME}`; the process's own when absent.
        folder: where relative paths start, for a copy of a recipe; the file's own folder when absent.

    Raises:
        RecipeErrors: every problem that the recipe alone shows, in the order of lines, `--set` last.
        UserError: there is no such file and no such bundled recipe.
    """
    path = find_recipe(name_or_path)
    display = _display(path)
    try:
        text = decode(path.read_bytes(), display)
        document = parse(text, display)
    except RecipeError as error:
        raise RecipeErrors([error]) from None
    if not isinstance(document.value, dict):
        found = "the file is empty" if document.value is None else "the top level is not a mapping"
        raise RecipeErrors([RecipeError(f"{display}:1", found, "start with name: and stages:")])
    overridden = apply_overrides(document.value, overrides or [])
    tree = substitute(overridden.value, os.environ if env is None else env)
    places = Places(display, document.lines, overridden.origins)
    recipe, problems = _check(tree)
    located = list(document.problems)
    located += [(places.rank(p.path), _error(p, places, tree)) for p in problems]
    located += [(1 << 60, error) for error in overridden.problems]
    if located or recipe is None:
        raise RecipeErrors([error for _, error in sorted(located, key=lambda pair: pair[0])])
    return LoadedRecipe(recipe, path, folder.resolve() if folder else path.parent, text, places, tree.secrets)


def find_recipe(name_or_path: str | Path) -> Path:
    """Absolute path of a recipe file, given as a path or as a bundled recipe's bare name.

    Raises:
        UserError: neither exists.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path.resolve()
    if path.is_dir():
        raise UserError(str(path), "is a folder", "give a recipe's file or bare name")
    if len(path.parts) > 1 or path.suffix in (".yaml", ".yml"):
        raise UserError(str(path), "no such file", "give a recipe's path, or the bare name of a bundled one")
    return bundled.find_bundled("recipes", str(name_or_path))


def _display(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _check(tree: Substituted) -> tuple[Recipe | None, list[Problem]]:
    """Validates a tree and runs every check on what of it is valid by itself."""
    problems: list[Problem] = []
    recipe = None
    try:
        recipe = Recipe.model_validate(tree.value)
    except ValidationError as error:
        problems += translate(error, tree.shown)
    raw = tree.shown.get("stages")
    stages = {name: stage for name, stage in raw.items() if isinstance(stage, dict)} if isinstance(raw, dict) else {}
    kinds = {name: str(stage.get("kind", "")) for name, stage in stages.items()}
    for name, stage in stages.items():
        if kinds[name] in _TRAINING and isinstance(stage.get("trainer"), dict):
            for key, found, todo in check_trainer(kinds[name], stage["trainer"]):  # type: ignore[arg-type]
                problems.append(Problem(("stages", name, "trainer", key), found, todo))
    valid = dict(recipe.stages) if recipe else _valid_stages(tree.value["stages"] if stages else {}, kinds)
    for name, config in valid.items():
        problems += check_stage(name, config)
    problems += check_references(valid, dict.fromkeys(raw if isinstance(raw, dict) else (), "") | kinds)
    problems += check_runtime(tree.shown, valid)
    unset = {problem.path for problem in tree.problems}
    return recipe, tree.problems + [problem for problem in problems if problem.path not in unset]


def _valid_stages(raw: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Stage]:
    """The stages of a broken recipe that are valid by themselves."""
    valid: dict[str, Stage] = {}
    for name, kind in kinds.items():
        if kind in _STAGES:
            try:
                valid[name] = _STAGES[kind].model_validate(raw[name])
            except ValidationError:
                continue  # already reported with the recipe
    return valid


def _error(problem: Problem, places: Places, tree: Substituted) -> RecipeError:
    found, todo = problem.found, problem.todo
    for text, secret in tree.secrets.values():
        if secret:
            found, todo = found.replace(secret, text), todo.replace(secret, text)
    return RecipeError(places.where(problem.path), found, todo)
