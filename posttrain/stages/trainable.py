"""The model of a training stage: what is loaded, what is frozen, what is trained, and what it stands on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, set_seed

from posttrain.artifact import Artifact
from posttrain.errors import RecipeError
from posttrain.models.lineage import Lineage, Link, Quantization
from posttrain.models.load import (
    DTYPE_NAMES,
    Adapter,
    add_adapter,
    continue_adapter,
    load_base,
    load_policy,
    quantised_modules,
    untrained_rows,
)
from posttrain.models.new_tokens import read_new_tokens
from posttrain.pretraining.sharded import shard
from posttrain.recipe.schema import LoraSettings, Method, QloraSettings
from posttrain.stages.context import Context
from posttrain.stages.setup import Machine


@dataclass(frozen=True)
class Policy:
    """The model of a training stage, ready to train."""

    model: PreTrainedModel | PeftModel
    kind: str
    """`full`, `lora`, `qlora`, `dora` or `continue`."""
    parents: Lineage
    """What it stands on, the adapter in training left out."""
    quantization: Quantization | None
    token_rows: list[int]
    """Vocabulary ids whose embedding rows are trained beside an adapter."""

    @property
    def is_adapter(self) -> bool:
        """Whether the stage leaves an adapter and not a whole model."""
        return self.kind != "full"

    def lineage_after(self, context: Context) -> dict[str, Any]:
        """The lineage of what the stage leaves, for its record."""
        own = Link(context.run_dir / context.stage, f"@{context.stage}", context.fingerprint)
        if not self.is_adapter:
            return Lineage(own).as_dict(context.run_dir)
        return self.parents.grown(own, self.quantization).as_dict(context.run_dir)


def load_trainable(
    parents: Lineage,
    method: Method,
    machine: Machine,
    context: Context,
    control_ids: list[int],
    vocabulary: Mapping[str, int],
) -> Policy:
    """Loads a stage's model with exactly what the method trains set trainable.

    Args:
        control_ids: ids of the control tokens that the template writes; those whose embedding row was never
            trained are trained beside the adapter (`trainable_tokens: auto`), and so are the rows that the
            model's folder lists as new.
        vocabulary: token -> id of the tokenizer, for tokens that the recipe names.

    Raises:
        RecipeError: another quantisation than the parent's, or named tokens that cannot be trained.
    """
    set_seed(context.seed)
    policy = _load(parents, method, machine, context, control_ids, vocabulary)
    if machine.spread != "ddp" and policy.quantization is not None:
        where, found = f"stages.{context.stage}.runtime.accelerate_config", "4-bit weights are not cut over processes"
        raise RecipeError(where, found, "set ddp: every process holds the base in 4 bits")
    if machine.spread == "fsdp":
        shard(policy.model, machine.device)
    return policy


def _load(
    parents: Lineage,
    method: Method,
    machine: Machine,
    context: Context,
    control_ids: list[int],
    vocabulary: Mapping[str, int],
) -> Policy:
    dtype, device, attention = machine.dtype, machine.loading, machine.attn_implementation
    if method.kind == "full":
        model: Any = load_base(parents.base.folder, torch.float32, device, attention)
        return Policy(model.requires_grad_(True), "full", parents, None, [])
    if method.kind == "continue":
        lower = Lineage(parents.base, parents.adapters[:-1], parents.quantization)
        return Policy(continue_adapter(parents, dtype, device, attention), "continue", lower, parents.quantization, [])
    settings = method.adapter
    assert settings is not None  # the three kinds left all have one
    quantization = _quantization(settings, parents, context)
    stack = Lineage(parents.base, parents.adapters, quantization)
    model = load_policy(stack, dtype, device, attention)
    if quantization:
        quantization = replace(quantization, modules=quantised_modules(model), device=device)
    if isinstance(settings.trainable_tokens, list):
        where = f"stages.{context.stage}.method.{method.kind}.trainable_tokens"
        rows = _named_rows(settings.trainable_tokens, vocabulary, parents, where)
    else:
        rows = _token_rows(settings, model, parents, control_ids)
    adapter = Adapter(
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules,
        use_rslora=settings.use_rslora,
        use_dora=method.kind == "dora",
        rank_pattern=settings.rank_pattern,
        alpha_pattern=settings.alpha_pattern,
        modules_to_save=settings.modules_to_save,
    )
    if isinstance(model, PreTrainedModel):
        model.requires_grad_(False)
    return Policy(add_adapter(model, adapter, rows), method.kind, parents, quantization, rows)


def _quantization(settings: LoraSettings, parents: Lineage, context: Context) -> Quantization | None:
    if not isinstance(settings, QloraSettings):
        return None
    wanted = Quantization(
        settings.bnb_4bit_quant_type, settings.bnb_4bit_use_double_quant, DTYPE_NAMES[context.precision]
    )
    if parents.quantization and parents.quantization != wanted:
        raise RecipeError(
            f"stages.{context.stage}.method.qlora",
            f"quantises the base as {wanted}, its parent adapter was trained on {parents.quantization}",
            "use the parent's settings and precision, or merge first",
        )
    return wanted


def _token_rows(settings: LoraSettings, model: Any, parents: Lineage, control_ids: list[int]) -> list[int]:
    """Ids to train by `auto`: new rows, and control tokens that neither pretraining nor a parent has trained.

    What this stage leaves has trained them all: neither an adapter nor a merged model lists rows as new.
    """
    if settings.trainable_tokens == "none" or parents.adapters:
        return []
    known = _never_trained(parents.base.folder)
    suspects = untrained_rows(model, control_ids) if known is None else [i for i in control_ids if i in known]
    return sorted({*suspects, *(token.id for token in read_new_tokens(parents.base.folder))})


def _named_rows(names: list[str], vocabulary: Mapping[str, int], parents: Lineage, where: str) -> list[int]:
    if parents.adapters:
        raise RecipeError(where, "names tokens, above an adapter", "merge it first: token rows train on a whole model")
    if unknown := [name for name in names if name not in vocabulary]:
        raise RecipeError(where, f"{unknown[0]!r} is no token of the tokenizer", "name tokens that it has")
    return sorted({vocabulary[name] for name in names})


def _never_trained(base: Path) -> set[int] | None:
    """Ids that a base of ours never saw in training, from its record; None for other houses' checkpoints."""
    artifact = Artifact.read(base)
    if artifact is None or "untrained_token_ids" not in artifact.record.summary["metrics"]:
        return None
    return set(artifact.record.summary["metrics"]["untrained_token_ids"])
