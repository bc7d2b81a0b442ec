"""Tables: which rows count, what is a share, a mean or a ratio, and which differences are made."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.chat.templates import load_template
from posttrain.data.rows import Origin, PairRow, TextRow
from posttrain.evaluation.generate import Answer
from posttrain.evaluation.questions import CheckRule, Question
from posttrain.evaluation.statistics import paired_difference, proportion
from posttrain.evaluation.suites import RowScore, Suite, Talker, score, table, verdict

ORIGIN = Origin("x", 1)


def test_rows_that_one_model_lacks_count_for_none() -> None:
    suite = Suite("qa", "generate", [None] * 4, rules=(CheckRule("right", "exact", "a"),))
    old = [RowScore({"right": one, "answer_tokens": 3.0}) for one in (1.0, 0.0, 0.0, 1.0)]
    new: list[RowScore | None] = [RowScore({"right": one, "answer_tokens": 4.0}) for one in (1.0, 1.0, 1.0, 0.0)]
    new[3] = None
    made = table(suite, {"old": list(old), "new": new}, seed=1)
    assert (made["rows"], made["left_out"]) == (3, 1)
    right = made["metrics"]["right"]
    share = proportion(1, 3)
    assert right["models"]["old"] == {"value": share.value, "low": share.low, "high": share.high, "rows": 3}
    expected = paired_difference([1, 0, 0], [1, 1, 1], seed=1)
    assert right["differences"] == [
        {
            "model": "new",
            "minus": "old",
            "value": expected.value,
            "low": expected.low,
            "high": expected.high,
            "rows": 3,
        }
    ]
    assert made["metrics"]["answer_tokens"]["differences"][0]["value"] == 1.0


def test_withheld_verdicts_are_counted_and_paired_where_both_gave_one() -> None:
    suite = Suite("qa", "generate", [None] * 4, rules=(CheckRule("lang", "language", "l"),))

    def rows(*verdicts: float | None) -> list[RowScore | None]:
        return [RowScore({"lang": one, "answer_tokens": 1.0}) for one in verdicts]

    made = table(suite, {"a": rows(1, None, 0, 1), "b": rows(1, 1, None, 0), "c": rows(None, None, None, None)}, 0)
    lang = made["metrics"]["lang"]
    assert {name: figure["rows"] for name, figure in lang["models"].items()} == {"a": 3, "b": 3}
    assert lang["undecided"] == {"a": 1, "b": 1, "c": 4}
    assert [(one["model"], one["minus"], one["rows"], one["value"]) for one in lang["differences"]] == [
        ("b", "a", 2, -0.5)
    ]


def test_three_models_make_three_differences_later_minus_earlier() -> None:
    suite = Suite("text", "bits_per_byte", [None] * 2)
    columns = {
        name: [RowScore({"bits_per_byte": bits}, weight) for bits, weight in ((one, 10), (9.0, 30))]
        for name, one in (("base", 41.0), ("instruct", 31.0), ("aligned", 33.0))
    }
    metric = table(suite, columns, 0)["metrics"]["bits_per_byte"]
    assert metric["models"]["base"]["value"] == 50 / 40  # a ratio of sums, not the mean of ratios
    assert [(one["model"], one["minus"], one["value"]) for one in metric["differences"]] == [
        ("instruct", "base", -10 / 40),
        ("aligned", "base", -8 / 40),
        ("aligned", "instruct", 2 / 40),
    ]


@pytest.mark.parametrize(
    ("rule", "expected", "passed"),
    [
        (CheckRule("c", "exact", "f"), "yes", True),
        (CheckRule("c", "exact", "f"), "ye", False),
        (CheckRule("c", "contains", "f"), "ye", True),
        (CheckRule("c", "regex", "f"), "^y.s$", True),
        (CheckRule("c", "any_of", "f"), ["no", "yes"], True),
        (CheckRule("c", "any_of", "f"), ["no"], False),
        (CheckRule("c", "language", "f", languages=("en", "es")), "en", None),
        (CheckRule("c", "stops"), None, True),
    ],
)
def test_each_kind_of_check_reaches_its_function(rule: CheckRule, expected: object, passed: bool | None) -> None:
    question = Question([], {"c": expected}, "x:1")
    text = "" if rule.kind == "language" else " yes\n"
    assert verdict(rule, question, Answer([1], text, stopped=True)) is passed
    if rule.kind == "stops":
        assert verdict(rule, question, Answer([1], text, stopped=False)) is False


def test_scores_of_a_model_row_by_row(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    talker = Talker(model, tokenizer, load_template("chatml", Path()), (257,))
    texts = [TextRow("hello", ORIGIN), TextRow("kaixo mundua", ORIGIN)]
    bits = score(Suite("t", "bits_per_byte", texts), talker)
    assert [one.weight for one in bits if one] == [5, 12]

    def answer(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    user = [{"role": "user", "content": "Hi"}]
    pairs = [PairRow(user, answer("a"), answer("bcd"), None, ORIGIN), PairRow(user, answer("x" * 90), [], None, ORIGIN)]
    pairs[1] = PairRow(user, answer("x" * 90), answer("y"), None, ORIGIN)
    suite = Suite("p", "preference", pairs, max_length=60)
    first, second = score(suite, talker)
    assert first is not None
    assert first.values.keys() == suite.units().keys()
    assert first.values["margin"] == pytest.approx(first.detail["chosen"] - first.detail["rejected"])
    assert first.values["accuracy"] == float(first.values["margin"] > 0)
    assert second is None

    questions = [Question(user, {}, "q:1"), Question([{"role": "user", "content": "x" * 90}], {}, "q:2")]
    suite = Suite("g", "generate", questions, max_length=60, max_new_tokens=5, rules=(CheckRule("stops", "stops"),))
    said, skipped = score(suite, talker)
    assert said is not None
    assert said.values.keys() == suite.units().keys()
    assert said.detail["verdicts"] == {"stops": said.detail["stopped"]}
    assert skipped is None
