"""The rows every room of the house works with: texts, conversations, pairs, and where each came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain.errors import DataError

Message = dict[str, Any]
"""`{"role", "content"}` and, where the data has them, `tool_calls`, `name`, `tool_call_id`, `reasoning_content`."""

Tool = dict[str, Any]
"""`{"type": "function", "function": {"name", "description", "parameters"}}`."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands in the user's data.

    `row` counts from 1 and is what a person finds the row by: the line of a JSONL file, the line a text
    block starts on, the element of a JSON array, the data row of a CSV, Parquet or hub file.
    """

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"

    def broken(self, found: str, todo: str) -> DataError:
        """Builds the error for a row that is broken in kind (missing column, wrong type)."""
        return DataError(str(self), found, todo)


@dataclass(frozen=True, slots=True)
class TextRow:
    """One document."""

    text: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class ChatRow:
    """One conversation with at least one answer."""

    messages: list[Message]
    tools: list[Tool] | None
    origin: Origin


@dataclass(frozen=True, slots=True)
class PairRow:
    """Two answers to one prompt; `prompt` are the messages before the answer, each answer its messages."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Tool] | None
    origin: Origin


@dataclass(frozen=True, slots=True)
class RawRow:
    """The fields of a row as the file has them."""

    fields: dict[str, Any]
    origin: Origin


Row = TextRow | ChatRow | PairRow | RawRow


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that was read but cannot be used, and why."""

    origin: Origin
    reason: str
