"""What can be known of data: the shape of its rows, the columns that hold them, how many and how long they are."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.data.read import OpenSource, SourceSpec, locate, open_source
from posttrain.data.shapes import REQUIRED, SHAPES_OF, Want
from posttrain.draft.model_facts import spell_path
from posttrain.errors import DataError, UserError

LOOKED_AT = 1000
"""Rows whose lengths decide `max_length`."""
_LETTERS_PER_TOKEN = 3
"""Letters that a token stands for at least, in most languages and tokenizers: a length is rather too large."""
_SPELLINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "chat": {
        "prompt": ("prompt", "question", "query", "instruction", "inputs", "input"),
        "completion": ("completion", "answer", "response", "output", "targets", "target"),
    },
    "pair": {
        "prompt": ("prompt", "question", "query", "instruction", "input"),
        "chosen": ("chosen", "chosen_response", "preferred", "better", "accepted"),
        "rejected": ("rejected", "rejected_response", "dispreferred", "worse"),
    },
}
"""Wanted rows -> our field -> names under which files hold it."""
_ASKED = {"messages": "messages", "sharegpt": "conversations", "alpaca": "instruction"}
"""Shape -> the field that holds the question; `prompt` of all others."""


@dataclass(frozen=True)
class DataFacts:
    """A source as a recipe speaks of it."""

    path: str
    """Hub id, or a path from the recipe's folder."""
    split: str | None
    shape: str
    """`auto` where the rows could not be looked at."""
    columns: dict[str, str] = field(default_factory=dict)
    rows: int | None = None
    """None of a hub dataset."""
    tokens: int | None = None
    """Length that 99 % of the rows keep to, roughly."""
    why: str = ""

    @property
    def asked(self) -> str:
        """The field that holds the question of a row."""
        return _ASKED.get(self.shape, "prompt")


def read_data(text: str, want: Want, recipe_dir: Path) -> DataFacts:
    """Looks at local rows; of a hub dataset only the name is taken.

    Args:
        text: file or folder (from the working directory), or `owner/name[:split]`.
        want: `chat` or `pair`.

    Raises:
        UserError: nothing there, or rows of which no conversations or pairs can be made.
    """
    name, colon, split = text.partition(":") if not Path(text).exists() else (text, "", "")
    try:
        found = locate(name, Path.cwd())
    except UserError as error:
        raise error.at("--data") from None
    if isinstance(found, str):
        if colon and not split:
            raise UserError(f"--data {text}", "names no split", "write owner/name:split")
        return DataFacts(found, split or None, "auto", why=f"data: {found}; its rows are looked at when it is read")
    if not found.exists():
        raise UserError(f"--data {text}", "there is no such file or folder", "paths start from the working directory")
    source, columns = _open(found, want)
    rows, tokens = _measure(source)
    spelled = spell_path(found, recipe_dir)
    mapped = "".join(f", {ours} from `{theirs}`" for ours, theirs in columns.items())
    why = f"data: {spelled}: {rows:,} rows of shape {source.shape}{mapped}"
    return DataFacts(spelled, None, source.shape, columns, rows, tokens, why)


def _open(path: Path, want: Want) -> tuple[OpenSource, dict[str, str]]:
    """Opens a source: as it is detected, else as the one wanted shape it has columns for, else with columns mapped."""
    try:
        return open_source(SourceSpec(path), want), {}
    except DataError as error:
        present = next((set(fields) for _, fields in open_source(SourceSpec(path), "raw").fields()), set())
        shapes = [shape for shape in SHAPES_OF[want] if present.issuperset(REQUIRED[shape])]
        columns = {} if shapes else _columns(present, want)
        if len(shapes) != 1 and not columns:
            raise error.at("--data") from None
        shape = shapes[0] if shapes else "prompt_completion" if want == "chat" else "preference"
    return open_source(SourceSpec(path, shape=shape, columns=columns), want), columns


def _columns(present: set[str], want: Want) -> dict[str, str]:
    """Our fields -> the file's columns, by their spelling; empty where one is not found."""
    columns: dict[str, str] = {}
    for ours, spellings in _SPELLINGS[want].items():
        theirs = next((name for name in spellings if name in present), None)
        if theirs is None:
            return {}
        if theirs != ours:
            columns[ours] = theirs
    return columns


def _measure(source: OpenSource) -> tuple[int, int | None]:
    """Number of rows, and the length in tokens that 99 % of the first ones keep to, by their letters."""
    lengths, count = [], 0
    for _, fields in source.fields():
        count += 1
        if count <= LOOKED_AT:
            lengths.append(_letters(fields, source.shape) // _LETTERS_PER_TOKEN)
    lengths.sort()
    return count, lengths[int(0.99 * (len(lengths) - 1))] if lengths else None


def _letters(fields: dict[str, Any], shape: str) -> int:
    """Letters of a row; of a pair the longer answer counts."""
    sizes = {name: len(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False))
             for name, value in fields.items()}  # fmt: skip
    if shape in ("preference", "transcript_pair"):
        answers = [sizes.pop(name, 0) for name in ("chosen", "rejected")]
        return sizes.get("prompt", 0) + max(answers)
    return sum(sizes.values())
