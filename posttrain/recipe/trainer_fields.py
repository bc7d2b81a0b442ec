"""The trainer settings that the installed TRL and transformers know, read from their source files.

Importing them costs seconds and torch; their config classes are plain dataclasses, so the syntax tree
has all there is: names, annotations, defaults, choices. A test compares it with the imported classes.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import PosttrainError

TrainerKind = Literal["pretrain", "sft", "dpo"]

_CONFIG: dict[str, str] = {"pretrain": "TrainingArguments", "sft": "SFTConfig", "dpo": "DPOConfig"}
_FILES: dict[str, tuple[str, str]] = {
    "TrainingArguments": ("transformers", "training_args.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "DPOConfig": ("trl", "trainer/dpo_config.py"),
    "OptimizerNames": ("transformers", "training_args.py"),
    "SchedulerType": ("transformers", "trainer_utils.py"),
    "IntervalStrategy": ("transformers", "trainer_utils.py"),
    "SaveStrategy": ("transformers", "trainer_utils.py"),
    "HubStrategy": ("transformers", "trainer_utils.py"),
    "DebugOption": ("transformers", "debug_utils.py"),
}


@dataclass(frozen=True)
class TrainerField:
    """One setting of a trainer config."""

    name: str
    annotation: str
    """Source text of the annotation, `SchedulerType | str`."""
    default: Any
    """The default where it is a literal (also a factory of one), else its source text."""
    literal: bool
    """Whether `default` is the value."""
    help: str
    choices: tuple[str, ...] | None
    """Allowed texts where the sources list them: an enum's values, or the field's own choices."""


@functools.cache
def read_fields(kind: TrainerKind) -> dict[str, TrainerField]:
    """All fields of a trainer's config, bases first; a subclass's default replaces its base's.

    Raises:
        PosttrainError: the installed sources are not as this version of posttrain expects them.
    """
    return _class_fields(_CONFIG[kind])


@functools.cache
def _class_fields(name: str) -> dict[str, TrainerField]:
    found = _class(name)
    fields: dict[str, TrainerField] = {}
    for base in found.bases:
        fields |= _class_fields(ast.unparse(base))
    for statement in found.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            fields[statement.target.id] = _field(statement.target.id, statement)
    return fields


def _field(name: str, statement: ast.AnnAssign) -> TrainerField:
    value = statement.value
    words: dict[str, ast.expr] = {}
    if isinstance(value, ast.Call):  # dataclasses.field(default=…, metadata=…)
        words = {word.arg: word.value for word in value.keywords if word.arg}
        factory = words.get("default_factory")
        value = words.get("default") or (factory.body if isinstance(factory, ast.Lambda) else factory)
    metadata = words.get("metadata")
    pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    inside = {key.value: item for key, item in pairs if isinstance(key, ast.Constant)}
    literal, default = _literal(value)
    choices = _literal(inside["choices"])[1] if "choices" in inside else None
    return TrainerField(
        name=name,
        annotation=ast.unparse(statement.annotation),
        default=default,
        literal=literal,
        help=str(_literal(inside["help"])[1]) if "help" in inside else "",
        choices=tuple(choices) if isinstance(choices, list) else _enum_choices(statement.annotation),
    )


def _literal(node: ast.expr | None) -> tuple[bool, Any]:
    """(True, value) of a literal expression, or (False, its source text)."""
    if isinstance(node, ast.Name) and node.id in ("list", "dict"):
        return True, [] if node.id == "list" else {}
    if node is None:
        return False, ""
    try:
        return True, ast.literal_eval(node)
    except ValueError:
        return False, ast.unparse(node)


def _enum_choices(annotation: ast.expr) -> tuple[str, ...] | None:
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name) and node.id in _FILES:
            return _enum_values(node.id)
    return None


@functools.cache
def _enum_values(name: str) -> tuple[str, ...]:
    """Values of a string enum, in the order of its source."""
    values = [item.value for item in _class(name).body if isinstance(item, ast.Assign)]
    return tuple(item.value for item in values if isinstance(item, ast.Constant) and isinstance(item.value, str))


def _class(name: str) -> ast.ClassDef:
    """Parses the head of a class: everything before its first method, which is where fields stand."""
    if name not in _FILES:
        raise _unexpected(name, "is a base class that posttrain does not know")
    package, file = _FILES[name]
    match = re.search(rf"^class {name}\b.*?(?=^    (?:def |@)|^[^\s#)]|\Z)", _source(package, file), re.M | re.S)
    if match is None:
        raise _unexpected(f"{package}/{file}", f"has no class {name}")
    tree = ast.parse(match.group())
    found = tree.body[0]
    assert isinstance(found, ast.ClassDef)
    return _only_known_bases(found)


def _only_known_bases(found: ast.ClassDef) -> ast.ClassDef:
    found.bases = [base for base in found.bases if ast.unparse(base) not in ("ExplicitEnum", "object")]
    return found


@functools.cache
def _source(package: str, file: str) -> str:
    spec = importlib.util.find_spec(package)  # of a top-level package: nothing is imported
    if spec is None or not spec.submodule_search_locations:
        raise PosttrainError(package, "is not installed", "install posttrain again: pip install posttrain")
    return (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")


@functools.cache
def loss_types(kind: TrainerKind) -> tuple[str, ...]:
    """Loss types that the trainer's own code handles: it is stricter than its config."""
    source = _source("trl", f"trainer/{kind}_trainer.py")
    if kind == "dpo":
        found = re.findall(r'\b(?:el)?if loss_type == "(\w+)"', source)
    else:
        match = re.search(r"\.loss_type not in (\([^)]*\))", source)
        found = list(ast.literal_eval(match.group(1))) if match else []
    if not found:
        raise _unexpected(f"trl/trainer/{kind}_trainer.py", "does not list its loss types as before")
    return tuple(found)


