"""Problems of a recipe: what pydantic and the checks find, in words, at the key they are about."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from posttrain.recipe.describe import describe, nearest, nearest_word, number_in
from posttrain.recipe.schema import Method, Recipe
from posttrain.recipe.yaml12 import KeyPath


@dataclass(frozen=True)
class Problem:
    """Something wrong at a key path; `load` adds file and line."""

    path: KeyPath
    found: str
    todo: str = ""


_EXPECTED = {
    "string_type": "text", "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "list_type": "a list", "dict_type": "a mapping", "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}  # fmt: skip
_RANGE = {
    "greater_than_equal": "at least {ge:g}", "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}", "less_than": "below {lt:g}",
}  # fmt: skip


def key_text(path: KeyPath) -> str:
    """A key path as people write it: `stages.sft.data.sources[0].path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def translate(error: ValidationError, shown: Any) -> list[Problem]:
    """Turns pydantic's errors on a `Recipe` into problems.

    Args:
        error: what `Recipe.model_validate` raised.
        shown: the tree it validated, as it may be shown (secrets hidden).
    """
    found: dict[KeyPath, list[tuple[dict[str, Any], bool]]] = {}
    for details in error.errors(include_url=False, include_input=False):
        path, branch = _path(details, shown)
        found.setdefault(path, []).append((dict(details), branch))
    deeper = {path[:length] for path in found for length in range(len(path))}
    problems = []
    for path, items in found.items():
        if path in deeper and all(branch for _, branch in items):
            continue  # another branch of the union came further: its error is the one meant
        problems.append(_problem(path, [details for details, _ in items], shown))
    return _without_misspelt(problems)


def _path(details: Mapping[str, Any], shown: Any) -> tuple[KeyPath, bool]:
    """Keeps those parts of pydantic's location that are keys; says whether a union's label was among the rest."""
    location = list(details["loc"])
    if location[:1] == ["stages"] and len(location) > 2 and location[2] != "[key]":
        del location[2]  # the discriminator's value
    path: list[str | int] = []
    node: Any = shown
    branch = False
    for part in location:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            path.append(part)
            node = node[part]
        elif part != "[key]" and not (details["type"] == "missing" and part == location[-1]):
            branch = True
    return tuple(path), branch


def _problem(path: KeyPath, items: list[dict[str, Any]], shown: Any) -> Problem:
    details = items[0]
    value = at(shown, path)
    kind, context = details["type"], details.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, value, shown)
    if kind == "missing":
        names = ", ".join(f"`{item['loc'][-1]}`" for item in items if item["type"] == "missing")
        return Problem(path, f"{names} is missing", "add it")
    if kind == "union_tag_not_found":
        return Problem(path, "`kind` is missing", f"add kind: {', '.join(_kinds())}")
    if kind == "union_tag_invalid":
        return Problem((*path, "kind"), f"unknown kind {context['tag']!r}", nearest(str(context["tag"]), _kinds()))
    if kind == "literal_error" and len(items) == 1:
        return _not_allowed(path, value, str(context["expected"]))
    if kind in _RANGE:
        return Problem(path, f"{value} is out of range", f"give {_RANGE[kind].format(**context)}")
    if kind == "finite_number":
        return Problem(path, f"{describe(value)} is not a finite number", "give a finite number")
    if kind == "too_short":
        return Problem(path, f"an empty {'list' if isinstance(value, list) else 'mapping'}", "give at least one entry")
    if kind == "string_pattern_mismatch":
        name = path[-1] if "[key]" in details["loc"] else value
        return Problem(path, f"{name!r} cannot be a name here", f"it must match {context['pattern']}")
    if kind == "value_error":
        return Problem(path, details["msg"].removeprefix("Value error, "))
    return _wrong_type(path, value, items)


def _wrong_type(path: KeyPath, value: Any, items: list[dict[str, Any]]) -> Problem:
    words = [_EXPECTED.get(item["type"], str(item.get("ctx", {}).get("expected", item["msg"]))) for item in items]
    words = list(dict.fromkeys(words))
    todo = ""
    if isinstance(value, str) and (number := number_in(value)) is not None and "number" in " ".join(words):
        todo = f"write {number} without quotes"
    elif isinstance(value, float) and value.is_integer() and "a whole number" in words:
        todo = f"write {int(value)}"
    elif isinstance(value, str) and "true or false" in words:
        todo = "YAML 1.2 knows only true and false"
    elif isinstance(value, (int, float)) and "text" in words:
        todo = f'put it in quotes: "{str(value).lower() if isinstance(value, bool) else value}"'
    elif isinstance(value, (str, dict)) and "a list" in words:
        todo = f"write [{value}]" if isinstance(value, str) else "start each entry with `- `"
    elif value is None:
        todo = "give it a value, or remove the key"
    elif words == ["a mapping"]:
        todo = "write it as keys with values"
    return Problem(path, f"{describe(value)}, not {' or '.join(words)}", todo)


def _not_allowed(path: KeyPath, value: Any, expected: str) -> Problem:
    allowed = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
    if not isinstance(value, str):
        return Problem(path, f"{describe(value)}, not one of the allowed words", f"allowed: {', '.join(allowed)}")
    return Problem(path, f"{value!r} is not allowed", nearest(value, allowed))


def _kinds() -> list[str]:
    """Every stage kind, from the schema."""
    stages = models_at(("stages", ""), {"stages": {"": None}})
    return [get_args(stage.model_fields["kind"].annotation)[0] for stage in stages]


def _unknown_key(path: KeyPath, value: Any, shown: Any) -> Problem:
    models = models_at(path[:-1], shown)
    key = str(path[-1])
    one_word = isinstance(value, str) and _is_method(path, models)
    if one_word or Method in models:
        word = str(value) if one_word else key
        return Problem(path, f"unknown method {word!r}", nearest(word, names_of([Method])))
    known = names_of(models)
    if near := nearest_word(key, known):
        return Problem(path, f"unknown key `{key}`", f"did you mean {near}?")
    for model in models:
        for name, field in model.model_fields.items():
            if key in names_of(_models(field.annotation)):
                return Problem(path, f"unknown key `{key}`", f"it belongs under `{name}`")
    if "trainer" in known:
        return Problem(path, f"unknown key `{key}`", "a setting of the trainer belongs under `trainer`")
    return Problem(path, f"unknown key `{key}`", f"allowed: {', '.join(known)}" if known else "remove it")


def _is_method(path: KeyPath, models: Sequence[type[BaseModel]]) -> bool:
    """Whether a path is a stage's `method`, which pydantic sees as a mapping even when it is one word."""
    return path[-1] == "method" and any("method" in model.model_fields for model in models)


def _without_misspelt(problems: list[Problem]) -> list[Problem]:
    """Leaves out a missing key that stands there misspelt: one mistake, one problem."""
    suggested = {(p.path[:-1], p.todo) for p in problems if p.found.startswith("unknown key")}
    kept = []
    for problem in problems:
        name = problem.found.removesuffix(" is missing").strip("`")
        if not (problem.found.endswith(" is missing") and (problem.path, f"did you mean {name}?") in suggested):
            kept.append(problem)
    return kept


