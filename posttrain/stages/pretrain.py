"""`pretrain`: a base model from scratch, or a checkpoint continued, on plain text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from posttrain.artifact import publish_folder
from posttrain.chat.tokenizer import load_tokenizer
from posttrain.data.read import open_source
from posttrain.data.rows import TextRow
from posttrain.errors import CheckpointError, RecipeError
from posttrain.models.files import read_json
from posttrain.models.lineage import Lineage, Link, lineage_of
from posttrain.models.load import load_base, untrained_rows
from posttrain.models.save import save_full, verify_saved_model
from posttrain.models.tokenizer_swap import Swap, plan_swap, swap_tokenizer, vocabulary_of
from posttrain.pretraining.init import init_model
from posttrain.pretraining.rows import Row
from posttrain.pretraining.sharded import shard
from posttrain.pretraining.tokenizer import train_tokenizer
from posttrain.pretraining.world import in_turn, wait
from posttrain.recipe.schema import Pretrain, TokenizerTraining
from posttrain.stages.context import Context, Summary
from posttrain.stages.fitting import fit_sft
from posttrain.stages.outputs import model_files, write_ledger
from posttrain.stages.parents import model_folder
from posttrain.stages.prepare import Prepared, prepare
from posttrain.stages.run_loop import run_loop, training_metrics
from posttrain.stages.schedule import schedule_rows, schedule_wrapped
from posttrain.stages.setup import Machine, assert_trainable, set_up
from posttrain.stages.sources import source_spec
from posttrain.stages.text_rows import conversion


def run(config: Pretrain, context: Context) -> Summary:
    """Trains on documents packed into rows of `max_length` tokens, isolated from one another."""
    context.clock.enter("data")
    machine = set_up(context)
    wrapped = config.data.packing in (None, "wrap")
    with in_turn("data", context.rank):
        tokenizer = _tokenizer(config, context)
        prepared = prepare(config.data, context, conversion(tokenizer, config.data))
    if wrapped:
        schedule = schedule_wrapped(prepared, context.trainer, context.seed, config.data.max_length)
    else:
        schedule = schedule_rows(prepared, context.trainer, context.seed)
    if context.rank.first:
        write_ledger(context.folder, prepared.ledger)
    context.clock.enter("loading")
    model, swap = _model(config, context, machine, tokenizer)
    _check_lengths(model, config.data.max_length, context.stage)
    if machine.spread == "fsdp":
        shard(model, machine.device)
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

    def save(folder: Path) -> dict[str, int]:
        digests = save_full(model, folder, machine.dtype)
        if context.rank.first:
            tokenizer.save_pretrained(folder)
        return digests

    result = run_loop(fitted.trainer, machine, context, prepared, schedule, make_step, config.snapshots, save)
    context.events("phase", text="saving")
    context.clock.enter("saving")
    digests = save(context.folder)
    if context.rank.first:
        verify_saved_model(model, context.folder, digests)
    wait()
    figures = _rows_without_training(prepared, tokenizer, model, swap) if config.model is None or swap else {}
    return Summary(
        headline=f"{total / 1e6:.2f} M parameters, {result.steps} steps, loss {result.last_loss:.3f}",
        files=model_files(context.folder),
        metrics=training_metrics(result, trained, total, {**figures, **fitted.metrics()}),
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
    if config.tokenizer is not None:
        return load_tokenizer(model_folder(context.inputs["tokenizer"], weights=False))
    return load_tokenizer(model_folder(context.inputs["model"]))


def prepare_texts(config: Pretrain, context: Context) -> Iterator[str]:
    """All usable texts of the stage, each source once, as they are asked for."""
    for source in config.data.sources:
        for row, unusable in open_source(source_spec(source, context.recipe_dir), "text").rows():
            if unusable is None and isinstance(row, TextRow):
                yield row.text


def _model(config: Pretrain, context: Context, machine: Machine, tokenizer: Any) -> tuple[PreTrainedModel, Swap | None]:
    """The model that is about to train, in fp32, and how its tokenizer was swapped where it was."""
    if config.init is not None:
        model = init_model(config.init.model_dump(exclude_none=True), tokenizer, context.seed)
        model.set_attn_implementation(machine.attn_implementation)
        return model.to(machine.loading), None
    lineage = lineage_of(model_folder(context.inputs["model"]), context.inputs["model"].ref)
    if lineage.adapters:
        raise RecipeError(f"stages.{context.stage}.model", "is an adapter", "merge it first")
    folder = lineage.base.folder
    if (quantised := read_json(folder / "config.json").get("quantization_config")) is not None:
        found = f"its weights are quantised ({quantised.get('quant_method')}), and every weight is trained"
        raise CheckpointError(str(folder / "config.json"), found, "give the checkpoint before it was quantised")
    set_seed(context.seed)
    model = load_base(folder, torch.float32, machine.loading, machine.attn_implementation)
    if config.tokenizer is None:
        return model, None
    old, new = vocabulary_of(load_tokenizer(folder)), vocabulary_of(tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    swap = plan_swap(old, new, rows, f"stages.{context.stage}.tokenizer")
    swap_tokenizer(model, swap, new)
    context.events("note", text=f"tokenizer: {swap.told()}")
    return model, swap


def _check_lengths(model: PreTrainedModel, max_length: int, stage: str) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and max_length > limit:
        found = f"{max_length}, but the model has {limit} positions"
        raise RecipeError(f"stages.{stage}.data.max_length", found, f"set at most {limit}")


def _rows_without_training(
    prepared: Prepared[Row], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, swap: Swap | None
) -> dict[str, Any]:
    """Ids whose rows no training ever moved, and what a tokenizer swap came to.

    Of a swap these are the new rows that stand in none of the rows trained on, and control tokens copied from rows that
    were untrained before.
    """
    counts = [rows.store.occurrences(model.get_input_embeddings().weight.shape[0]) for rows in prepared.rows]
    unseen = np.sum(counts, axis=0) == 0
    if swap is None:
        return {"untrained_token_ids": np.flatnonzero(unseen[: len(tokenizer)]).tolist()}
    control = [token for token in tokenizer.added_tokens_decoder if unseen[token] and not swap.new[token]]
    untrained = {*np.flatnonzero(unseen & swap.new).tolist(), *(untrained_rows(model, control) if control else ())}
    times = [share.wanted / share.available if share.available else 0.0 for share in prepared.shares]
    epoch = np.sum([count * weight for count, weight in zip(counts, times, strict=True)], axis=0)
    figures = {**swap.figures(), "share_of_new_tokens": round(float(epoch[swap.new].sum() / max(epoch.sum(), 1)), 6)}
    return {"untrained_token_ids": sorted(untrained), "tokenizer_swap": figures}
