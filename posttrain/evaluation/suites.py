"""One suite over one model gives scores per row; the scores of all models give a table.

A metric of a row is a number: 1 or 0 for a verdict, nats, bits, tokens. A row that a model could not be asked
(too long) is None for that model, and then counts for no model: every column rests on the same rows. A verdict
that a check withheld is None in that row's values alone, and is counted beside the metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.chat.render import render_prompt
from posttrain.errors import ChatError
from posttrain.evaluation import checks
from posttrain.evaluation.generate import Answer, generate_answers
from posttrain.evaluation.likelihood import PairScore, TextScore, bits_per_byte, preference
from posttrain.evaluation.questions import CheckRule, Question
from posttrain.evaluation.statistics import Interval, paired_difference, proportion, ratio

if TYPE_CHECKING:
    from posttrain.chat.templates import ChatTemplate
    from posttrain.data.rows import PairRow, TextRow

Unit = Literal["share", "bits/byte", "nats", "tokens"]
PREFERENCE: dict[str, Unit] = {
    "accuracy": "share",  # summed log-probabilities
    "accuracy_per_token": "share",
    "margin": "nats",  # summed, chosen minus rejected
    "chosen_logp": "nats",
    "rejected_logp": "nats",
}


@dataclass(frozen=True)
class Suite:
    """One evaluation, as plain values."""

    name: str
    kind: Literal["bits_per_byte", "preference", "generate"]
    rows: Sequence[Any]
    """`TextRow`, `PairRow` or `Question`, by kind."""
    max_length: int = 2048
    max_new_tokens: int = 64
    rules: tuple[CheckRule, ...] = ()

    def units(self) -> dict[str, Unit]:
        """Metric name -> unit, in the order of the table."""
        if self.kind == "bits_per_byte":
            return {"bits_per_byte": "bits/byte"}
        if self.kind == "preference":
            return dict(PREFERENCE)
        return {**{rule.name: "share" for rule in self.rules}, "answer_tokens": "tokens"}


@dataclass(frozen=True)
class Talker:
    """A model with the tokenizer, template and stops that it is asked with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate | None
    """None where only texts are scored."""
    eos_ids: tuple[int, ...] = ()
    batch_tokens: int = 4096


@dataclass(frozen=True)
class RowScore:
    """What one model scored on one row."""

    values: dict[str, float | None]
    """Metric -> figure; None where a check gave no verdict."""
    weight: float = 1.0
    """Bytes of the text, where the metric is a rate per byte."""
    detail: dict[str, Any] = field(default_factory=dict)
    """What people want to see of it, as JSON."""


def score(suite: Suite, talker: Talker) -> list[RowScore | None]:
    """Scores every row of a suite with one model; None for a row that is too long for `max_length`."""
    if suite.kind == "bits_per_byte":
        return _score_texts(suite, talker)
    assert talker.template is not None, "chat suites need a template"
    if suite.kind == "preference":
        return _score_pairs(suite, talker, talker.template)
    return _score_questions(suite, talker, talker.template)


def _score_texts(suite: Suite, talker: Talker) -> list[RowScore | None]:
    texts: Sequence[TextRow] = suite.rows
    scores = bits_per_byte(
        talker.model, talker.tokenizer, [row.text for row in texts], suite.max_length, talker.batch_tokens
    )
    return [_text_row(one) if one.text_bytes else None for one in scores]


def _text_row(score: TextScore) -> RowScore:
    return RowScore({"bits_per_byte": score.bits}, score.text_bytes, asdict(score))


def _score_pairs(suite: Suite, talker: Talker, template: ChatTemplate) -> list[RowScore | None]:
    pairs: Sequence[PairRow] = suite.rows
    scores = preference(talker.model, talker.tokenizer, template, pairs, suite.max_length, talker.batch_tokens)
    return [_pair_row(one) if one else None for one in scores]


def _pair_row(score: PairScore) -> RowScore:
    values: dict[str, float | None] = {
        "accuracy": float(score.prefers_chosen),
        "accuracy_per_token": float(score.prefers_chosen_per_token),
        "margin": score.chosen - score.rejected,
        "chosen_logp": score.chosen,
        "rejected_logp": score.rejected,
    }
    return RowScore(values, detail=asdict(score))


