"""`pretrain`: a base model from scratch, or a checkpoint continued, on plain text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from posttrain.artifact import publish_folder
from posttrain.chat.tokenizer import load_tokenizer
from posttrain.errors import RecipeError
from posttrain.models.attention import check_isolation
from posttrain.models.lineage import Lineage, Link, lineage_of
from posttrain.models.load import load_base
from posttrain.models.save import save_full, verify_saved_model
from posttrain.pretraining.init import init_model
from posttrain.pretraining.rows import Row, make_row
from posttrain.pretraining.tokenizer import train_tokenizer
from posttrain.recipe.schema import Pretrain, TokenizerTraining
from posttrain.stages.context import Context, Summary
from posttrain.stages.outputs import model_files, write_ledger
from posttrain.stages.prepare import Prepared, Refused, Tokenised, prepare, schedule_rows, schedule_wrapped
from posttrain.stages.run_loop import run_loop, stage_arguments, training_metrics
from posttrain.stages.setup import Machine, assert_trainable, model_folder, set_up
from posttrain.training.limits import piece_limits
from posttrain.training.sft import build_sft_trainer, sft_step


def run(config: Pretrain, context: Context) -> Summary:
    """Trains on documents packed into rows of `max_length` tokens, isolated from one another."""
    machine = set_up(context)
    tokenizer = _tokenizer(config, context)
    wrapped = config.data.packing in (None, "wrap")
    limit = None if wrapped else config.data.max_length
    cut = config.data.long_rows == "truncate"
    prepared = prepare(config.data, context, "text", lambda rows: _tokenise(rows, tokenizer, limit, cut))
    if wrapped:
        schedule = schedule_wrapped(prepared, context.trainer, context.seed, config.data.max_length)
    else:
        schedule = schedule_rows(prepared, context.trainer, context.seed)
    write_ledger(context.folder, prepared.ledger)
    model = _model(config, context, machine, tokenizer)
    _check_lengths(model, config.data.max_length, context.stage)
    trained, total = assert_trainable(model, context.stage)
    check_isolation(model, len(tokenizer))
    trainer = build_sft_trainer(model, tokenizer, stage_arguments(context, machine, schedule.steps))
    limits = piece_limits(machine.device, context.runtime.micro_batch_tokens, context.runtime.micro_batch_size)
    pad = tokenizer.pad_token_id or 0

    def save(folder: Path) -> None:
        save_full(model, folder, machine.dtype)
        tokenizer.save_pretrained(folder)

    result = run_loop(
        trainer,
        context,
        prepared,
        schedule,
        lambda step: sft_step(schedule.rows_of(step), pad, limits.row_tokens, limits.tokens, limits.documents),
        config.snapshots,
        save,
    )
    context.events("phase", text="saving")
    save(context.folder)
    verify_saved_model(model, context.folder)
    untrained = _untrained(prepared, len(tokenizer)) if config.model is None else []
    return Summary(
        headline=f"{total / 1e6:.2f} M parameters, {result.steps} steps, loss {result.last_loss:.3f}",
        files=model_files(context.folder),
        metrics=training_metrics(result, trained, total, {"untrained_token_ids": untrained}),
        lineage=Lineage(Link(context.run_dir / context.stage, f"@{context.stage}", context.fingerprint)).as_dict(
            context.run_dir
        ),
        ledger=prepared.ledger.as_dict(),
    )


def _tokenizer(config: Pretrain, context: Context) -> PreTrainedTokenizerBase:
    """The model's own, another folder's, or one trained on the stage's texts (once: a resumed run reads it back)."""
    if isinstance(config.tokenizer, TokenizerTraining):
        folder = context.folder / "tokenizer"
        if not folder.exists():
            context.events("phase", text="training the tokenizer")
            texts = prepare_texts(config, context)
            settings = config.tokenizer
            partial = context.folder / ".tokenizer"
            train_tokenizer(texts, settings.vocab_size, settings.reserved_tokens, config.data.max_length, partial)
            publish_folder(partial, folder)
        return load_tokenizer(folder)
    source = "tokenizer" if config.tokenizer is not None else "model"
    return load_tokenizer(model_folder(context.inputs[source]))


def prepare_texts(config: Pretrain, context: Context) -> list[str]:
    """All texts of the stage, each source once."""
    from posttrain.data.read import read_source
    from posttrain.stages.sources import source_spec

    found = [read_source(source_spec(source, context.recipe_dir), "text") for source in config.data.sources]
    return [row.text for rows in found for row in rows.rows]


def _model(config: Pretrain, context: Context, machine: Machine, tokenizer: Any) -> PreTrainedModel:
    if config.init is not None:
        model = init_model(config.init.model_dump(exclude_none=True), tokenizer, context.seed)
        model.set_attn_implementation(machine.attn_implementation)
        return model.to(machine.device)
    lineage = lineage_of(model_folder(context.inputs["model"]), context.inputs["model"].ref)
    if lineage.adapters:
        raise RecipeError(f"stages.{context.stage}.model", "is an adapter", "merge it first")
    set_seed(context.seed)
    return load_base(lineage.base.folder, torch.float32, machine.device, machine.attn_implementation)


def _check_lengths(model: PreTrainedModel, max_length: int, stage: str) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        found = f"{max_length}, but the model has {limit} positions"
        raise RecipeError(f"stages.{stage}.data.max_length", found, f"set at most {limit}")


def _tokenise(rows: list[Any], tokenizer: Any, limit: int | None, cut: bool) -> list[Tokenised[Row] | Refused]:
    """Tokens of each document and its end of sequence; control tokens that a text spells stay text."""
    backend, before = tokenizer.backend_tokenizer, tokenizer.backend_tokenizer.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        encoded = tokenizer([row.text for row in rows])["input_ids"]
    finally:
        backend.encode_special_tokens = before
    results: list[Tokenised[Row] | Refused] = []
    for ids in encoded:
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        if limit is not None and len(ids) > limit and not cut:
            results.append(Refused("longer than max_length", len(ids)))
            continue
        row = make_row(ids[:limit], ids[:limit])
        results.append(Tokenised(row, row.supervised, len(row) - row.supervised, len(ids) - len(row)))
    return results


def _untrained(prepared: Prepared[Row], vocabulary: int) -> list[int]:
    """Vocabulary ids that stand in no row: their embeddings are as they were initialised."""
    seen = np.zeros(vocabulary, dtype=bool)
    for rows in prepared.rows:
        for row in rows:
            seen[row.ids] = True
    return [int(token) for token in np.flatnonzero(~seen)]
