"""`pretrain`: a base model from scratch, or a checkpoint continued, on plain text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from posttrain.artifact import publish_folder
from posttrain.chat.tokenizer import load_tokenizer, tokenizer_digest
from posttrain.data.read import open_source
from posttrain.data.rows import TextRow
from posttrain.errors import RecipeError
from posttrain.models.lineage import Lineage, Link, lineage_of
from posttrain.models.load import load_base
from posttrain.models.save import save_full, verify_saved_model
from posttrain.pretraining.init import init_model
from posttrain.pretraining.rows import Row
from posttrain.pretraining.store import stored_row
from posttrain.pretraining.tokenizer import train_tokenizer
from posttrain.recipe.schema import Data, Pretrain, TokenizerTraining
from posttrain.stages.context import Context, Summary
from posttrain.stages.fitting import fit_sft
from posttrain.stages.outputs import model_files, write_ledger
from posttrain.stages.parents import model_folder
from posttrain.stages.prepare import Conversion, Prepared, Refused, Tokenised, prepare
from posttrain.stages.run_loop import run_loop, training_metrics
from posttrain.stages.schedule import schedule_rows, schedule_wrapped
from posttrain.stages.setup import Machine, assert_trainable, set_up
from posttrain.stages.sources import source_spec


def run(config: Pretrain, context: Context) -> Summary:
    """Trains on documents packed into rows of `max_length` tokens, isolated from one another."""
    context.clock.enter("data")
    machine = set_up(context)
    tokenizer = _tokenizer(config, context)
    wrapped = config.data.packing in (None, "wrap")
    prepared = prepare(config.data, context, conversion(tokenizer, config.data))
    if wrapped:
        schedule = schedule_wrapped(prepared, context.trainer, context.seed, config.data.max_length)
    else:
        schedule = schedule_rows(prepared, context.trainer, context.seed)
    write_ledger(context.folder, prepared.ledger)
    context.clock.enter("loading")
    model = _model(config, context, machine, tokenizer)
    _check_lengths(model, config.data.max_length, context.stage)
    trained, total = assert_trainable(model, context.stage)
    fitted, make_step = fit_sft(
        model,
        None,
        tokenizer,
        machine,
        context,
        schedule.steps,
        schedule.rows_of,
        (lambda _: schedule.rows_of(0)) if wrapped else prepared.longest,
    )

    def save(folder: Path) -> None:
        save_full(model, folder, machine.dtype)
        tokenizer.save_pretrained(folder)

    result = run_loop(
        fitted.trainer,
        context,
        prepared,
        schedule,
        make_step,
        config.snapshots,
        save,
    )
    context.events("phase", text="saving")
    context.clock.enter("saving")
    save(context.folder)
    verify_saved_model(model, context.folder)
    untrained = _untrained(prepared, len(tokenizer)) if config.model is None else []
    return Summary(
        headline=f"{total / 1e6:.2f} M parameters, {result.steps} steps, loss {result.last_loss:.3f}",
        files=model_files(context.folder),
        metrics=training_metrics(result, trained, total, {"untrained_token_ids": untrained, **fitted.metrics()}),
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


def prepare_texts(config: Pretrain, context: Context) -> Iterator[str]:
    """All usable texts of the stage, each source once, as they are asked for."""
    for source in config.data.sources:
        for row, unusable in open_source(source_spec(source, context.recipe_dir), "text").rows():
            if unusable is None and isinstance(row, TextRow):
                yield row.text


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


def conversion(tokenizer: Any, data: Data) -> Conversion[Row]:
    """How this stage makes tokens of texts; where rows are wrapped, a document may have any length."""
    limit = None if data.packing in (None, "wrap") else data.max_length
    cut = data.long_rows == "truncate"
    decides = {"tokenizer": tokenizer_digest(tokenizer), "limit": limit, "cut": None if limit is None else cut}
    return Conversion("text", lambda rows: _tokenise(rows, tokenizer, limit, cut), stored_row, decides, False)


def _tokenise(rows: list[Any], tokenizer: Any, limit: int | None, cut: bool) -> Iterator[Tokenised | Refused]:
    """Tokens of each document and its end of sequence; control tokens that a text spells stay text."""
    backend, before = tokenizer.backend_tokenizer, tokenizer.backend_tokenizer.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        encoded = backend.encode_batch_fast([row.text for row in rows])
    finally:
        backend.encode_special_tokens = before
    end = tokenizer.eos_token_id
    for ids in (one.ids for one in encoded):
        if not ids or ids[-1] != end:
            ids.append(end)
        length = len(ids)
        if limit is not None and length > limit and not cut:
            yield Refused("longer than max_length", length)
            continue
        ids = ids[:limit]
        supervised = len(ids) - 1  # the first token of a row is never predicted
        yield Tokenised(ids, (1, len(ids)) if supervised else (), supervised, length - len(ids))


def _untrained(prepared: Prepared[Row], vocabulary: int) -> list[int]:
    """Vocabulary ids that stand in no row: their embeddings are as they were initialised."""
    seen = np.zeros(vocabulary, dtype=bool)
    for rows in prepared.rows:
        seen |= rows.store.seen(vocabulary)
    return [int(token) for token in np.flatnonzero(~seen)]
