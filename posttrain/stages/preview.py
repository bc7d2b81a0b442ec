"""The first rows of a training stage, as it would read them: the same tokenizer, template, rows and order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from posttrain.chat.encode import encoder_of
from posttrain.models.hub import fetch_description
from posttrain.models.lineage import lineage_of
from posttrain.pretraining.rows import IGNORE, Row
from posttrain.recipe.schema import AnyStage, Data
from posttrain.report.token_view import ShownPart, ShownRow, ShownStage, show_tokens
from posttrain.stages import chat_rows, pair_rows
from posttrain.stages.__main__ import Stop, context_of
from posttrain.stages.context import Context, Events, Job
from posttrain.stages.conversation import Chat, open_chat
from posttrain.stages.nearest import nearest_model
from posttrain.stages.prepare import Conversion, Prepared, prepare
from posttrain.stages.schedule import schedule_rows
from posttrain.training.pairs import Pair

SHOWN_KINDS = ("sft", "dpo")


def preview(job: Job, jobs: Mapping[str, Job], count: int) -> ShownStage:
    """Prepares the data of an `sft` or `dpo` stage and shows the first `count` rows of its first steps.

    All of its data is rendered, since the order depends on what is dropped. Nothing is written to stay.

    Args:
        jobs: all stages of the recipe by name: a model that is still to be made has the tokenizer of the
            model it will be made from.

    Raises:
        UserError: what the stage itself would refuse.
    """
    given, trained_template = nearest_model(job, jobs, fetch_description)
    if given["folder"] is None:
        return ShownStage(job.stage, f"no rows yet: {given['missing']}")
    context = context_of(replace(job, inputs={"model": given}), Path(job.run_dir), Events(None), Stop())
    config: Any = TypeAdapter(AnyStage).validate_json(json.dumps(job.config))
    chosen = trained_template or job.config.get("chat_template")
    chat = open_chat(lineage_of(Path(given["folder"]), given["ref"]), chosen, context)
    module, parts = (chat_rows, _sft_parts) if job.kind == "sft" else (pair_rows, _dpo_parts)
    conversion = module.conversion(chat, config.data)
    with TemporaryDirectory(prefix="posttrain-") as apart:  # instead of the run folder, where rows are kept
        elsewhere = replace(context, run_dir=Path(apart))
        shown = _shown_rows(config.data, conversion, elsewhere, lambda row: parts(row, chat))
        rows = tuple(islice(shown, count))
    return ShownStage(job.stage, f"the first {len(rows)} rows of training (template {chat.template.name})", rows)


def _shown_rows(
    data: Data, conversion: Conversion[Any], context: Context, parts: Callable[[Any], tuple[ShownPart, ...]]
) -> Iterator[ShownRow]:
    prepared = prepare(data, context, conversion)
    for source, number in schedule_rows(prepared, context.trainer, context.seed).order.items.tolist():
        rows = prepared.rows[source]
        at, of = rows.store.columns["parts"][rows.chosen[number]].tolist()
        split = f", row {at} of {of} that it was split into" if of > 1 else ""
        truncated = int(rows.store.columns["counts"][rows.chosen[number], 1])
        yield ShownRow(_place(prepared, source, number) + split, parts(rows[number]), truncated)


def _sft_parts(row: Row, chat: Chat) -> tuple[ShownPart, ...]:
    return (_part("", row.ids, row.labels != IGNORE, chat),)


def _dpo_parts(pair: Pair, chat: Chat) -> tuple[ShownPart, ...]:
    answers = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    return tuple(_part(name, ids, np.full(len(ids), name != "prompt"), chat) for name, ids in answers.items())


def _part(name: str, ids: np.ndarray, trained: np.ndarray, chat: Chat) -> ShownPart:
    encoder = encoder_of(chat.tokenizer)
    return ShownPart(name, show_tokens(ids.tolist(), trained.tolist(), encoder.decode, encoder.added))


def _place(prepared: Prepared[Any], source: int, number: int) -> str:
    file, row = prepared.places[source][number].tolist()
    return f"{prepared.files[file]}:{row}"
