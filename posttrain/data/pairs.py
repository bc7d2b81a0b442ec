"""Preference pairs from their many spellings: prompt + answers, shared transcripts, chosen/rejected dialogues."""

from __future__ import annotations

import re
from typing import Any

from posttrain.data.messages import as_message, as_messages, as_text, as_tools, assistant, user, with_system
from posttrain.data.rows import Message, Origin, PairRow

NO_CHOSEN = "empty chosen answer"
NO_REJECTED = "empty rejected answer"
NO_PROMPT = "empty prompt"
EQUAL = "chosen equals rejected"
OTHER_PROMPT = "rejected does not share the prompt of chosen"
LONGER = "rejected goes on after its answer"

_TURN = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}

Converted = tuple[PairRow, str | None]
"""A row, and why it cannot be used (None: it can)."""


def is_transcript(value: Any) -> bool:
    r"""Whether a field is a `\n\nHuman: … \n\nAssistant: …` transcript as in Anthropic's hh-rlhf."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def transcript_pair(fields: dict[str, Any], origin: Origin) -> Converted:
    """Splits two whole transcripts at their last assistant turn; turns are stripped of outer white space."""
    chosen = _transcript(fields.get("chosen"), origin, "chosen")
    rejected = _transcript(fields.get("rejected"), origin, "rejected")
    return _split_at_answer(chosen, rejected, fields, origin)


def preference(fields: dict[str, Any], origin: Origin) -> Converted:
    """Reads `chosen` and `rejected` as strings, one message each, or lists of messages.

    The prompt is `conversations` or `prompt` (string or messages), after an optional `system`. Lists
    that hold user turns are whole dialogues, of which all but the last message are the prompt.
    """
    if _whole_dialogue(fields.get("chosen")):
        chosen = as_messages(fields["chosen"], origin, "chosen")
        rejected = as_messages(fields.get("rejected"), origin, "rejected")
        return _split_at_answer(chosen, rejected, fields, origin)
    for column in ("prompt", "chosen", "rejected"):
        if is_transcript(fields.get(column)):
            raise origin.broken(
                f"`{column}` is a whole transcript, not one turn",
                "shape: transcript_pair reads whole transcripts in both chosen and rejected",
            )
    prompt = _prompt(fields, origin)
    chosen = _answer(fields.get("chosen"), origin, "chosen")
    rejected = _answer(fields.get("rejected"), origin, "rejected")
    return _judged(PairRow(prompt, chosen, rejected, as_tools(fields.get("tools"), origin), origin))


def _split_at_answer(
    chosen: list[Message], rejected: list[Message], fields: dict[str, Any], origin: Origin
) -> Converted:
    prompt = chosen[:-1]
    row = PairRow(prompt, chosen[-1:], rejected[-1:], as_tools(fields.get("tools"), origin), origin)
    if not _ends_with_answer(chosen):
        return row, NO_CHOSEN
    if not _ends_with_answer(rejected):
        return row, NO_REJECTED
    if rejected[:-1] != prompt:
        longer = len(rejected) > len(chosen) and rejected[: len(prompt)] == prompt
        answered = longer and rejected[len(prompt)]["role"] == "assistant"
        return row, LONGER if answered else OTHER_PROMPT
    return _judged(row)


def _judged(row: PairRow) -> Converted:
    questions = [message["content"] for message in row.prompt if message["role"] == "user"]
    if not questions or not all(question.strip() for question in questions):
        return row, NO_PROMPT
    if not _ends_with_answer(row.chosen):
        return row, NO_CHOSEN
    if not _ends_with_answer(row.rejected):
        return row, NO_REJECTED
    return row, EQUAL if row.chosen == row.rejected else None


def _ends_with_answer(messages: list[Message]) -> bool:
    last = messages[-1] if messages else {"role": ""}
    return last["role"] == "assistant" and bool(last["content"].strip() or last.get("tool_calls"))


def _transcript(value: Any, origin: Origin, column: str) -> list[Message]:
    text = as_text(value, origin, column)
    before, *turns = _TURN.split(text)
    if before.strip() or not is_transcript(text):
        raise origin.broken(f"`{column}` is not a transcript", r"it must start with \n\nHuman: (or give another shape)")
    return [
        {"role": _SPEAKERS[speaker], "content": said.strip()}
        for speaker, said in zip(turns[::2], turns[1::2], strict=True)
    ]


def _whole_dialogue(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    roles = {item.get("role", item.get("from")) for item in value if isinstance(item, dict)}
    return not roles.isdisjoint(("user", "human"))


def _prompt(fields: dict[str, Any], origin: Origin) -> list[Message]:
    column = "conversations" if fields.get("conversations") is not None else "prompt"
    if fields.get(column) is None:
        raise origin.broken(
            f"no `prompt` and no `conversations` beside chosen and rejected; columns: {', '.join(fields)}",
            "say which column holds the prompt, e.g. columns: {prompt: question}",
        )
    value = fields[column]
    messages = [user(value)] if isinstance(value, str) else as_messages(value, origin, column)
    return with_system(fields.get("system"), messages, origin)


def _answer(value: Any, origin: Origin, column: str) -> list[Message]:
    if isinstance(value, str):
        return [assistant(value)]
    if isinstance(value, dict):
        return [as_message(value, origin, column)]
    return as_messages(value, origin, column)
