"""Rows become questions, or an error at their file and row."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data.rows import Origin, RawRow
from posttrain.errors import UserError
from posttrain.evaluation.questions import CheckRule, check_rules, read_questions

RIGHT = CheckRule("right", "any_of", "answers")
LANG = CheckRule("language", "language", "lang")


def row(**fields: Any) -> RawRow:
    return RawRow(fields, Origin("q.jsonl", 7))


def test_text_and_messages_are_prompts() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Qué és?"}]
    rows = [row(prompt="What?", answers=["a", "b"], lang="en"), row(prompt=turns, answers=["c"], lang="ca")]
    questions, rules = read_questions(rows, "prompt", [RIGHT, LANG, CheckRule("stops", "stops")])
    assert [question.messages for question in questions] == [[{"role": "user", "content": "What?"}], turns]
    assert questions[0].expected == {"right": ["a", "b"], "language": "en"}
    assert questions[1].origin == "q.jsonl:7"
    assert rules[1].languages == ("ca", "en")


def test_answers_at_the_end_of_messages_are_left_out() -> None:
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    spoken = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    questions, _ = read_questions([row(prompt=turns), row(prompt=spoken)], "prompt", [])
    assert [question.messages for question in questions] == [turns[:1], turns[:1]]
    with pytest.raises(UserError, match="answers alone"):
        read_questions([row(prompt=turns[1:])], "prompt", [])


def test_fixed_value_serves_every_row() -> None:
    rule = CheckRule("polite", "any_of", value="yes")
    assert read_questions([row(prompt="x")], "prompt", [rule])[0][0].expected == {"polite": ["yes"]}


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"answers": ["a"], "lang": "en"}, "no field `prompt`; there are: answers, lang"),
        ({"prompt": "", "answers": ["a"], "lang": "en"}, "`prompt` is empty"),
        ({"prompt": 3, "answers": ["a"], "lang": "en"}, "`prompt` is a int"),
        ({"prompt": [{"content": "x"}], "answers": ["a"], "lang": "en"}, "`prompt` is a list"),
        ({"prompt": "x", "answers": "a", "lang": "en"}, "`answers` is a str"),
        ({"prompt": "x", "answers": [], "lang": "en"}, "`answers` is empty"),
        ({"prompt": "x", "answers": ["a"], "lang": None}, "`lang` is empty"),
        ({"prompt": "x", "answers": ["a"]}, "no field `lang`"),
    ],
)
def test_broken_rows_are_refused_where_they_stand(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(UserError) as caught:
        read_questions([row(**fields)], "prompt", [RIGHT, LANG])
    assert caught.value.where == "q.jsonl:7"
    assert found in caught.value.found


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        ([CheckRule("a", "exact")], "needs an expected value"),
        ([CheckRule("a", "exact", "f", "v")], "needs an expected value"),
        ([CheckRule("a", "stops", "f")], "expects nothing"),
        ([CheckRule("a", "stops"), CheckRule("a", "exact", "f")], "two checks"),
        ([CheckRule("a", "regex", value="(")], "regular expression '('"),
    ],
)
def test_checks_that_cannot_work_are_refused(rules: list[CheckRule], found: str) -> None:
    with pytest.raises(UserError, match="suite s, check a") as caught:
        check_rules("s", rules)
    assert found in caught.value.found


def test_broken_pattern_of_a_row_is_named() -> None:
    with pytest.raises(UserError, match=r"q\.jsonl:7"):
        read_questions([row(prompt="x", pattern="[")], "prompt", [CheckRule("r", "regex", "pattern")])
