"""The recipe as JSON Schema (draft 2020-12), so that editors complete and check recipes as they are written."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from posttrain.recipe import schema, schema_parts
from posttrain.recipe.trainer_checks import allowed_values, value_range
from posttrain.recipe.trainer_fields import TrainerField, TrainerKind
from posttrain.recipe.trainer_lists import BATCH_SIZE, EXECUTION, OWN_DEFAULTS, settable_fields

_TRAINERS: dict[str, TrainerKind] = {"Pretrain": "pretrain", "Sft": "sft", "Dpo": "dpo"}
_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "dict": "object", "list": "array",
          "None": "null"}  # fmt: skip
_METHODS = ["full", "lora", "qlora", "dora", "continue"]


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe; `trainer` blocks hold the settings of the installed TRL and transformers."""
    found = schema.Recipe.model_json_schema(by_alias=True)
    definitions = found["$defs"]
    _describe(found, definitions)
    for name, kind in _TRAINERS.items():
        definitions[name]["properties"]["trainer"] = trainer_schema(kind)
    definitions["Method"] = {"anyOf": [{"enum": _METHODS}, definitions["Method"]]}
    for settings in ("full", "lora", "qlora", "dora"):  # `method: {lora: }` takes lora's defaults, as null here
        definitions["Method"]["anyOf"][1]["properties"][settings].pop("default", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | found


def trainer_schema(kind: TrainerKind) -> dict[str, Any]:
    """JSON Schema of a stage kind's `trainer:` block."""
    properties = {name: _field_schema(kind, field) for name, field in settable_fields(kind).items()}
    description = "Settings of the trainer, spelled as transformers and TRL spell them."
    return {"type": "object", "additionalProperties": False, "description": description, "properties": properties}


def _field_schema(kind: TrainerKind, field: TrainerField) -> dict[str, Any]:
    node = ast.parse(field.annotation, mode="eval").body
    choices = allowed_values(kind, field)
    options = [_type_schema(option, choices) for option in _options(node, one_or_list=field.name == "loss_type")]
    unique = [option for index, option in enumerate(options) if option not in options[:index]]
    found: dict[str, Any] = unique[0] if len(unique) == 1 else {"anyOf": unique}
    return found | value_range(field.name) | _documentation(field)


def _options(node: ast.expr, *, one_or_list: bool) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        both = _options(node.left, one_or_list=False) + _options(node.right, one_or_list=False)
        mapping = any(ast.unparse(option).startswith("dict") for option in both)
        return [option for option in both if not (mapping and ast.unparse(option) == "str")]
    if one_or_list and isinstance(node, ast.Subscript):
        return [node, node.slice]
    return [node]


def _type_schema(node: ast.expr, choices: tuple[str, ...] | None) -> dict[str, Any]:
    if isinstance(node, ast.Subscript):
        name = ast.unparse(node.value)
        if name == "Literal":
            return {"const": ast.literal_eval(node.slice)}
        inner = {"items": _type_schema(node.slice, choices)} if name == "list" else {}
        return {"type": _TYPES[name]} | inner
    kind = _TYPES.get(ast.unparse(node), "string")
    return {"enum": list(choices)} if kind == "string" and choices else {"type": kind}


def _documentation(field: TrainerField) -> dict[str, Any]:
    if field.name == BATCH_SIZE:
        text = "Rows per optimizer step: documents in sft, pairs in dpo, packed rows where `packing: wrap`."
    elif field.name in EXECUTION:
        text = "How the stage runs; does not change its result."
    else:
        text = "Changes the result."
    default = OWN_DEFAULTS.get(field.name, field.default)
    return {"description": text} | ({"default": default} if field.literal else {})


def _describe(found: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Adds each field's docstring, which stands below it in the schema's source."""
    bases = {name: [base.__name__ for base in getattr(schema, name).__mro__] for name in [*definitions, "Recipe"]}
    texts = _attribute_docstrings()
    for name, ancestors in bases.items():
        properties = (found if name == "Recipe" else definitions[name]).get("properties", {})
        for base in reversed(ancestors):
            for key, text in texts.get(base, {}).items():
                if key in properties:
                    properties[key]["description"] = text


def _attribute_docstrings() -> dict[str, dict[str, str]]:
    """Class name -> field, as a recipe spells it -> the text below it."""
    found: dict[str, dict[str, str]] = {}
    for item in [*ast.parse(inspect.getsource(schema_parts)).body, *ast.parse(inspect.getsource(schema)).body]:
        if isinstance(item, ast.ClassDef):
            texts = found.setdefault(item.name, {})
            for field, below in zip(item.body, item.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    match below:
                        case ast.Expr(value=ast.Constant(value=str(text))):
                            texts[field.target.id.rstrip("_")] = text
    return found
