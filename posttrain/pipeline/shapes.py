"""What each model of a plan looks like before anything is loaded: through stages, folders and known hub ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.estimate.adapters import ALL_LINEAR, AdapterShape
from posttrain.estimate.architecture import Architecture
from posttrain.estimate.shapes import architecture_of
from posttrain.estimate.weights import Method
from posttrain.models.files import read_json
from posttrain.models.known_shapes import known_shape
from posttrain.models.lineage import lineage_of
from posttrain.stages.context import Job

_MULTIPLE = 8
"""Rows of a new embedding are a multiple of it (`posttrain.pretraining.init`)."""


@dataclass(frozen=True)
class Standing:
    """A model as its lineage will make it."""

    architecture: Architecture
    adapters: tuple[AdapterShape, ...] = ()
    four_bits: bool = False
    double_quant: bool = True
    untrained: int = 0
    """Control tokens whose rows nothing has trained yet."""


class Shapes:
    """Shapes of the models that a plan's stages read and leave, each found once.

    `missing` holds, by stage, why a shape is not known.
    """

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self.jobs = jobs
        self.missing: dict[str, str] = {}
        self._left: dict[str, Standing | None] = {}

    def read(self, job: Job, label: str = "model") -> Standing | None:
        """The model that a stage reads, or None where its shape is not known."""
        given = job.inputs[label]
        if given["ref"].startswith("@") and given["ref"][1:] in self.jobs:
            return self.left(given["ref"][1:])
        found = _of_folder(Path(given["folder"]), given["ref"]) if given["folder"] else _of_hub(given)
        if found is None:
            self.missing[job.stage] = f"the shape of {given['ref']} is not known here: no config.json with its sizes"
        return found

    def left(self, stage: str) -> Standing | None:
        """The model that a stage leaves."""
        if stage not in self._left:
            self._left[stage] = self._leave(self.jobs[stage])
        return self._left[stage]

    def _leave(self, job: Job) -> Standing | None:
        if job.kind == "pretrain" and "init" in job.config:
            return self._from_scratch(job)
        label = "model" if "model" in job.inputs else next(iter(job.inputs))
        standing = self.read(job, label)
        if standing is not None and job.kind == "pretrain" and "tokenizer" in job.config:
            entries = self._entries(job)
            multiple = 64 if standing.architecture.vocabulary % 64 == 0 else _MULTIPLE
            rows = -(-entries // multiple) * multiple if entries is not None else None
            return replace(standing, architecture=standing.architecture.with_vocabulary(rows)) if rows else None
        if standing is None or job.kind not in ("sft", "dpo"):
            return Standing(standing.architecture) if standing is not None and job.kind == "merge" else standing
        method = self.method(job, standing)
        if method.adapter is None:
            return Standing(standing.architecture)
        return Standing(standing.architecture, (*method.parents, method.adapter), method.four_bits, method.double_quant)

    def method(self, job: Job, standing: Standing) -> Method:
        """What a training stage trains on the model it reads; mirrors `posttrain.stages.parents.resolve_method`."""
        given = job.config.get("method")
        if job.kind == "pretrain" or (given is None and not standing.adapters) or "full" in (given or {}):
            return Method()
        if given is None:
            newest = standing.adapters[-1]
            own = AdapterShape(**{**newest.__dict__, "token_rows": 0, "modules_to_save": ()})
            return Method(own, standing.adapters, standing.four_bits, standing.double_quant)
        if given.get("continue"):
            return Method(standing.adapters[-1], standing.adapters[:-1], standing.four_bits, standing.double_quant)
        kind, settings = next(iter(given.items()))
        own = _adapter(settings, kind == "dora", 0 if standing.adapters else standing.untrained)
        double = bool(settings.get("bnb_4bit_use_double_quant", True))
        return Method(own, standing.adapters, kind == "qlora", double)

    def _from_scratch(self, job: Job) -> Standing | None:
        entries, tokenizer = self._entries(job), job.config["tokenizer"]
        if entries is None:
            return None
        rows = -(-entries // _MULTIPLE) * _MULTIPLE
        sizes = {"model_type": "llama", "vocab_size": rows, **job.config["init"]}
        reserved = len(tokenizer["reserved_tokens"]) if isinstance(tokenizer, dict) else 0
        return Standing(architecture_of(sizes, job.stage), (), False, True, reserved)

    def _entries(self, job: Job) -> int | None:
        """Entries of the tokenizer that a `pretrain` stage gives its model."""
        tokenizer = job.config["tokenizer"]
        if isinstance(tokenizer, dict):
            return int(tokenizer["vocab_size"])
        given = job.inputs["tokenizer"]
        if given["ref"][1:] in self.jobs and given["ref"].startswith("@"):
            standing = self.left(given["ref"][1:])
            return standing.architecture.vocabulary if standing is not None else None
        path = Path(given["folder"] or ".") / "tokenizer.json"
        if not path.is_file():
            self.missing[job.stage] = "its tokenizer is not on this machine, so its vocabulary is not known"
            return None
        told = json.loads(path.read_text(encoding="utf-8"))
        return len({*told["model"]["vocab"], *(token["content"] for token in told.get("added_tokens", []))})


def _adapter(settings: Mapping[str, Any], dora: bool, untrained: int) -> AdapterShape:
    """An adapter by its settings, spelled as in the recipe or in `adapter_config.json`."""
    target, tokens = settings.get("target_modules") or ALL_LINEAR, settings.get("trainable_tokens", "auto")
    rows = len(tokens) if isinstance(tokens, list) else untrained if tokens == "auto" else 0
    return AdapterShape(
        r=int(settings["r"]),
        target_modules=target if isinstance(target, str) else tuple(target),
        rank_pattern=dict(settings.get("rank_pattern") or {}),
        dora=dora,
        dropout=float(settings.get("lora_dropout") or 0.0),
        modules_to_save=tuple(settings.get("modules_to_save") or ()),
        token_rows=rows,
    )


def _of_folder(folder: Path, ref: str) -> Standing | None:
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        return None
    lineage = lineage_of(folder, ref)
    sizes = read_json(lineage.base.folder / "config.json")
    if "vocab_size" not in sizes.get("text_config", sizes):
        return None  # a config that leaves its sizes to the class says nothing of this model
    configs = [read_json(link.folder / "adapter_config.json") for link in lineage.adapters]
    quantization = lineage.quantization
    return Standing(
        architecture_of(sizes, ref),
        tuple(_adapter({**config, "trainable_tokens": "none"}, bool(config.get("use_dora")), 0) for config in configs),
        quantization is not None,
        quantization.double_quant if quantization is not None else True,
    )


def _of_hub(given: Mapping[str, Any]) -> Standing | None:
    name = given["ref"].partition("@")[0]
    shape = known_shape(name)
    if shape is not None:
        return Standing(architecture_of(shape.config, name))
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(name, "config.json", revision=given["revision"])
    return Standing(architecture_of(read_json(Path(path)), name)) if isinstance(path, str) else None
