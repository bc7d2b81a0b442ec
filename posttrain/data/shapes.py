"""Row shapes: which one a source has, and how its fields become a row of ours.

A converter returns the row and, where its content cannot be used, the reason; a row that is broken in
kind (missing column, wrong type, unknown role) raises `DataError` with file and row.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any, Literal

from posttrain.data.messages import as_messages, as_text, as_tools, assistant, user, with_system
from posttrain.data.pairs import is_transcript, preference, transcript_pair
from posttrain.data.rows import ChatRow, Message, Origin, PairRow, TextRow
from posttrain.errors import DataError

Want = Literal["text", "chat", "pair", "raw"]
Fields = dict[str, Any]
Converted = tuple[TextRow | ChatRow | PairRow, str | None]

EMPTY_TEXT = "empty text"
EMPTY_PROMPT = "empty prompt"
EMPTY_ANSWER = "empty answer"
NO_ANSWER = "no assistant turn"

REQUIRED: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sharegpt": ("conversations",),
    "preference": ("chosen", "rejected"),
    "transcript_pair": ("chosen", "rejected"),
}
"""Columns that make a shape; all other columns are optional or ignored."""

FIELDS = sorted({name for names in REQUIRED.values() for name in names} | {"input", "history", "system", "tools"})
"""Every field name of ours that `columns` may map."""

SHAPES_OF: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "chat": ("messages", "prompt_completion", "alpaca", "sharegpt"),
    "pair": ("preference", "transcript_pair"),
}
_NEEDS = {"text": "texts", "chat": "conversations", "pair": "preference pairs"}


def detect_shape(rows: Sequence[tuple[Origin, Fields]], want: Want) -> str:
    """Finds the one shape that the columns of the first rows (null ones aside) have.

    Raises:
        DataError: no shape, more than one, or one that does not give what is wanted.
    """
    origin = rows[0][0]
    columns = {name for _, fields in rows for name, value in fields.items() if value is not None}
    found = [shape for shape, needed in REQUIRED.items() if columns.issuperset(needed) and shape != "transcript_pair"]
    if "preference" in found and all(_both_transcripts(fields) for _, fields in rows):
        found[found.index("preference")] = "transcript_pair"
    if want == "pair":  # pairs often carry other spellings of themselves, such as `messages`
        found = [shape for shape in found if shape in SHAPES_OF["pair"]]
    listed = ", ".join(f"`{name}`" for name in sorted(columns)) or "none"
    if not found:
        raise origin.broken(
            f"no known row shape among the columns {listed}",
            f"for {_NEEDS[want]} say `shape:` and map columns, e.g. columns: {{{_example(want)}}}",
        )
    if len(found) > 1:
        choices = " or ".join(f"`shape: {shape}`" for shape in found if shape in SHAPES_OF[want])
        raise origin.broken(
            f"columns of several shapes ({', '.join(found)}): {listed}",
            f"say which one is meant: {choices}" if choices else _wrong_kind(found[0], want),
        )
    check_shape(found[0], want, origin)
    return found[0]


def check_shape(shape: str, want: Want, origin: Origin) -> None:
    """Raises DataError where rows of a shape cannot give what is wanted."""
    if shape not in SHAPES_OF[want]:
        raise origin.broken(f"rows of shape {shape}, where {_NEEDS[want]} are needed", _wrong_kind(shape, want))


def convert(shape: str, fields: Fields, origin: Origin) -> Converted:
    """Turns the fields of one row into a row of ours; see the module for what raises and what does not."""
    missing = [name for name in REQUIRED[shape] if name not in fields]
    if missing:
        raise origin.broken(
            f"no column `{missing[0]}`, which shape {shape} needs; columns: {', '.join(fields) or 'none'}",
            f"complete the row, or map a column, e.g. columns: {{{missing[0]}: …}}",
        )
    return _CONVERTERS[shape](fields, origin)


def format_text(pattern: str, fields: Fields, origin: Origin) -> Converted:
    """Makes a text of a row with a `str.format` pattern over its columns; null counts as empty."""
    values = {name: "" if value is None else value for name, value in fields.items()}
    try:
        return _judged_text(TextRow(pattern.format(**values), origin))
    except KeyError as error:
        raise origin.broken(
            f"no column {error}, which text_format needs; columns: {', '.join(fields)}", "correct text_format"
        ) from None


def check_format(pattern: str, where: str) -> None:
    """Refuses a text_format that is not plain `{column}` fields: no attributes, indices or conversions.

    Raises:
        DataError: with the field at fault.
    """
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise DataError(where, f"text_format {pattern!r}: {error}", "double braces that are text: {{ and }}") from None
    names = [name for _, name, _, _ in parts if name is not None]
    odd = [name for _, name, spec, mark in parts if name is not None and (not _plain(name) or spec or mark)]
    if odd or not names:
        found = f"the field {{{odd[0]}}}" if odd else "no field at all"
        raise DataError(where, f"text_format {pattern!r} has {found}", 'name columns: "{instruction}\\n{output}"')


def _plain(name: str) -> bool:
    """Attributes and indices would reach into objects; `{}` and `{0}` name no column."""
    return bool(name) and not name.isdigit() and not set(name) & set(".[")


def _text(fields: Fields, origin: Origin) -> Converted:
    return _judged_text(TextRow(as_text(fields["text"], origin, "text"), origin))


def _judged_text(row: TextRow) -> Converted:
    return row, None if row.text.strip() else EMPTY_TEXT


def _messages(fields: Fields, origin: Origin) -> Converted:
    return _dialogue(as_messages(fields["messages"], origin, "messages"), fields, origin)


def _sharegpt(fields: Fields, origin: Origin) -> Converted:
    return _dialogue(as_messages(fields["conversations"], origin, "conversations"), fields, origin)


def _prompt_completion(fields: Fields, origin: Origin) -> Converted:
    prompt, completion = fields["prompt"], fields["completion"]
    asked = [user(prompt)] if isinstance(prompt, str) else as_messages(prompt, origin, "prompt")
    if isinstance(completion, str):
        return _dialogue([*asked, assistant(completion)], fields, origin)
    return _dialogue([*asked, *as_messages(completion, origin, "completion")], fields, origin)


def _alpaca(fields: Fields, origin: Origin) -> Converted:
    """`instruction`, a line break and `input` make the question, as in LLaMA-Factory; `history` goes before."""
    turns: list[Message] = []
    for index, exchange in enumerate(fields.get("history") or []):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise origin.broken(f"`history[{index}]` is not [question, answer]", "give both, or remove it")
        question, answer = (as_text(said, origin, f"history[{index}]") for said in exchange)
        turns += [user(question), assistant(answer)]
    asked = as_text(fields["instruction"], origin, "instruction")
    more = as_text(fields.get("input") or "", origin, "input")
    question = "\n".join(part for part in (asked, more) if part.strip())
    answer = as_text(fields["output"], origin, "output")
    return _dialogue([*turns, user(question), assistant(answer)], fields, origin)


def _dialogue(messages: list[Message], fields: Fields, origin: Origin) -> Converted:
    messages = with_system(fields.get("system"), messages, origin)
    row = ChatRow(messages, as_tools(fields.get("tools"), origin), origin)
    answers = [message for message in messages if message["role"] == "assistant"]
    questions = [message["content"] for message in messages if message["role"] == "user"]
    if not answers:
        return row, NO_ANSWER
    if not all(answer["content"].strip() or answer.get("tool_calls") for answer in answers):
        return row, EMPTY_ANSWER
    return row, None if questions and all(question.strip() for question in questions) else EMPTY_PROMPT


_CONVERTERS: dict[str, Callable[[Fields, Origin], Converted]] = {
    "text": _text,
    "messages": _messages,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "preference": preference,
    "transcript_pair": transcript_pair,
}


def _both_transcripts(fields: Fields) -> bool:
    return is_transcript(fields.get("chosen")) and is_transcript(fields.get("rejected"))


def _wrong_kind(shape: str, want: str) -> str:
    if want == "text":
        return 'make texts of them with text_format, e.g. "{instruction}\\n{output}"'
    return f"{_NEEDS[want]} come in the shapes {', '.join(SHAPES_OF[want])}"


def _example(want: str) -> str:
    return {
        "text": "text: content",
        "chat": "prompt: question, completion: answer",
        "pair": "chosen: better, rejected: worse",
    }[want]
