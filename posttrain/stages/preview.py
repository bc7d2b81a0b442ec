"""The first rows of a training stage, as it would read them: the same tokenizer, template, rows and order."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from posttrain.artifact import Artifact
from posttrain.chat.encode import encoder_of
from posttrain.models.hub import HubId, fetch_description
from posttrain.models.lineage import lineage_of
from posttrain.pretraining.rows import IGNORE, Row
from posttrain.recipe.schema import AnyStage, Dpo, Sft
from posttrain.report.token_view import ShownPart, ShownRow, ShownStage, show_tokens
from posttrain.stages import dpo, sft
from posttrain.stages.__main__ import Stop, context_of
from posttrain.stages.context import Context, Events, Job
from posttrain.stages.conversation import Chat, open_chat
from posttrain.stages.prepare import Prepared, Tokenised, prepare, schedule_rows
from posttrain.training.pairs import Pair

SHOWN_KINDS = ("sft", "dpo")


def preview(job: Job, jobs: Mapping[str, Job], count: int) -> ShownStage:
    """Prepares the data of an `sft` or `dpo` stage and shows the first `count` rows of its first steps.

    All of its data is rendered, since the order depends on what is dropped. Nothing is written.

    Args:
        jobs: all stages of the recipe by name: a model that is still to be made has the tokenizer of the
            model it will be made from.

    Raises:
        UserError: what the stage itself would refuse.
    """
    given, trained_template = _nearest_model(job, jobs)
    if given["folder"] is None:
        return ShownStage(job.stage, f"no rows yet: {given['missing']}")
    context = context_of(replace(job, inputs={"model": given}), Path(job.run_dir), Events(None), Stop())
    config: Any = TypeAdapter(AnyStage).validate_json(json.dumps(job.config))
    chosen = trained_template or job.config.get("chat_template")
    chat = open_chat(lineage_of(Path(given["folder"]), given["ref"]), chosen, context)
    shown = _sft_rows(config, chat, context) if job.kind == "sft" else _dpo_rows(config, chat, context)
    rows = tuple(islice(shown, count))
    return ShownStage(job.stage, f"the first {len(rows)} rows of training (template {chat.template.name})", rows)


def _nearest_model(job: Job, jobs: Mapping[str, Job]) -> tuple[dict[str, Any], str | None]:
    """The first model below a stage that exists, and the template that stages in between will train with.

    Where there is no tokenizer to be had the model's folder is None, and `missing` says why.
    """
    given, template = job.inputs["model"], None
    while given["ref"].startswith("@") and Artifact.read(Path(given["folder"])) is None:
        above = jobs[given["ref"][1:]]
        if above.kind in SHOWN_KINDS:
            template = above.config.get("chat_template") or template
        if isinstance(above.config.get("tokenizer"), dict):
            return {"folder": None, "missing": f"its tokenizer is trained by {above.stage}, which has not run"}, None
        given = above.inputs.get("tokenizer") or above.inputs["model"]
    if given["folder"] is None:
        hub = HubId(given["ref"].partition("@")[0], given["revision"])
        folder = fetch_description(hub)
        given = {**given, "folder": str(folder) if folder else None, "missing": f"{hub} cannot be fetched"}
    return given, template


def _sft_rows(config: Sft, chat: Chat, context: Context) -> Iterator[ShownRow]:
    kept: list[list[Tokenised[Row]]] = []
    prepared = prepare(
        config.data, context, "chat", lambda rows: _remember(sft.tokenise(rows, chat, config.data), kept), sft.prompt_of
    )
    for source, number in schedule_rows(prepared, context.trainer, context.seed).order.items.tolist():
        row, one = prepared.rows[source][number], kept[source][prepared.usable[source][number]]
        parts = (_part("", row.ids, row.labels != IGNORE, chat),)
        split = f", row {one.part[0]} of {one.part[1]} that it was split into" if one.part[1] > 1 else ""
        yield ShownRow(_place(prepared, source, number) + split, parts, one.truncated)


def _dpo_rows(config: Dpo, chat: Chat, context: Context) -> Iterator[ShownRow]:
    kept: list[list[Tokenised[Pair]]] = []
    prepared = prepare(
        config.data, context, "pair", lambda rows: _remember(dpo.tokenise(rows, chat, config.data), kept), dpo.prompt_of
    )
    for source, number in schedule_rows(prepared, context.trainer, context.seed).order.items.tolist():
        pair, one = prepared.rows[source][number], kept[source][prepared.usable[source][number]]
        answers = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
        parts = [_part(name, ids, np.full(len(ids), name != "prompt"), chat) for name, ids in answers.items()]
        yield ShownRow(_place(prepared, source, number), tuple(parts), one.truncated)


def _remember(results: Iterable[Any], kept: list[list[Tokenised[Any]]]) -> Iterator[Any]:
    """Passes on the results of one source, and keeps those that become rows: `prepare` keeps their tokens alone."""
    kept.append([])
    for result in results:
        if isinstance(result, Tokenised):
            kept[-1].append(result)
        yield result


def _part(name: str, ids: np.ndarray, trained: np.ndarray, chat: Chat) -> ShownPart:
    encoder = encoder_of(chat.tokenizer)
    return ShownPart(name, show_tokens(ids.tolist(), trained.tolist(), encoder.decode, encoder.added))


def _place(prepared: Prepared[Any], source: int, number: int) -> str:
    file, row = prepared.places[source][number].tolist()
    return f"{prepared.files[file]}:{row}"
