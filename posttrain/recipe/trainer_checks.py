"""Whether a trainer setting's value is one that the trainer takes: type, choice, range, combination.

Each check returns problems as (key, found, todo); none raises for a user's mistake.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Iterator, Mapping
from typing import Any

from posttrain.recipe.describe import describe, nearest, number_in
from posttrain.recipe.trainer_fields import (
    TrainerField,
    TrainerKind,
    divergence_losses,
    divergence_types,
    loss_types,
    scheduler_settings,
)

Finding = tuple[str, str, str]

_LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")
_AT_LEAST: dict[str, float] = {
    "learning_rate": 0, "weight_decay": 0, "adam_epsilon": 0, "max_grad_norm": 0, "warmup_steps": 0,
    "router_aux_loss_coef": 0, "global_batch_size": 1, "save_total_limit": 1,
    "torch_empty_cache_steps": 1, "dataloader_prefetch_factor": 1, "ddp_timeout": 1, "ddp_bucket_cap_mb": 1,
}  # fmt: skip
_MORE_THAN: dict[str, float] = {
    "num_train_epochs": 0, "beta": 0, "discopop_tau": 0, "logging_steps": 0, "save_steps": 0, "neftune_noise_alpha": 0,
}  # fmt: skip
_BETWEEN: dict[str, tuple[float, float, bool]] = {  # lowest, highest, whether the highest is allowed
    "adam_beta1": (0, 1, False),
    "adam_beta2": (0, 1, False),
    "label_smoothing_factor": (0, 1, False),
    "label_smoothing": (0, 1, False),
    "ld_alpha": (0, 1, True),
}
_STEPS_OR_RATIO = ("warmup_steps", "logging_steps", "save_steps")
_EVALUATING_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")
_OPTIMIZER_PACKAGES = {  # start of the optimizer's name -> package that transformers imports for it
    "galore_": "galore_torch", "apollo_": "apollo_torch", "lomo": "lomo_optim", "adalomo": "lomo_optim",
    "grokadamw": "grokadamw", "schedule_free_": "schedulefree", "stable_adamw": "torch_optimi",
    "adamw_anyprecision": "torchdistx", "adamw_torch_4bit": "torchao", "adamw_torch_8bit": "torchao",
    "adamw_torch_xla": "torch_xla", "adamw_torch_npu": "torch_npu",
}  # fmt: skip
_NEEDS_TARGETS = ("galore_", "apollo_")


def check_value(field: TrainerField, value: Any, choices: tuple[str, ...] | None) -> Finding | None:
    """Checks one value against its field's annotation, choices and range; the first problem or None.

    Args:
        choices: allowed texts (each item's, for a list), or None where any text will do.
    """
    name = field.name
    if not _finite(value):
        return name, f"{describe(value)} is not a finite number", "give a finite number"
    node = ast.parse(field.annotation, mode="eval").body
    if choices and isinstance(value, str) and value not in choices and _takes_text(node):
        return name, f"{value!r} is not allowed", nearest(value, choices)
    if not _accepts(node, value):
        return name, f"{describe(value)}, not {_expected(node)}", _type_remedy(node, value)
    if choices and isinstance(value, list) and (unknown := [item for item in value if item not in choices]):
        return name, f"{unknown[0]!r} is not allowed", nearest(str(unknown[0]), choices)
    return _check_range(name, value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def allowed_values(kind: TrainerKind, field: TrainerField) -> tuple[str, ...] | None:
    """Texts that a field allows: what the trainer's code handles, else what its config lists."""
    if field.name == "loss_type":
        return loss_types(kind)
    if field.name == "f_divergence_type":
        return divergence_types()
    return _LOG_LEVELS if field.name in ("log_level", "log_level_replica") else field.choices


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _alternatives(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return _alternatives(node.left) + _alternatives(node.right)
    return [node]


def _names(node: ast.expr) -> list[str]:
    """Names of a union's alternatives, arguments left out: `None | list[str]` -> None, list.

    A mapping may also be given as JSON text on TRL's own command line: in a recipe it is a mapping.
    """
    names = [
        ast.unparse(option.value if isinstance(option, ast.Subscript) else option) for option in _alternatives(node)
    ]
    return [name for name in names if not (name == "str" and "dict" in names)]


def _takes_text(node: ast.expr) -> bool:
    return any(name not in ("int", "float", "bool", "None", "dict", "list", "Literal") for name in _names(node))


def _accepts(node: ast.expr, value: Any) -> bool:
    names = _names(node)
    if value is None or isinstance(value, bool):
        return ("None" if value is None else "bool") in names or "Any" in names
    if isinstance(value, int):
        return "int" in names or "float" in names or "Any" in names
    if isinstance(value, float):
        return "float" in names or "Any" in names
    if isinstance(value, str):
        return _takes_text(node)
    if isinstance(value, dict):
        return "dict" in names or "Any" in names
    for option in _alternatives(node):
        if isinstance(option, ast.Subscript) and ast.unparse(option.value) == "list":
            return all(_accepts(option.slice, item) for item in value)
    return "list" in names or "Any" in names


_WORDS = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "dict": "a mapping",
    "list": "a list", "None": "null",
}  # fmt: skip


def _expected(node: ast.expr) -> str:
    words = [_WORDS.get(name, "text") for name in _names(node)]
    return " or ".join(dict.fromkeys(sorted(words, key="null".__eq__)))


def _type_remedy(node: ast.expr, value: Any) -> str:
    names = _names(node)
    if isinstance(value, str) and (number := number_in(value)) is not None and _accepts(node, number):
        return f"write {number} without quotes"
    if isinstance(value, str) and "bool" in names:
        return "YAML 1.2 knows only true and false"
    if isinstance(value, float) and value.is_integer() and "int" in names:
        return f"write {int(value)}"
    if isinstance(value, str) and "list" in names:
        return f"write [{value}]"
    if value is None:
        return "remove the key to take the default"
    return f"give {_expected(node)}"


def value_range(name: str) -> dict[str, float]:
    """The range of a number as JSON Schema keywords; empty where any number will do."""
    if name in _BETWEEN:
        low, high, closed = _BETWEEN[name]
        return {"minimum": low, "maximum" if closed else "exclusiveMaximum": high}
    if name in _AT_LEAST:
        return {"minimum": _AT_LEAST[name]}
    return {"exclusiveMinimum": _MORE_THAN[name]} if name in _MORE_THAN else {}


def _check_range(name: str, value: float) -> Finding | None:
    rule = ""
    if name in _AT_LEAST and value < _AT_LEAST[name]:
        rule = f"at least {_AT_LEAST[name]:g}"
    elif name in _MORE_THAN and value <= _MORE_THAN[name]:
        rule = f"more than {_MORE_THAN[name]:g}"
    elif name in _BETWEEN:
        low, high, closed = _BETWEEN[name]
        if value < low or value > high or (value == high and not closed):
            rule = f"at least {low:g} and {'at most' if closed else 'below'} {high:g}"
    elif name == "max_steps" and value < 1 and value != -1:
        rule = "at least 1, or -1 to go by num_train_epochs"
    elif name in _STEPS_OR_RATIO and value >= 1 and value != int(value):
        rule = "a whole number of steps, or a share of all steps below 1"
    return (name, f"{value} is out of range", f"give {rule}") if rule else None


def check_combinations(kind: TrainerKind, given: Mapping[str, Any]) -> Iterator[Finding]:
    """Yields what the trainer would refuse later or silently ignore, of values that are valid one by one."""
    yield from _check_schedule(given)
    yield from _check_optimizer(given)
    yield from _check_checkpointing(given)
    if kind == "dpo":
        yield from _check_dpo(given)
    elif kind == "sft" and given.get("loss_type") == "dft" and given.get("label_smoothing_factor", 0) > 0:
        yield "label_smoothing_factor", "has no effect with loss_type dft", "remove it, or take loss_type nll"


def _check_schedule(given: Mapping[str, Any]) -> Iterator[Finding]:
    name = given.get("lr_scheduler_type", "linear")
    if name in _EVALUATING_SCHEDULERS:
        yield "lr_scheduler_type", f"{name} needs evaluations inside training", "take linear or cosine"
        return
    if name == "constant" and given.get("warmup_steps", 0) > 0:
        yield "warmup_steps", "has no effect with lr_scheduler_type constant", "take constant_with_warmup"
    settings = given.get("lr_scheduler_kwargs") or {}
    known = scheduler_settings(name)
    if known is None:
        return
    allowed, required = known
    for key in [key for key in settings if key not in allowed]:
        yield "lr_scheduler_kwargs", f"the scheduler {name} has no `{key}`", nearest(key, sorted(allowed))
    for key in sorted(required - settings.keys()):
        yield "lr_scheduler_type", f"{name} needs `{key}`", f"add lr_scheduler_kwargs: {{{key}: …}}"
    if "min_lr" in allowed and ("min_lr" in settings) == ("min_lr_rate" in settings):
        yield (
            "lr_scheduler_type",
            f"{name} needs exactly one of `min_lr` and `min_lr_rate`",
            "give lr_scheduler_kwargs: {min_lr_rate: 0.1}",
        )


def _check_optimizer(given: Mapping[str, Any]) -> Iterator[Finding]:
    name = given.get("optim", "")
    targets = name.startswith(_NEEDS_TARGETS)
    package = next((package for start, package in _OPTIMIZER_PACKAGES.items() if name.startswith(start)), None)
    if name.endswith("_layerwise"):
        plain = name.removesuffix("_layerwise")
        yield "optim", f"{name} allows neither micro batches nor several processes", f"take {plain}"
    elif package and importlib.util.find_spec(package) is None:
        yield "optim", f"{name} needs the package {package}, which is not installed", "install it, or take another"
    elif targets and not given.get("optim_target_modules"):
        yield "optim", f"{name} needs optim_target_modules", "add optim_target_modules: all-linear"
    elif not targets and given.get("optim_target_modules"):
        yield "optim_target_modules", "has no effect with this optim", "remove it, or take a galore or apollo optim"
    options = given.get("optim_args")
    if options and not all("=" in option for option in options.split(",")):
        yield "optim_args", f"{options!r} is not of the form key=value,key=value", "write it so"


def _check_checkpointing(given: Mapping[str, Any]) -> Iterator[Finding]:
    if given.get("save_strategy") == "best":
        yield "save_strategy", "'best' needs evaluations inside training", "take steps or epoch"
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if old in given and new in given and given[old] != given[new]:
            yield old, f"differs from {new}, which is the same setting", f"keep {new}"
    on = given.get("activation_checkpointing", given.get("gradient_checkpointing"))
    key = "activation_checkpointing_kwargs"
    key = key if key in given else "gradient_checkpointing_kwargs"
    options = given.get(key) or {}
    if options and not on:
        yield key, "has no effect while gradient_checkpointing is off", "set gradient_checkpointing: true"
    elif options.get("selective") and options.get("use_reentrant"):
        yield key, "selective and use_reentrant exclude each other", "set use_reentrant: false"


_SMOOTHED_LOSSES = frozenset({"robust", "exo_pair", "aot", "aot_unpaired"})


def _check_dpo(given: Mapping[str, Any]) -> Iterator[Finding]:
    losses = given.get("loss_type", ["sigmoid"])
    if not losses:
        yield "loss_type", "an empty list", "remove it to take sigmoid"
        return
    weights = given.get("loss_weights")
    if weights is not None and len(weights) != len(losses):
        yield "loss_weights", f"{len(weights)} weights for {len(losses)} loss types", "give one weight per loss type"
    yield from _check_smoothing(given, losses)
    divergence = given.get("f_divergence_type", "reverse_kl")
    unfit = [loss for loss in losses if loss not in divergence_losses()]
    if divergence != "reverse_kl" and unfit:
        yield (
            "f_divergence_type",
            f"{divergence} has no form for {', '.join(unfit)}",
            "take reverse_kl with these losses",
        )
    if given.get("use_weighting") and (sorting := [loss for loss in losses if loss.startswith("aot")]):
        yield "use_weighting", f"does not go with {', '.join(sorting)}, which sorts the pairs", "remove one of the two"
    if "f_alpha_divergence_coef" in given and divergence != "alpha_divergence":
        todo = "remove it, or set f_divergence_type: alpha_divergence"
        yield "f_alpha_divergence_coef", f"has no effect with f_divergence_type {divergence}", todo
    if given.get("label_smoothing_factor"):
        yield "label_smoothing_factor", "has no effect in dpo", "did you mean label_smoothing?"
    if "discopop_tau" in given and "discopop" not in losses:
        yield "discopop_tau", "has no effect without loss_type discopop", "remove it, or take that loss"


def _check_smoothing(given: Mapping[str, Any], losses: list[str]) -> Iterator[Finding]:
    smoothing = given.get("label_smoothing", 0.0)
    if "exo_pair" in losses and smoothing == 0:
        yield "loss_type", "exo_pair needs label_smoothing above 0", "add label_smoothing: 1e-3"
    elif "robust" in losses and smoothing >= 0.5:
        yield "label_smoothing", f"{smoothing} is out of range for robust", "give at least 0 and below 0.5"
    elif smoothing and not _SMOOTHED_LOSSES.intersection(losses):
        todo = f"remove it, or take one of {', '.join(sorted(_SMOOTHED_LOSSES))}"
        yield "label_smoothing", f"has no effect with {', '.join(losses)}", todo
