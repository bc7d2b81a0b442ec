"""Seeded splits of a source: two sides that never share a prompt, whatever order the rows come in."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.data.rows import ChatRow, PairRow, RawRow, Row, TextRow


@dataclass(frozen=True, slots=True)
class SelectSpec:
    """One side of a split; see `posttrain.data.select.side_of`."""

    rows: int
    side: Literal["train", "heldout"]
    by: Literal["row", "prompt"] = "prompt"
    seed: int = 0


def side_of(keys: Sequence[str], spec: SelectSpec) -> list[int]:
    """Returns the indices, ascending, of the rows on the wanted side of a split.

    Rows of one key form a group. Groups are ordered by SHA-256 of seed and key, which does not depend on
    the order of rows; the train side takes each group in turn that still fits into `spec.rows` and skips
    one that would overflow, so it holds at most `spec.rows` rows, and exactly that many wherever enough
    groups of one row exist. All the rest is held out.
    """
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    train: set[int] = set()
    for key in sorted(groups, key=lambda key: _digest(spec.seed, key)):
        if len(train) + len(groups[key]) <= spec.rows:
            train.update(groups[key])
    return [index for index in range(len(keys)) if (index in train) == (spec.side == "train")]


def split_keys(rows: Sequence[Row], by: Literal["row", "prompt"]) -> list[str]:
    """Returns what groups each row: its prompt, or (`row`) its content, numbered where it repeats.

    A prompt is a conversation's first user turn, the messages of a pair's prompt, the field `prompt` of a
    raw row where it has one, and otherwise the whole content.
    """
    if by == "prompt":
        return [_prompt(row) for row in rows]
    seen: Counter[str] = Counter()
    keys = []
    for content in map(_content, rows):
        keys.append(f"{content}\0{seen[content]}")
        seen[content] += 1
    return keys


def _prompt(row: Row) -> str:
    if isinstance(row, ChatRow):
        return next((message["content"] for message in row.messages if message["role"] == "user"), "")
    if isinstance(row, PairRow):
        return _text(row.prompt)
    prompt = row.fields.get("prompt") if isinstance(row, RawRow) else None
    return prompt if isinstance(prompt, str) else _content(row)


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


def _digest(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
