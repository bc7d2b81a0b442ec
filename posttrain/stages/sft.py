"""`sft`: supervised fine-tuning on conversations, full or by adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from posttrain.chat.contract import probe_ids, verify_saved
from posttrain.chat.render import Rendered, render_conversations
from posttrain.chat.system import fold_system
from posttrain.data.rows import ChatRow, Message
from posttrain.errors import ChatError
from posttrain.models.attention import check_isolation
from posttrain.models.lineage import lineage_of
from posttrain.models.save import save_adapter, save_full, verify_saved_adapter, verify_saved_model
from posttrain.pretraining.rows import IGNORE, Row, make_row
from posttrain.recipe.schema import Data, Sft
from posttrain.stages.context import Context, Summary
from posttrain.stages.conversation import Chat, open_chat, save_chat, settle
from posttrain.stages.outputs import model_files, write_ledger, write_probes
from posttrain.stages.parents import resolve_method
from posttrain.stages.prepare import Prepared, Refused, Tokenised, prepare, schedule_rows, schedule_wrapped
from posttrain.stages.run_loop import run_loop, stage_arguments, training_metrics
from posttrain.stages.setup import Machine, assert_trainable, model_folder, set_up
from posttrain.stages.trainable import Policy, load_trainable
from posttrain.training.limits import piece_limits
from posttrain.training.sft import build_sft_trainer, sft_step

_STOPPED = 0.99
"""Share of trained rows whose last trained token must be the end of turn."""


def run(config: Sft, context: Context) -> Summary:
    """Trains on assistant turns and their end-of-turn token, and proves the saved folder."""
    machine = set_up(context)
    given = context.inputs["model"]
    parents = lineage_of(model_folder(given), given.ref)
    method = resolve_method(config.method, parents, context.stage)
    chat = open_chat(parents, config.chat_template, context)
    limit = config.data.max_length
    prepared = prepare(config.data, context, "chat", lambda rows: tokenise(rows, chat, config.data), prompt_of)
    share = _check_stops(prepared, chat, limit, context.stage)
    if config.data.packing == "wrap":
        schedule = schedule_wrapped(prepared, context.trainer, context.seed, limit)
    else:
        schedule = schedule_rows(prepared, context.trainer, context.seed)
    write_ledger(context.folder, prepared.ledger)
    context.events("phase", text="loading the model")
    policy = load_trainable(parents, method, machine, context, chat.control_ids, chat.tokenizer.get_vocab())
    settle(chat, policy.model, context)
    trained, total = assert_trainable(policy.model, context.stage)
    check_isolation(policy.model, len(chat.tokenizer))
    trainer = build_sft_trainer(policy.model, chat.tokenizer, stage_arguments(context, machine, schedule.steps))
    limits = piece_limits(machine.device, context.runtime.micro_batch_tokens, context.runtime.micro_batch_size)
    pad = chat.tokenizer.pad_token_id
    result = run_loop(
        trainer,
        context,
        prepared,
        schedule,
        lambda step: sft_step(schedule.rows_of(step), pad, limits.row_tokens, limits.tokens, limits.documents),
        config.snapshots,
        lambda folder: save_policy(policy, chat, machine, folder),
    )
    context.events("phase", text="saving")
    save_policy(policy, chat, machine, context.folder)
    prove_saved(policy, chat, context.folder, last_trained_ids(prepared.rows))
    write_probes(context.folder, prepared, lambda row: (row.ids, row.labels))
    return Summary(
        headline=f"{policy.kind}: {result.steps} steps, loss {result.first_loss:.3f} -> {result.last_loss:.3f}",
        files=model_files(context.folder),
        metrics=training_metrics(
            result,
            trained,
            total,
            {"rows_that_stop": share, "token_rows": policy.token_rows, "chat": chat.as_dict()},
        ),
        lineage=policy.lineage_after(context),
        ledger=prepared.ledger.as_dict(),
    )


def tokenise(rows: list[ChatRow], chat: Chat, data: Data) -> Iterator[Tokenised[Row] | Refused]:
    """Renders conversations; what is longer than `max_length` is cut at its end, or refused.

    With `history: split`, a conversation whose template rewrites history gives one result per answer.

    Raises:
        ChatError: naming file and row of a conversation that the template cannot take.
    """
    fold, split = data.system == "fold", data.history == "split"
    conversations = ((_messages(row, fold), row.tools) for row in rows)
    rendered = render_conversations(chat.tokenizer, chat.template, conversations, split)
    for row, made in zip(rows, rendered, strict=True):
        if isinstance(made, ChatError):
            raise ChatError(str(row.origin), f"{made.where}: {made.found}", made.todo)
        for number, one in enumerate(made, start=1):
            yield _fit(one, data, (number, len(made)))


def _messages(row: ChatRow, fold: bool) -> list[Message]:
    if not fold:
        return row.messages
    try:
        return fold_system(row.messages)
    except ChatError as error:
        raise ChatError(str(row.origin), f"{error.where}: {error.found}", error.todo) from None


def _fit(rendered: Rendered, data: Data, part: tuple[int, int]) -> Tokenised[Row] | Refused:
    length = len(rendered.input_ids)
    if length > data.max_length and data.long_rows == "drop":
        return Refused("longer than max_length", length, part)
    made = make_row(rendered.input_ids[: data.max_length], rendered.labels[: data.max_length])
    if not made.supervised:
        return Refused("no trained token within max_length", length, part)
    return Tokenised(made, made.supervised, len(made) - made.supervised, length - len(made), part)


def prompt_of(row: Row) -> bytes:
    """What stands before the first token with loss: rows of one prompt are held out together."""
    return row.ids[: int(np.argmax(row.labels != IGNORE))].tobytes()


def last_trained_ids(rows: list[list[Row]]) -> set[int]:
    """Ids of the last token with loss of every row: what the model learns to end on."""
    return {int(row.labels[row.labels != IGNORE][-1]) for source in rows for row in source}


def _check_stops(prepared: Prepared[Row], chat: Chat, limit: int, stage: str) -> float:
    """Returns the share of uncut rows that end in the end-of-turn token; a model that never sees it never stops.

    Raises:
        ChatError: less than 99 % of them do.
    """
    last = [row.labels[row.labels != IGNORE][-1] for rows in prepared.rows for row in rows if len(row) < limit]
    share = sum(int(token) == chat.end.id for token in last) / len(last) if last else 1.0
    if share < _STOPPED:
        found = f"only {share:.1%} of the rows end in {chat.end.text!r}"
        raise ChatError(f"stages.{stage}.data", found, "end conversations with an assistant turn")
    return round(share, 6)


def save_policy(policy: Policy, chat: Chat, machine: Machine, folder: Path) -> None:
    """Saves what was trained (whole model or adapter) with its tokenizer, template and generation config."""
    if policy.is_adapter:
        save_adapter(policy.model, folder)  # type: ignore[arg-type]
    else:
        save_full(policy.model, folder, machine.dtype)  # type: ignore[arg-type]
    save_chat(chat, policy.model, folder)


def prove_saved(policy: Policy, chat: Chat, folder: Path, last_ids: set[int]) -> None:
    """Reads the saved folder back: weights whole and finite, chat contract kept, end of turn among what was trained.

    Args:
        last_ids: last trained ids of all rows.
    """
    if policy.is_adapter:
        verify_saved_adapter(folder)
    else:
        verify_saved_model(policy.model, folder)  # type: ignore[arg-type]
    verify_saved(folder, chat.template.digest, last_ids, probe_ids(chat.tokenizer, chat.template))
