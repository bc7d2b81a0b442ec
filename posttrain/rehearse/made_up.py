"""Made-up rows for a rehearsal: sums in five languages, in whatever shape a source promises.

Everything they say is true, every question differs, and the same call gives the same rows. They stand in
for data that is not on this machine; nobody should learn anything from them.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROWS = 30

_LANGUAGES = {
    "en": ("How much is {a} plus {b}?", "{a} plus {b} is {sum}."),
    "es": ("¿Cuánto es {a} más {b}?", "{a} más {b} es {sum}."),
    "ca": ("Quant fa {a} més {b}?", "{a} més {b} fa {sum}."),
    "eu": ("Zenbat da {a} gehi {b}?", "{a} gehi {b} {sum} da."),
    "gl": ("Canto é {a} máis {b}?", "{a} máis {b} é {sum}."),
}


@dataclass(frozen=True)
class Sum:
    """One question with its answer, and the same answer in another language (worse: it was not asked for)."""

    language: str
    question: str
    answer: str
    elsewhere: str


def made_up_rows(
    shape: str, columns: Mapping[str, str], text_format: str | None = None, start: int = 0, rows: int = ROWS
) -> list[dict[str, Any]]:
    """Makes rows of a shape, under the column names that the recipe maps them from.

    Args:
        shape: a row shape of `posttrain.data`, not `auto`.
        columns: our field name -> the column's name.
        text_format: pattern whose columns are filled instead of `text`.
        start: first sum; sources that start apart share no question.
        rows: how many.
    """
    sums = [_sum(start + number) for number in range(rows)]
    if text_format is not None:
        named = [name for _, name, _, _ in string.Formatter().parse(text_format) if name]
        return [
            {name: one.question if number % 2 == 0 else one.answer for number, name in enumerate(named)} for one in sums
        ]
    return [{columns.get(name, name): value for name, value in _SHAPES[shape](one).items()} for one in sums]


def made_up_questions(
    prompt_field: str, checks: Sequence[Mapping[str, Any]], start: int = 0, rows: int = ROWS
) -> list[dict[str, Any]]:
    """Makes questions of a generation suite with the fields that its checks read.

    Args:
        prompt_field: gets the question as a text.
        checks: `kind` and `field` of each.
    """
    return [_question(_sum(start + number), prompt_field, checks) for number in range(rows)]


def _question(one: Sum, prompt_field: str, checks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {prompt_field: one.question}
    for check in checks:
        if check.get("field"):
            expected = {"any_of": [one.answer, one.elsewhere], "language": one.language}
            row[check["field"]] = expected.get(check["kind"], one.answer)
    return row


def _sum(number: int) -> Sum:
    codes = list(_LANGUAGES)
    language, other = codes[number % len(codes)], codes[(number + 1) % len(codes)]
    a, b = 2 + number // len(codes), 3 + number % 7
    values = {"a": a, "b": b, "sum": a + b}
    question, answer = (text.format(**values) for text in _LANGUAGES[language])
    return Sum(language, question, answer, _LANGUAGES[other][1].format(**values))


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _transcript(one: Sum, answer: str) -> str:
    return f"\n\nHuman: {one.question}\n\nAssistant: {answer}"


_SHAPES: dict[str, Callable[[Sum], dict[str, Any]]] = {
    "text": lambda one: {"text": f"{one.question} {one.answer}"},
    "messages": lambda one: {"messages": [_user(one.question), _assistant(one.answer)]},
    "prompt_completion": lambda one: {"prompt": one.question, "completion": one.answer},
    "alpaca": lambda one: {"instruction": one.question, "input": "", "output": one.answer},
    "sharegpt": lambda one: {
        "conversations": [{"from": "human", "value": one.question}, {"from": "gpt", "value": one.answer}]
    },
    "preference": lambda one: {
        "prompt": one.question,
        "chosen": [_user(one.question), _assistant(one.answer)],
        "rejected": [_user(one.question), _assistant(one.elsewhere)],
    },
    "transcript_pair": lambda one: {
        "chosen": _transcript(one, one.answer),
        "rejected": _transcript(one, one.elsewhere),
    },
}
