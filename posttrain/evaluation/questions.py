"""Questions of a generation suite: the prompt as messages, and what each check expects, checked when read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from posttrain.data.messages import as_messages
from posttrain.errors import DataError, UserError

if TYPE_CHECKING:
    from posttrain.data.rows import RawRow

Kind = Literal["exact", "contains", "regex", "any_of", "language", "stops"]


@dataclass(frozen=True)
class CheckRule:
    """One check of a suite."""

    name: str
    kind: Kind
    field: str | None = None
    """Row field that holds the expected value."""
    value: str | None = None
    """The expected value of every row, instead of a field."""
    languages: tuple[str, ...] = ()
    """Codes that a language check chooses from: those that occur in its field."""


@dataclass(frozen=True)
class Question:
    """One row of a generation suite."""

    messages: list[dict[str, Any]]
    expected: dict[str, Any]
    """Check name -> expected value: a text, or a list of texts for `any_of`."""
    origin: str
    """File and row."""


def check_rules(suite: str, rules: Sequence[CheckRule]) -> None:
    """Refuses checks that cannot work, before any model is loaded.

    Raises:
        UserError: a check without an expected value or with two, or two checks of one name.
    """
    for number, rule in enumerate(rules):
        where = f"suite {suite}, check {rule.name}"
        if rule.name in {other.name for other in rules[:number]}:
            raise UserError(where, "two checks of this name", "give each check its own name")
        if rule.kind == "stops" and (rule.field is not None or rule.value is not None):
            raise UserError(where, "`stops` expects nothing", "remove `field` and `value`")
        if rule.kind != "stops" and (rule.field is None) == (rule.value is None):
            raise UserError(where, f"`{rule.kind}` needs an expected value", "give `field` or `value`, exactly one")
        if rule.kind == "regex" and rule.value is not None:
            _compiles(rule.value, where)


def read_questions(
    rows: Sequence[RawRow], prompt_field: str, rules: Sequence[CheckRule]
) -> tuple[list[Question], tuple[CheckRule, ...]]:
    """Turns raw rows into questions, and tells language checks which languages are at hand.

    Args:
        rows: `fields` by name, with their origin.
        prompt_field: a text (one user turn) or a list of messages, of which answers at the end are left out.

    Raises:
        DataError: a field is missing or of the wrong type, at its file and row.
    """
    questions = [_question(row, prompt_field, rules) for row in rows]
    return questions, tuple(_with_languages(rule, questions) for rule in rules)


def _question(row: RawRow, prompt_field: str, rules: Sequence[CheckRule]) -> Question:
    where = str(row.origin)
    prompt = _field(row, prompt_field, where, "set `prompt_field` of the suite")
    if isinstance(prompt, str) and prompt.strip():
        messages = [{"role": "user", "content": prompt}]
    elif (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in prompt)
    ):
        messages = _asked(prompt, row, prompt_field)
    else:
        raise DataError(where, f"`{prompt_field}` is {_kind(prompt)}", "a prompt is a text or a list of messages")
    expected = {rule.name: _expected(row, rule, where) for rule in rules if rule.kind != "stops"}
    return Question(messages, expected, where)


def _asked(prompt: list[dict[str, Any]], row: RawRow, column: str) -> list[dict[str, Any]]:
    """The turns before the last answer, in the one spelling of messages."""
    messages = prompt if all("role" in message for message in prompt) else as_messages(prompt, row.origin, column)
    while messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages:
        raise DataError(str(row.origin), f"`{column}` holds answers alone", "a prompt is a text or a list of messages")
    return messages


def _expected(row: RawRow, rule: CheckRule, where: str) -> Any:
    todo = f"set `field` of check {rule.name}"
    value: Any = rule.value if rule.field is None else _field(row, rule.field, where, todo)
    if rule.kind == "any_of" and rule.field is None:
        value = [value]
    fits = (
        isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
        if rule.kind == "any_of"
        else isinstance(value, str) and bool(value.strip())
    )
    if not fits:
        wanted = "a list of texts" if rule.kind == "any_of" else "a text"
        raise DataError(where, f"`{rule.field or rule.name}` is {_kind(value)}", f"check {rule.name} expects {wanted}")
    if rule.kind == "regex":
        _compiles(value, where)
    return value


def _field(row: RawRow, name: str, where: str, todo: str) -> Any:
    if name not in row.fields:
        raise DataError(where, f"no field `{name}`; there are: {', '.join(row.fields)}", todo)
    return row.fields[name]


def _kind(value: Any) -> str:
    return "empty" if value in ("", [], None) else f"a {type(value).__name__}"


def _compiles(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(where, f"regular expression {pattern!r}: {error}", "correct the pattern") from None


def _with_languages(rule: CheckRule, questions: Sequence[Question]) -> CheckRule:
    if rule.kind != "language":
        return rule
    return replace(rule, languages=tuple(sorted({question.expected[rule.name] for question in questions})))
