"""Defects of data against a template: control tokens inside texts, joined boundaries, rows that do not render."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.chat.encode import encoder_of, pattern_of
from posttrain.chat.jinja import REASONING
from posttrain.chat.render import render_conversation
from posttrain.data.read import SourceSpec, locate, read_source
from posttrain.data.rows import ChatRow, Message
from posttrain.doctor.catalogue import Finding, found
from posttrain.doctor.probes import Probes
from posttrain.errors import ChatError, DataError

MOST_ROWS = 2000


@dataclass
class _Tally:
    """What was met in the rows: how often, and where and what first."""

    looked: int = 0
    rows: dict[str, int] = field(default_factory=dict)
    first: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, id: str, where: str, what: str) -> None:
        self.rows[id] = self.rows.get(id, 0) + 1
        self.first.setdefault(id, (where, what))


_REMEDIES = {
    "control-tokens-in-data": "they are encoded as plain text here; other trainers may read them as control tokens",
    "eos-in-data": "cut it from the ends of answers: the template writes it",
    "bos-in-data": "cut it from the beginnings of texts: the template or tokenizer writes it",
    "boundary-merge": "move the space to the beginning of the answer, or choose a template with headers",
    "rows-not-rendered": "change or leave out these rows, or choose a template that takes them",
    "reasoning-dropped": "choose a template that writes reasoning, or make one row per answer (data.history: split)",
    "tools-dropped": "choose a template that writes tools, their calls and their results",
}


def data(path: str, base_dir: Path, probes: Probes) -> Iterator[Finding]:
    """Finds what does not fit in the first rows of a data source, of any shape that holds conversations or pairs.

    Raises:
        DataError: the source cannot be read, or holds neither conversations nor pairs.
    """
    tally = _Tally()
    for row in _rows(path, base_dir):
        tally.looked += 1
        _look(row, probes, tally)
    for id, count in tally.rows.items():
        where, what = tally.first[id]
        yield found(id, where, f"{count} of {tally.looked} rows looked at; the first: {what}", _REMEDIES[id])


def _rows(path: str, base_dir: Path) -> list[ChatRow]:
    """Reads conversations, or the chosen side of pairs."""
    source = SourceSpec(locate(path, base_dir))
    try:
        return read_source(source, "chat", MOST_ROWS).rows
    except DataError as error:
        try:
            pairs = read_source(source, "pair", MOST_ROWS).rows
        except DataError:
            raise error from None
    return [ChatRow([*pair.prompt, *pair.chosen], pair.tools, pair.origin) for pair in pairs]


def _look(row: ChatRow, probes: Probes, tally: _Tally) -> None:
    where, once = str(row.origin), dict[str, str]()
    for message in row.messages:
        for id, what in _in_text(message, probes):
            once.setdefault(id, what)
    if problem := _render(row.messages, row.tools, probes):
        once.setdefault(*problem)
    for id, what in once.items():
        tally.add(id, where, what)


def _in_text(message: Message, probes: Probes) -> Iterator[tuple[str, str]]:
    """Yields what one message's text holds: BOS before it, an end of turn after it, other control tokens inside."""
    text = message.get("content")
    if not isinstance(text, str):
        return
    if probes.bos and text.lstrip().startswith(probes.bos):
        yield "bos-in-data", f"the {message['role']} says {text[:40]!r}"
        text = text.lstrip().removeprefix(probes.bos)
    ends = _ends(probes)
    if message["role"] == "assistant" and ends and (match := ends.search(text)):
        yield "eos-in-data", f"an answer ends with {text[match.start() :]!r}"
        text = text[: match.start()]
    if match := _special(probes).search(text):
        yield "control-tokens-in-data", f"the {message['role']} says {match[0]!r}"


def _ends(probes: Probes) -> re.Pattern[str] | None:
    texts = {probes.end.text if probes.end else "", str(probes.tokenizer.eos_token or "")} - {""}
    return re.compile(f"(?:{'|'.join(map(re.escape, texts))})\\s*$") if texts else None


def _special(probes: Probes) -> re.Pattern[str]:
    """What structures conversations: special tokens. Others (`<think>`) are the assistant's to write."""
    encoder = encoder_of(probes.tokenizer)
    key = "special tokens' texts"
    if key not in encoder.remembered:
        encoder.remembered[key] = pattern_of([encoder.added[token] for token in encoder.special])
    return encoder.remembered[key]


def _render(messages: list[Message], tools: Any, probes: Probes) -> tuple[str, str] | None:
    """Renders a row; where that fails, says whether it is for its reasoning, its tools, or for good."""
    try:
        rendered = render_conversation(probes.tokenizer, probes.template, messages, tools)
    except ChatError as error:
        for id, simpler in (
            ("reasoning-dropped", _without_reasoning(messages)),
            ("tools-dropped", _untooled(messages)),
        ):
            has_tools = bool(tools) or any(message.get("tool_calls") for message in messages)
            if simpler != messages and (has_tools or id != "tools-dropped") and _renders(simpler, probes):
                return id, error.found
        return "rows-not-rendered", f"{error.where}: {error.found}"
    if rendered.straddled:
        answer = next(str(message["content"]) for message in messages if message["role"] == "assistant")
        return "boundary-merge", f"the answer {answer[:30]!r} joins the prompt's last token"
    return None


def _renders(messages: list[Message], probes: Probes) -> bool:
    try:
        render_conversation(probes.tokenizer, probes.template, messages)
    except ChatError:
        return False
    return True


def _without_reasoning(messages: list[Message]) -> list[Message]:
    return [{key: value for key, value in message.items() if key not in REASONING} for message in messages]


def _untooled(messages: list[Message]) -> list[Message]:
    spoken = [message for message in _without_reasoning(messages) if message["role"] != "tool"]
    return [
        {key: value for key, value in message.items() if key != "tool_calls"}
        for message in spoken
        if not message.get("tool_calls")
    ]