@functools.cache
def divergence_types() -> tuple[str, ...]:
    """f-divergences that DPO's loss handles."""
    return tuple(re.findall(r'self\.f_divergence_type == "(\w+)"', _source("trl", "trainer/dpo_trainer.py")))


@functools.cache
def divergence_losses() -> frozenset[str]:
    """DPO loss types that allow another f-divergence than reverse KL."""
    match = re.search(r"f_divergence_loss_types = (\{[^}]*\})", _source("trl", "trainer/dpo_trainer.py"))
    if match is None:
        raise _unexpected("trl/trainer/dpo_trainer.py", "has no f_divergence_loss_types")
    return frozenset(ast.literal_eval(match.group(1)))


@functools.cache
def scheduler_settings(name: str) -> tuple[frozenset[str], frozenset[str]] | None:
    """(allowed, required) keys of `lr_scheduler_kwargs` for a scheduler; None where it takes any.

    The steps and the optimizer, which the trainer passes itself, are left out.
    """
    source = _source("transformers", "optimization.py")
    members = {item.targets[0].id: item.value.value for item in _assignments("SchedulerType")}
    table = dict(re.findall(r"SchedulerType\.(\w+): (\w+),", source))
    function = next((table[member] for member, value in members.items() if value == name and member in table), None)
    match = re.search(rf"^(def {function}\(.*?\)(?: -> [^\n]*)?:)$", source, re.M | re.S) if function else None
    if match is None:
        raise _unexpected("transformers/optimization.py", f"has no function for the scheduler {name}")
    definition = ast.parse(match.group(1) + " ...").body[0]
    assert isinstance(definition, ast.FunctionDef)
    if definition.args.kwarg is not None:
        return None
    names = [argument.arg for argument in definition.args.args]
    required = names[: len(names) - len(definition.args.defaults)]
    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    return frozenset(names) - ours, frozenset(required) - ours


def _assignments(name: str) -> list[Any]:
    return [item for item in _class(name).body if isinstance(item, ast.Assign)]


def _unexpected(where: str, found: str) -> PosttrainError:
    return PosttrainError(where, found, "install the versions of constraints.txt, or update posttrain")
