"""`sft`: supervised fine-tuning on conversations, full or by adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.chat.contract import probe_ids, verify_saved
from posttrain.errors import ChatError
from posttrain.models.lineage import lineage_of
from posttrain.models.save import save_adapter, save_full, verify_saved_adapter, verify_saved_model
from posttrain.pretraining.ranks import ALONE, Rank
from posttrain.pretraining.rows import Row
from posttrain.pretraining.world import in_turn, wait
from posttrain.recipe.schema import Sft
from posttrain.stages.chat_rows import conversion
from posttrain.stages.context import Context, Summary
from posttrain.stages.conversation import Chat, open_chat, save_chat, settle
from posttrain.stages.fitting import fit_sft
from posttrain.stages.outputs import model_files, write_ledger, write_probes
from posttrain.stages.parents import model_folder, resolve_method
from posttrain.stages.prepare import Prepared, prepare
from posttrain.stages.run_loop import run_loop, training_metrics
from posttrain.stages.schedule import schedule_rows, schedule_wrapped
from posttrain.stages.setup import Machine, assert_trainable, set_up
from posttrain.stages.trainable import Policy, load_trainable

_STOPPED = 0.99
"""Share of trained rows whose last trained token must be the end of turn."""


def run(config: Sft, context: Context) -> Summary:
    """Trains on assistant turns and their end-of-turn token, and proves the saved folder."""
    context.clock.enter("data")
    machine = set_up(context)
    given = context.inputs["model"]
    limit, wrapped = config.data.max_length, config.data.packing == "wrap"
    with in_turn("data", context.rank):
        parents = lineage_of(model_folder(given), given.ref)
        method = resolve_method(config.method, parents, context.stage)
        chat = open_chat(parents, config.chat_template, context)
        prepared = prepare(config.data, context, conversion(chat, config.data))
    share = _check_stops(prepared, chat, limit, context.stage)
    if wrapped:
        schedule = schedule_wrapped(prepared, context.trainer, context.seed, limit)
    else:
        schedule = schedule_rows(prepared, context.trainer, context.seed)
    if context.rank.first:
        write_ledger(context.folder, prepared.ledger)
    context.events("phase", text="loading the model")
    context.clock.enter("loading")
    policy = load_trainable(parents, method, machine, context, chat.control_ids, chat.tokenizer.get_vocab())
    settle(chat, policy.model, context)
    trained, total = assert_trainable(policy.model, context.stage)
    fitted, make_step = fit_sft(
        policy.model,
        policy.quantization,
        chat.tokenizer,
        machine,
        context,
        schedule.steps,
        schedule.rows_of,
        (lambda _: schedule.rows_of(0)) if wrapped else prepared.longest,
    )
    result = run_loop(
        fitted.trainer,
        machine,
        context,
        prepared,
        schedule,
        make_step,
        config.snapshots,
        lambda folder: save_policy(policy, chat, machine, folder, context.rank),
    )
    context.events("phase", text="saving")
    context.clock.enter("saving")
    digests = save_policy(policy, chat, machine, context.folder, context.rank)
    if context.rank.first:
        prove_saved(policy, chat, context.folder, last_trained_ids(prepared), digests)
        write_probes(context.folder, prepared, lambda row: (row.ids, row.labels))
    wait()
    figures = {"rows_that_stop": share, "token_rows": policy.token_rows, "chat": chat.as_dict()}
    return Summary(
        headline=f"{policy.kind}: {result.steps} steps, loss {result.first_loss:.3f} -> {result.last_loss:.3f}",
        files=model_files(context.folder),
        metrics=training_metrics(result, trained, total, figures | fitted.metrics()),
        lineage=policy.lineage_after(context),
        ledger=prepared.ledger.as_dict(),
    )


def last_trained_ids(prepared: Prepared[Any]) -> set[int]:
    """Ids of the last token with loss of every row (of a pair: its better answer): what the model learns to end on."""
    return {int(token) for ids in prepared.last_ids for token in np.unique(ids)}


def _check_stops(prepared: Prepared[Row], chat: Chat, limit: int, stage: str) -> float:
    """Returns the share of uncut rows that end in the end-of-turn token; a model that never sees it never stops.

    Raises:
        ChatError: less than 99 % of them do.
    """
    whole = stop = 0
    for rows, ids in zip(prepared.rows, prepared.last_ids, strict=True):
        uncut = rows.lengths < limit
        whole += int(uncut.sum())
        stop += int((ids[uncut] == chat.end.id).sum())
    share = stop / whole if whole else 1.0
    if share < _STOPPED:
        found = f"only {share:.1%} of the rows end in {chat.end.text!r}"
        raise ChatError(f"stages.{stage}.data", found, "end conversations with an assistant turn")
    return round(share, 6)


def save_policy(policy: Policy, chat: Chat, machine: Machine, folder: Path, rank: Rank = ALONE) -> dict[str, int]:
    """Saves what was trained (whole model or adapter) with its tokenizer, template and generation config.

    Every process calls it; the first one writes.

    Returns:
        Digests of the tensors that were written, for `prove_saved`; empty on the other processes.
    """
    if policy.is_adapter:
        digests = save_adapter(policy.model, folder)  # type: ignore[arg-type]
    else:
        digests = save_full(policy.model, folder, machine.dtype)  # type: ignore[arg-type]
    if rank.first:
        save_chat(chat, policy.model, folder)
    return digests


def prove_saved(policy: Policy, chat: Chat, folder: Path, last_ids: set[int], digests: Mapping[str, int]) -> None:
    """Reads the saved folder back: weights whole and finite, chat contract kept, end of turn among what was trained.

    Args:
        last_ids: last trained ids of all rows.
        digests: as `save_policy` returned them.
    """
    if policy.is_adapter:
        verify_saved_adapter(folder, digests)
    else:
        verify_saved_model(policy.model, folder, digests)  # type: ignore[arg-type]
    verify_saved(folder, chat.template.digest, last_ids, probe_ids(chat.tokenizer, chat.template))
