"""Seeded splits of a source: two sides that never share a prompt, whatever order the rows come in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from posttrain.data.messages import ROLES
from posttrain.data.rows import ChatRow, PairRow, RawRow, Row, TextRow

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class SelectSpec:
    """One side of a split; see `posttrain.data.select.choose_rows`."""

    rows: int
    side: Literal["train", "heldout"]
    by: Literal["row", "prompt"] = "prompt"
    seed: int = 0


def choose_rows(rows: Callable[[], Iterable[Row]], spec: SelectSpec) -> np.ndarray:
    """Returns which rows [rows] (bool) are on the wanted side of a split; they are read once, or twice.

    Rows of one key (see `key_of`) form a group. Groups are ordered by SHA-256 of seed and key, which does not
    depend on the order of rows; the train side takes each group in turn that still fits into `spec.rows` and
    skips one that would overflow, so it holds at most `spec.rows` rows, and exactly that many wherever enough
    groups of one row exist. All the rest is held out.

    Args:
        rows: begins to read the rows; they are read again only where some repeat and `by` is `row`.
    """
    from posttrain.data.groups import take_groups  # numpy: only a split needs it

    train = take_groups(_digests(rows, spec), spec.rows)
    return train if spec.side == "train" else ~train


def _digests(rows: Callable[[], Iterable[Row]], spec: SelectSpec) -> bytearray:
    """The digests of all rows' keys, end to end; rows that are alike are told apart by a number."""
    from posttrain.data.groups import SIZE, seeded_digest, times_before

    keyed, alike = bytearray(), bytearray()
    for row in rows():
        key = _bytes(key_of(row, spec.by))
        keyed += seeded_digest(spec.seed, key if spec.by == "prompt" else key + b"\0" + b"0")
        if spec.by == "row":
            alike += seeded_digest(0, key)
    times = times_before(alike)
    for number, row in enumerate(rows() if times.any() else ()):
        if times[number]:
            key = _bytes(f"{key_of(row, spec.by)}\0{times[number]}")
            keyed[number * SIZE : (number + 1) * SIZE] = seeded_digest(spec.seed, key)
    return keyed


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def key_of(row: Row, by: Literal["row", "prompt"]) -> str:
    """Returns what groups a row: its prompt, or (`row`) its content.

    A prompt is a conversation's first user turn, the messages of a pair's prompt, of a raw row what its
    conversation would have (`prompt`, `messages`, `conversations` or `instruction`), and otherwise the whole content.
    """
    return _prompt(row) if by == "prompt" else _content(row)


def _prompt(row: Row) -> str:
    if isinstance(row, ChatRow):
        return next((message["content"] for message in row.messages if message["role"] == "user"), "")
    if isinstance(row, PairRow):
        return _text(row.prompt)
    prompt = _raw_prompt(row.fields) if isinstance(row, RawRow) else None
    return prompt if isinstance(prompt, str) else _content(row)


def _raw_prompt(fields: dict[str, Any]) -> Any:
    """The prompt of a row that was not converted: the text that its conversation would be grouped by."""
    if isinstance(fields.get("prompt"), str):
        return fields["prompt"]
    for name in ("prompt", "messages", "conversations"):
        turns = fields.get(name)
        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            asked = (turn for turn in turns if ROLES.get(str(turn.get("role", turn.get("from")))) == "user")
            return next((turn.get("content", turn.get("value")) for turn in asked), None)
    parts = [fields.get("instruction"), fields.get("input")]
    said = [part for part in parts if isinstance(part, str) and part.strip()]
    return "\n".join(said) if isinstance(parts[0], str) and said else None


def _content(row: Row) -> str:
    if isinstance(row, TextRow):
        return row.text
    if isinstance(row, ChatRow):
        return _text([row.messages, row.tools])
    if isinstance(row, PairRow):
        return _text([row.prompt, row.chosen, row.rejected, row.tools])
    return _text(row.fields)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
