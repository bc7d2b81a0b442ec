"""A peft LoRA folder, read as edits of named base tensors; whatever is not understood is refused.

Key grammar (peft 0.21, after the prefix `base_model.model.`):
    MODULE.lora_A.weight, MODULE.lora_B.weight, MODULE.lora_B.bias      LoRA on a linear layer
    MODULE.lora_embedding_A, MODULE.lora_embedding_B                    LoRA on an embedding
    MODULE.lora_magnitude_vector                                        DoRA
    MODULE.token_adapter.trainable_tokens_delta                         trained rows; new values, not differences
    MODULE.base_layer.weight, MODULE.token_adapter.base_layer.weight    a copy of the base's own tensor
    MODULE.weight, MODULE.bias                                          modules_to_save, bias, resized embeddings
    ...experts[.base_layer].lora_A.weight, ....lora_B.weight            target_parameters: all experts of a layer
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError
from posttrain.merging.checkpoint import read_json, stamp
from posttrain.merging.header import FLOATS, TensorInfo, read_header

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
HEADS = ("lm_head", "embed_out")
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""Parameters of a runtime's module of experts, in the order in which it declares them."""

_KEY = re.compile(
    r"(?P<module>.+?)\."
    r"(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?|token_adapter\.trainable_tokens_delta"
    r"|(?:token_adapter\.)?base_layer\.(?:weight|bias)|weight|bias)"
)
_MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that change the base itself: the adapter alone does not tell the model."""
_UNKNOWN = (
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "alora_invocation_tokens",
)
"""Settings that change what the factors mean."""


@dataclass(frozen=True)
class LowRank:
    """`W + scale * B A`; with a magnitude m (DoRA), `m / |W + scale * B A| * (W + scale * B A)` by output."""

    key: str
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    """The base stores (in, out): embeddings and Conv1D."""
    magnitude: TensorInfo | None = None
    step: int = 1
    column: int = 0
    """B's columns are every `step`-th from `column` on: those between belong to other experts."""


@dataclass(frozen=True)
class Rows:
    """Rows of an embedding that take new values."""

    key: str
    indices: tuple[int, ...]
    values: TensorInfo


@dataclass(frozen=True)
class Replace:
    """The whole tensor takes new values."""

    key: str
    values: TensorInfo
    of_base: bool = False
    """Not trained: peft's copy of the base's own tensor, which matters only after a vocabulary was resized."""


@dataclass(frozen=True)
class Add:
    """`W + scale * values`: the bias that LoRA's B may carry."""

    key: str
    values: TensorInfo
    scale: float


Edit = LowRank | Rows | Replace | Add


@dataclass(frozen=True)
class Adapter:
    """What one adapter folder does, by the base tensor's name; no tensor is in memory."""

    folder: Path
    config: dict[str, Any]
    edits: dict[str, list[Edit]]
    """Copies of the base's own tensors first."""
    stamps: dict[Path, tuple[int, int, int]]
    fused: dict[str, LowRank] = field(default_factory=dict)
    """On parameters of all experts of a layer, which only the runtime has: see `experts`; `step` is their number."""


def read_adapter(folder: Path) -> Adapter:
    """Reads an adapter folder; a `ref/` folder in it (TRL's frozen copy) is not looked at.

    Raises:
        CheckpointError: not a LoRA, a variant that is not understood, a key left over, a factor missing.
    """
    config = _checked_config(folder)
    file = folder / WEIGHTS
    modules: dict[str, dict[str, TensorInfo]] = {}
    stamps = {file: stamp(file), folder / CONFIG: stamp(folder / CONFIG)}
    for info in read_header(file):
        match = _KEY.fullmatch(info.name.removeprefix(PREFIX))
        if match is None or not info.name.startswith(PREFIX) or info.dtype not in FLOATS:
            raise CheckpointError(str(file), f"key {info.name} ({info.dtype}) is not understood", "nothing was merged")
        part = match["part"].removesuffix(".weight") if match["part"].startswith("lora_mag") else match["part"]
        modules.setdefault(match["module"], {})[part.removeprefix("token_adapter.")] = info
    fused = _fused(modules, config)
    edits: dict[str, list[Edit]] = {}
    for module, parts in modules.items():
        trained = _trained(module, parts, config)
        for name, edit in [*_base_copies(module, parts), *trained]:
            edits.setdefault(name, []).append(edit)
        if parts:
            left = ", ".join(info.name for info in parts.values())
            raise CheckpointError(str(file), f"no use for {left}", "nothing was merged")
    if not edits and not fused:
        raise CheckpointError(str(file), "holds no tensor", "train the adapter again")
    return Adapter(folder, config, edits, stamps, fused)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and value > 0


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _are_indices(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_are_indices(rows) for rows in value.values())
    return value is None or (isinstance(value, list) and all(isinstance(row, int) for row in value))


