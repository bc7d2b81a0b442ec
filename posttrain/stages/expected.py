"""The rows of a training stage before it runs: from the run's store of tokenised rows, else from samples.

No torch; a tokenizer is loaded only where there is one to be had without a download.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from posttrain.chat.tokenizer import load_tokenizer
from posttrain.data.held_out import held_out_count
from posttrain.data.ledger import Ledger
from posttrain.data.shapes import Want
from posttrain.models.lineage import lineage_of
from posttrain.pretraining.mixture import Share
from posttrain.pretraining.store import Store, open_store
from posttrain.recipe.schema import AnyStage, Data
from posttrain.stages import chat_rows, pair_rows, text_rows
from posttrain.stages.__main__ import Stop, context_of
from posttrain.stages.context import Context, Events, Job
from posttrain.stages.conversation import open_chat
from posttrain.stages.conversion import Conversion, Refused
from posttrain.stages.prepare import prepare, source_label
from posttrain.stages.rows_cache import store_folder
from posttrain.stages.samples import Sample, Samples
from posttrain.stages.schedule import schedule_wrapped

_EXACT = 200_000
"""Rows up to which the stage's own way to its ledger is gone, which reads every prompt for those held out."""
_COMPARED = 2048
"""Pairs of a store whose two answers are compared."""


_ONE_EPOCH = {"global_batch_size": 1, "num_train_epochs": 1}


@dataclass(frozen=True)
class Expected:
    """What one epoch of a stage's rows will be."""

    ledger: dict[str, Any]
    """As the stage's record will have it; scaled up from a sample where not `exact`."""
    source: str
    """`store`, or `sample` as soon as one of its sources is in no store."""
    exact: bool
    sampled: int | None
    """Rows that were tokenised for this."""
    longest: int
    """Tokens of the longest sequence that was seen."""
    pairs: tuple[int, int] | None
    """Tokens of an epoch with both sequences of each pair whole, and how many of them are a shared prefix."""


@dataclass(frozen=True)
class _Part:
    """What is known of one source."""

    name: str
    table: np.ndarray
    """[rows, 6] int64 of rows that can be trained on: tokens (a prompt once), with loss, cut off; of a pair both
    sequences whole, their shared prefix, the longer sequence."""
    unusable: Counter[str]
    refused: Counter[str]
    refused_tokens: Counter[str]
    split: int
    made: int
    times: float
    """Rows of the source for each that was tokenised."""


def expected_rows(job: Job, given: dict[str, Any], template: str | None, samples: Samples) -> Expected | None:
    """Finds out what a training stage's rows will be; None where a source can only be read by the stage.

    Args:
        given: the model whose tokenizer and template are taken, with its folder; see `nearest_model`.
        template: the template that stages before it will train with.

    Raises:
        UserError: what the stage itself would refuse.
    """
    context = context_of(replace(job, inputs={"model": given}), Path(job.run_dir), Events(None), Stop())
    config: Any = TypeAdapter(AnyStage).validate_json(json.dumps(job.config))
    conversion, data = _conversion(job, config, given, template, context, samples), config.data
    found: list[Store | Sample] = []
    for number, source in enumerate(data.sources):
        store = open_store(store_folder(number, source, context, conversion))
        sample = samples.of(job.kind, source, context.recipe_dir) if store is None else None
        if store is None and sample is None:
            return None
        found.append(store if store is not None else sample)  # type: ignore[arg-type]
    whole = all(isinstance(one, Store) or one.is_whole for one in found)
    if whole and sum(len(one) if isinstance(one, Store) else one.usable for one in found) <= _EXACT:
        return _as_the_stage(data, context, conversion, found)
    names = [source_label(source, number, data.sources) for number, source in enumerate(data.sources)]
    parts = [
        _of_store(name, one, conversion.want) if isinstance(one, Store) else _of_sample(name, one, conversion)
        for name, one in zip(names, found, strict=True)
    ]
    ledger = _scaled(parts, data, conversion.holds_out).as_dict()
    return _expected(ledger, [part.table for part in parts], found, conversion, exact=False)


def _conversion(
    job: Job, config: Any, given: dict[str, Any], template: str | None, context: Context, samples: Samples
) -> Conversion[Any]:
    folder = Path(given["folder"])
    if job.kind == "pretrain":
        return text_rows.conversion(load_tokenizer(folder), config.data)
    key = (str(folder), template or config.chat_template)
    if key not in samples.chats:
        samples.chats[key] = open_chat(lineage_of(folder, given["ref"]), key[1], context)
    return (chat_rows if job.kind == "sft" else pair_rows).conversion(samples.chats[key], config.data)


def _as_the_stage(data: Data, context: Context, conversion: Conversion[Any], found: list[Store | Sample]) -> Expected:
    """Goes the stage's own way in a folder apart, with the stores that are there."""
    with TemporaryDirectory(prefix="posttrain-") as apart:
        elsewhere = replace(context, run_dir=Path(apart))
        for number, (source, one) in enumerate(zip(data.sources, found, strict=True)):
            if isinstance(one, Store):
                link = store_folder(number, source, elsewhere, conversion)
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(one.folder.absolute())
        prepared = prepare(data, elsewhere, conversion)
        if data.packing == "wrap" or (data.packing is None and conversion.want == "text"):
            schedule_wrapped(prepared, _ONE_EPOCH, context.seed, data.max_length)  # it counts where rows are cut
        tables = [_table_of(rows.store, conversion.want)[rows.chosen] for rows in prepared.rows]
        return _expected(prepared.ledger.as_dict(), tables, found, conversion, exact=True)


