"""Defects of a template's generation marks: what they hold against what the assistant says."""

from __future__ import annotations

import re
from collections.abc import Iterator

from posttrain.chat.jinja import Message, render_marked
from posttrain.chat.templates import ChatTemplate
from posttrain.doctor.catalogue import Finding, found
from posttrain.doctor.probes import ANSWER, LAST, NEXT, USER, Probes
from posttrain.errors import ChatError

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def marks(source: str, probes: Probes) -> Iterator[Finding]:
    """Finds generation marks of a template's text that hold more, or less, than answers and their end of turn.

    White space around an answer is not counted: it is trained or not, and nothing depends on it.
    """
    if not _MARK.search(source):
        return
    where, talk = f"template {probes.template.name}", [USER, ANSWER, NEXT, LAST]
    try:
        text, spans = render_marked(probes.tokenizer, ChatTemplate(probes.template.name, source), talk)
    except ChatError as error:
        yield found("template-broken", where, f"its marks do not render: {error.found}", "correct them")
        return
    end = probes.end
    remedy = "write the marks around each answer and the token that ends it"
    answers = [
        _expected(text, probes, question, answer, end.text if end else "")
        for question, answer in ((USER, ANSWER), (NEXT, LAST))
    ]
    if len(spans) != len(answers):
        cause = f"{len(spans)} marked pieces in a conversation with {len(answers)} answers"
        yield found("marks-wrong", where, cause, remedy)
        return
    for (begin, stop), (start, finish) in zip(answers, spans, strict=True):
        held = text[start:finish]
        if end is not None and f"{held.strip()}{end.text}" == text[begin:stop].strip():
            cause = f"hold {held!r} without {end.text!r}: it is never trained"
            yield found("end-of-turn-outside-marks", where, cause, "move the end mark behind it, as --fix does")
            return
        if held.strip() != text[begin:stop].strip():
            yield found("marks-wrong", where, f"hold {held[:60]!r}, the answer is {text[begin:stop]!r}", remedy)
            return


def _expected(text: str, probes: Probes, question: Message, answer: Message, end: str) -> tuple[int, int]:
    """First and last character of an answer with its end of turn: from where a prompt ends (a thought may follow)."""
    asked = text.index(str(question["content"])) + len(str(question["content"]))
    prompt = (probes.text([question], prompt=True) or "").partition(str(question["content"]))[2]
    said = text.index(str(answer["content"]))
    begin = asked + len(prompt) if text.startswith(prompt, asked) else said
    closing = text.find(end, said) if end else -1
    return begin, closing + len(end) if closing >= 0 else said + len(str(answer["content"]))