def _by_patterns(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a setting is absent, or a table whose keys are patterns and whose values fit."""
    return lambda value: (
        value is None
        or (isinstance(value, dict) and all(_is_pattern(key) and fits(inner) for key, inner in value.items()))
    )


_FITS: dict[str, Callable[[Any], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_number,
    "rank_pattern": _by_patterns(_is_rank),
    "alpha_pattern": _by_patterns(_is_number),
    "target_modules": lambda value: _are_names(value) or _is_pattern(value),
    "exclude_modules": lambda value: _are_names(value) or _is_pattern(value),
    "target_parameters": _are_names,
    "modules_to_save": _are_names,
    "trainable_token_indices": _are_indices,
}
"""Settings that a merge computes with, and what peft writes there."""


def _checked_config(folder: Path) -> dict[str, Any]:
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(where, f"peft_type {config.get('peft_type')!r}", "only LoRA adapters can be merged")
    for name in _UNKNOWN:
        if config.get(name):
            raise CheckpointError(where, f"{name} is set: a LoRA variant that this merge does not know")
    for name, fits in _FITS.items():
        if not fits(config.get(name)):
            raise CheckpointError(where, f"{name} is {config.get(name)!r}", "restore what peft wrote there")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MUTATING):
        raise CheckpointError(
            where,
            f"init_lora_weights: {init} changed the base itself",
            "convert it to a plain LoRA with peft's save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    return config


def _trained(module: str, parts: dict[str, TensorInfo], config: dict[str, Any]) -> list[tuple[str, Edit]]:
    """Takes what it understands out of `parts`."""
    found: list[tuple[str, Edit]] = []
    if "trainable_tokens_delta" in parts:
        values = parts.pop("trainable_tokens_delta")
        found.append((f"{module}.weight", Rows(values.name, _token_indices(module, values, config), values)))
    for first, second, transposed in (
        ("lora_A.weight", "lora_B.weight", bool(config.get("fan_in_fan_out"))),
        ("lora_embedding_A", "lora_embedding_B", True),
    ):
        a, b = parts.pop(first, None), parts.pop(second, None)
        if a is None and b is None:
            continue
        if a is None or b is None:
            lacking, there = (first, b) if a is None else (second, a)
            assert there is not None
            raise CheckpointError(
                str(there.file), f"{PREFIX}{module}.{lacking} is missing beside {there.name}", "nothing was merged"
            )
        parameter = f"{module}.weight"
        scale = _scale(parameter if targets_parameter(parameter, config) else module, a, b, config)
        edit = LowRank(a.name, a, b, scale, transposed, _magnitude(module, a, parts, config))
        found.append((f"{module}.weight", edit))
        if bias := parts.pop("lora_B.bias", None):
            found.append((f"{module}.bias", Add(bias.name, bias, scale)))
    for part, kind in (("weight", "weight"), ("bias", "bias"), ("base_layer.bias", "bias")):
        if part in parts and _may_replace(module, kind, config):
            values = parts.pop(part)
            found.append((f"{module}.{kind}", Replace(values.name, values)))
    return found


def _magnitude(module: str, a: TensorInfo, parts: dict[str, TensorInfo], config: dict[str, Any]) -> TensorInfo | None:
    if not config.get("use_dora"):
        return None  # a magnitude that is there all the same is left over, and refused
    if "lora_magnitude_vector" not in parts:
        key = f"{PREFIX}{module}.lora_magnitude_vector"
        raise CheckpointError(str(a.file), f"{key} is missing though use_dora is set", "nothing was merged")
    return parts.pop("lora_magnitude_vector")


def _scale(name: str, a: TensorInfo, b: TensorInfo, config: dict[str, Any], experts: int = 1) -> float:
    """alpha / r (LoRA, arXiv 2106.09685) or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732)."""
    r = _rank(name, config)
    alpha = _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"])
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != r * experts or b.shape[1] != r * experts:
        raise CheckpointError(
            str(a.file), f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} do not have rank {r}", f"see {CONFIG}"
        )
    return alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r


def _rank(name: str, config: dict[str, Any]) -> int:
    return _by_pattern(config.get("rank_pattern"), name, config["r"])


def targets_parameter(name: str, config: dict[str, Any]) -> bool:
    """peft's rule for `target_parameters`: the whole name of a parameter, or its end."""
    return any(name == target or name.endswith(f".{target}") for target in config.get("target_parameters") or [])