def at(tree: Any, path: KeyPath) -> Any:
    """The value at a key path that exists in a tree."""
    for part in path:
        tree = tree[part]
    return tree


def names_of(models: Sequence[type[BaseModel]]) -> list[str]:
    """Keys that these models allow, as a recipe spells them."""
    return list(dict.fromkeys(field.alias or name for model in models for name, field in model.model_fields.items()))


def models_at(path: KeyPath, tree: Any) -> list[type[BaseModel]]:
    """The schema classes that may stand at a key path of a tree; of stages, those of the given kind."""
    annotations: list[Any] = [Recipe]
    node: Any = tree
    for part in path:
        annotations = [inner for annotation in annotations for inner in _step(annotation, part)]
        node = at(node, (part,)) if isinstance(node, (dict, list)) else None
        annotations = [a for a in annotations if _fits_kind(a, node)]
    return [model for annotation in annotations for model in _models(annotation)]


def _step(annotation: Any, part: str | int) -> list[Any]:
    found: list[Any] = []
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            found += [f.annotation for n, f in option.model_fields.items() if (f.alias or n) == part]
        elif get_origin(option) in (list, dict):
            found.append(get_args(option)[-1])
    return [inner for annotation in found for inner in _options(annotation)]


def _options(annotation: Any) -> list[Any]:
    """Alternatives of a type, unions and `Annotated` opened."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _options(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for option in get_args(annotation) for inner in _options(option)]
    return [annotation]


def _models(annotation: Any) -> list[type[BaseModel]]:
    return [option for option in _options(annotation) if isinstance(option, type) and issubclass(option, BaseModel)]


def _fits_kind(annotation: Any, node: Any) -> bool:
    kinds = [f.annotation for m in _models(annotation) for n, f in m.model_fields.items() if n == "kind"]
    literal = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
    return literal is None or not isinstance(node, dict) or node.get("kind") in literal