def _expected(
    ledger: dict[str, Any],
    tables: list[np.ndarray],
    found: list[Store | Sample],
    conversion: Conversion[Any],
    exact: bool,
) -> Expected:
    whole = shared = 0.0
    for table, source in zip(tables, ledger["sources"].values(), strict=True):
        if len(table):
            whole += source["rows_seen"] * table[:, 3].sum() / len(table)
            shared += source["rows_seen"] * table[:, 4].sum() / len(table)
    samples = [one for one in found if isinstance(one, Sample)]
    return Expected(
        ledger,
        "sample" if samples else "store",
        exact,
        sum(len(sample.rows) for sample in samples) if samples else None,
        max((int(table[:, 5].max()) for table in tables if len(table)), default=0),
        (round(whole), round(shared)) if conversion.want == "pair" else None,
    )


def _of_store(name: str, store: Store, want: Want) -> _Part:
    about = store.about
    return _Part(
        name,
        _table_of(store, want),
        Counter(about["unusable"]),
        Counter(about["refused"]),
        Counter(about["refused_tokens"]),
        about["split"],
        about["made"],
        1.0,
    )


def _table_of(store: Store, want: Want) -> np.ndarray:
    """The columns of `_Part.table`; of many pairs, the common start of the answers is that of some, on average."""
    lengths, counts = store.lengths, store.columns["counts"].astype(np.int64)
    plain = [lengths, counts[:, 0], counts[:, 1]]
    if want != "pair":
        return np.stack([*plain, lengths, np.zeros_like(lengths), lengths], axis=1)
    ends = store.columns["ends"]
    begins = np.concatenate([np.zeros((1, 2), dtype=ends.dtype), ends[:-1]]) if len(ends) else ends
    prompt = store.columns["cuts"][begins[:, 1]] - begins[:, 0]
    better = store.columns["cuts"][begins[:, 1] + 1] - begins[:, 0] - prompt
    worse = lengths - prompt - better
    few = np.sort(np.random.default_rng(0).permutation(len(store))[:_COMPARED])
    compared = np.array([pair_rows.stored_pair(*store.tokens(int(row))).shared for row in few], dtype=np.int64)
    beyond = compared - prompt[few]
    shared = prompt + (round(float(beyond.mean())) if len(few) else 0)
    shared[few] = compared
    return np.stack([*plain, lengths + prompt, shared, prompt + np.maximum(better, worse)], axis=1)


def _of_sample(name: str, sample: Sample, conversion: Conversion[Any]) -> _Part:
    """Tokenises a sample as the stage does."""
    table, refused, refused_tokens = [], Counter[str](), Counter[str]()
    split = made = 0
    for result in conversion.convert(sample.rows) if sample.rows else ():
        number, of = result.part
        if number == 1 and of > 1:
            split, made = split + 1, made + of
        if isinstance(result, Refused):
            refused[result.reason] += 1
            refused_tokens[result.reason] += result.tokens
            continue
        tokens = len(result.ids)
        whole, shared, longest = tokens, 0, tokens
        if conversion.want == "pair":
            pair = conversion.make(np.asarray(result.ids), np.asarray(result.cuts))
            whole, shared, longest = pair.tokens, pair.shared, pair.longest
        table.append((tokens, result.supervised, result.truncated, whole, shared, longest))
    times = sample.usable / len(sample.rows) if sample.rows else 0.0
    found = np.array(table, dtype=np.int64).reshape(-1, 6)
    return _Part(name, found, sample.unusable, refused, refused_tokens, split, made, times)


def _scaled(parts: list[_Part], data: Data, holds_out: bool) -> Ledger:
    """The ledger that sources of which only some rows were tokenised will about have."""
    ledger = Ledger()
    total = sum(part.times * len(part.table) for part in parts)
    held_out = held_out_count(data.held_out, round(total)) if holds_out else 0
    for part, source in zip(parts, data.sources, strict=True):
        usable = round(part.times * len(part.table))
        held = round(held_out * usable / total) if total else 0
        share = Share(usable - held, 1.0 if source.weight is None else source.weight, source.rows)
        seen = share.wanted if share.available else 0
        trained = min(seen, share.available)
        rows_in = usable + part.unusable.total() + round(part.times * (part.refused.total() + part.split - part.made))
        means = part.table[:, :3].mean(axis=0) if len(part.table) else np.zeros(3)
        tokens, supervised, truncated = (float(mean) for mean in means)
        whole = tokens + truncated
        lost = sum(part.refused_tokens.values())
        ledger.enter(part.name, rows_in, round(usable * whole + part.times * lost))
        if part.split:
            ledger.split(part.name, round(part.times * part.made), round(part.times * part.split))
        for reason, rows in part.unusable.items():
            ledger.drop(part.name, reason, rows)
        for reason, rows in part.refused.items():
            ledger.drop(part.name, reason, round(part.times * rows), round(part.times * part.refused_tokens[reason]))
        ledger.hold_out(part.name, held, round(held * whole))
        left = share.available - trained
        ledger.leave_out(part.name, left, round(left * whole))
        loss = round(trained * supervised)
        ledger.train(part.name, loss, round(trained * tokens) - loss, round(trained * truncated), trained)
        ledger.see(part.name, seen)
    return ledger