def _fused(modules: dict[str, dict[str, TensorInfo]], config: dict[str, Any]) -> dict[str, LowRank]:
    """Takes the factors of parameters that hold all experts out of `modules`.

    peft wraps a module once for each targeted parameter, in the order of their declaration, so a key tells its
    parameter by how many `base_layer` it goes through: none for the last. A is (experts * r, in) with the rows
    of one expert together, B is (out, r * experts) with the columns of one expert `experts` apart.
    """
    found: dict[str, LowRank] = {}
    holders = {re.sub(r"(\.base_layer)+$", "", module) for module in modules}
    for holder in sorted(holder for holder in holders if holder.endswith(".experts")):
        names = [f"{holder}.{part}" for part in EXPERT_PARAMETERS]
        targeted = [name for name in names if targets_parameter(name, config)]
        for depth, name in enumerate(reversed(targeted)):
            parts = modules.get(holder + ".base_layer" * depth, {})
            if config.get("use_dora") or not {"lora_A.weight", "lora_B.weight"} <= parts.keys():
                continue  # left over, and refused
            a, b = parts.pop("lora_A.weight"), parts.pop("lora_B.weight")
            experts = max(1, a.rows // _rank(name, config))
            found[name] = LowRank(a.name, a, b, _scale(name, a, b, config, experts), transposed=False, step=experts)
    return found


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as peft's get_pattern_key."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _token_indices(module: str, values: TensorInfo, config: dict[str, Any]) -> tuple[int, ...]:
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((rows for name, rows in given.items() if module.endswith(name)), None)
    if not given or len(given) != values.rows or len(set(given)) != len(given):
        raise CheckpointError(
            str(values.file),
            f"{values.name} has {values.rows} rows for trainable_token_indices {given}",
            f"see {CONFIG}",
        )
    return tuple(given)


def _may_replace(module: str, kind: str, config: dict[str, Any]) -> bool:
    """Whether a tensor under its plain name was asked for: peft stores some beside the factors."""
    saved = config.get("modules_to_save") or []
    if any(re.search(rf"(^|\.){re.escape(name)}(\.|$)", module) for name in saved):
        return True
    if kind == "bias":
        return config.get("bias", "none") != "none"
    return bool(config.get("ensure_weight_tying")) and module.rsplit(".", 1)[-1] in HEADS


def _base_copies(module: str, parts: dict[str, TensorInfo]) -> list[tuple[str, Edit]]:
    """Takes the base's own tensors out of `parts`: beside a LoRA, or whole embeddings of a resized vocabulary."""
    kinds = {"base_layer.weight": "weight", "base_layer.bias": "bias"}
    if module.rsplit(".", 1)[-1] in (*EMBEDDINGS, *HEADS):
        kinds["weight"] = "weight"
    found: list[tuple[str, Edit]] = []
    for part, kind in kinds.items():
        if values := parts.pop(part, None):
            found.append((f"{module}.{kind}", Replace(values.name, values, of_base=True)))
    return found