def _score_questions(suite: Suite, talker: Talker, template: ChatTemplate) -> list[RowScore | None]:
    questions: Sequence[Question] = suite.rows
    prompts = [_prompt(question, talker, template) for question in questions]
    fitting = [number for number, ids in enumerate(prompts) if len(ids) <= suite.max_length]
    answers = generate_answers(
        talker.model,
        talker.tokenizer,
        [prompts[number] for number in fitting],
        suite.max_new_tokens,
        talker.eos_ids,
        talker.batch_tokens,
    )
    result: list[RowScore | None] = [None] * len(questions)
    for number, answer in zip(fitting, answers, strict=True):
        result[number] = _question_row(suite.rules, questions[number], answer)
    return result


def _prompt(question: Question, talker: Talker, template: ChatTemplate) -> list[int]:
    try:
        return render_prompt(talker.tokenizer, template, question.messages)
    except ChatError as error:
        raise error.at(question.origin) from None


def _question_row(rules: tuple[CheckRule, ...], question: Question, answer: Answer) -> RowScore:
    verdicts = {rule.name: verdict(rule, question, answer) for rule in rules}
    values = {name: None if value is None else float(value) for name, value in verdicts.items()}
    detail = {"answer": answer.text, "stopped": answer.stopped, "tokens": len(answer.ids), "verdicts": verdicts}
    return RowScore({**values, "answer_tokens": float(len(answer.ids))}, detail=detail)


def verdict(rule: CheckRule, question: Question, answer: Answer) -> bool | None:
    """Applies one check to an answer; the expected value was checked when the question was read."""
    if rule.kind == "stops":
        return answer.stopped
    expected = question.expected[rule.name]
    if rule.kind == "any_of":
        return checks.any_of(expected, answer.text)
    if rule.kind == "language":
        return checks.language(expected, answer.text, rule.languages)
    return {"exact": checks.exact, "contains": checks.contains, "regex": checks.regex}[rule.kind](expected, answer.text)


def table(suite: Suite, scores: Mapping[str, list[RowScore | None]], seed: int) -> dict[str, Any]:
    """Makes the JSON of a suite: figures per model, and the paired difference of every two (later minus earlier).

    Args:
        scores: model name -> scores of all rows of the suite, in the order of the table's columns.
        seed: of the bootstrap.

    Returns:
        `{"name", "kind", "rows", "left_out", "metrics"}`; `metrics[name]` holds `unit`, `models`, `differences`
        and `undecided` (model -> rows without a verdict). A metric without any verdict has no entry for that model.
    """
    shared = [row for row in range(len(suite.rows)) if all(scores[name][row] is not None for name in scores)]
    columns = {name: [rows[row] for row in shared] for name, rows in scores.items()}
    metrics = {metric: _metric(metric, unit, columns, seed) for metric, unit in suite.units().items()}
    left_out = len(suite.rows) - len(shared)
    return {"name": suite.name, "kind": suite.kind, "rows": len(shared), "left_out": left_out, "metrics": metrics}


def _metric(metric: str, unit: Unit, columns: Mapping[str, list[Any]], seed: int) -> dict[str, Any]:
    models: dict[str, Any] = {}
    undecided: dict[str, int] = {}
    for name, rows in columns.items():
        decided = [row for row in rows if row.values[metric] is not None]
        if len(decided) < len(rows):
            undecided[name] = len(rows) - len(decided)
        if decided:
            models[name] = asdict(_figure(unit, decided, metric, seed))
    differences = []
    for earlier, later in combinations(columns, 2):
        pairs = [
            (old.values[metric], new.values[metric], new.weight)
            for old, new in zip(columns[earlier], columns[later], strict=True)
            if old.values[metric] is not None and new.values[metric] is not None
        ]
        if pairs:
            old_values, new_values, weights = zip(*pairs, strict=True)
            difference = paired_difference(old_values, new_values, weights, seed)
            differences.append({"model": later, "minus": earlier, **asdict(difference)})
    return {"unit": unit, "models": models, "differences": differences, "undecided": undecided}


def _figure(unit: Unit, rows: list[RowScore], metric: str, seed: int) -> Interval:
    values = [row.values[metric] or 0.0 for row in rows]
    if unit == "share":
        return proportion(int(sum(values)), len(values))
    return ratio(values, [row.weight for row in rows], seed)
