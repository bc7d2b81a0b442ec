"""The one rendering path: conversations to token ids and labels, for training, evaluation, chat and export.

Loss lies on what the assistant says and the token that ends its turn, and on nothing else, by rendering
and offsets, for any template. A prompt's ids are always the beginning of the row's ids. Control tokens
inside messages are plain text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerFast

from posttrain.chat.answers import Span, marks_hold, prove_answers
from posttrain.chat.contents import ROLES, check_nothing_left_out, without_control_tokens
from posttrain.chat.encode import BREAK, Encoded, encoder_of
from posttrain.chat.jinja import Message, Tools, render_marked, render_text
from posttrain.chat.templates import ChatTemplate
from posttrain.chat.turns import EndOfTurn, answer_opening, end_of_turn
from posttrain.errors import ChatError

__all__ = [
    "MASKED",
    "ROLES",
    "Rendered",
    "render_conversation",
    "render_conversations",
    "render_pair",
    "render_pairs",
    "render_prompt",
    "render_turns",
]

AnyPair = tuple[Sequence[Message], Sequence[Message], Sequence[Message], Tools]
"""(prompt, chosen, rejected, tools)."""
PairIds = tuple[list[int], list[int], list[int]]
"""Ids of a prompt and of two answers to it."""
MASKED = -100
_CHUNK = 256
"""Conversations whose texts are encoded together."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it."""

    text: str
    input_ids: list[int]
    labels: list[int]
    """As `input_ids`, -100 where there is no loss."""
    spans: list[Span]
    """Characters of `text` that carry loss: an answer and its end-of-turn token each."""
    straddled: int
    """Answers whose first characters would have joined the prompt's last token; the text was cut there."""
    runs: list[Span] = field(default_factory=list)
    """(start, end) places of `input_ids` that carry loss: `labels` in short."""


@dataclass(frozen=True)
class _Layout:
    """A rendered text, with BREAKs where contents hold control tokens, and the answers in it."""

    text: str
    spans: list[Span]
    trained: int
    """How many of the answers carry loss: the last ones."""

    @property
    def starts(self) -> list[int]:
        """Where answers begin: the text is encoded so that no token lies across."""
        return [start for start, _ in self.spans]


def render_conversation(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, messages: Sequence[Message], tools: Tools = None
) -> Rendered:
    """Renders a conversation with labels on every assistant turn.

    Raises:
        ChatError: the template rewrites history, has a generation prompt that is no prefix of the turn,
            leaves a message out, or cannot render the conversation; `where` names the message.
    """
    return _encode(tokenizer, template, _lay_out_whole(tokenizer, template, messages, tools))


def render_turns(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, messages: Sequence[Message], tools: Tools = None
) -> list[Rendered]:
    """Renders a conversation as one row where that can be, else as one row per assistant turn.

    The row of a turn is the conversation up to it, as the template writes it then, with labels on that turn
    alone: what templates need that rewrite history (reasoning is dropped from earlier turns, a closing token
    is moved). Messages after the last assistant turn are in none of these rows.

    Raises:
        ChatError: as for a conversation, of the first turn that cannot be rendered alone either.
    """
    try:
        return [render_conversation(tokenizer, template, messages, tools)]
    except ChatError:
        if not _can_be_split(messages):
            raise
    return [_encode(tokenizer, template, layout) for layout in _lay_out_turns(tokenizer, template, messages, tools)]


def render_conversations(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    conversations: Iterable[tuple[Sequence[Message], Tools]],
    split: bool = False,
) -> Iterator[list[Rendered] | ChatError]:
    """Renders many conversations, their texts encoded together on all cores: the same rows, sooner.

    Args:
        split: as `render_turns`; else one row each, as `render_conversation`.

    Yields:
        For each conversation, in order, its rows, or the error that rendering it alone would raise.
    """
    remaining, encoder = iter(conversations), encoder_of(tokenizer)
    while chunk := list(islice(remaining, _CHUNK)):
        laid_out = [_attempt(_lay_out_whole, tokenizer, template, *each) for each in chunk]
        encoder.expect([(one.text, one.starts) for one in laid_out if isinstance(one, _Layout)])
        for (messages, tools), one in zip(chunk, laid_out, strict=True):
            made = _attempt(_encode, tokenizer, template, one) if isinstance(one, _Layout) else one
            if isinstance(made, Rendered):
                made = [made]
            elif split and _can_be_split(messages):
                made = _attempt(render_turns, tokenizer, template, messages, tools)
            yield made


def render_prompt(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools = None,
    continue_final_message: bool = False,
) -> list[int]:
    """Returns the ids of a conversation that awaits an answer, generation prompt included.

    Args:
        continue_final_message: the last message is an answer that is to be continued: it is left open, and
            the ids are the beginning of those of the conversation that ends with it (but for white space at its
            end where the end of turn eats that).

    Raises:
        ChatError: the template cannot render the conversation, or leaves a message out; or there is no
            assistant message to continue.
    """
    if continue_final_message and (not messages or messages[-1].get("role") != "assistant"):
        raise ChatError("conversation", "ends with no assistant message to continue", "add the answer's beginning")
    how = {"add_generation_prompt": not continue_final_message, "continue_final_message": continue_final_message}
    layout = _lay_out(tokenizer, template, messages, tools, (), {}, **how)
    return encoder_of(tokenizer).encode_at(layout.text, layout.starts).ids


def render_pair(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    prompt: Sequence[Message],
    chosen: Sequence[Message],
    rejected: Sequence[Message],
    tools: Tools = None,
) -> tuple[list[int], list[int], list[int]]:
    """Returns the ids of a prompt and of two answers to it, each ending with the end-of-turn token.

    Raises:
        ChatError: as for a conversation; an answer is not exactly one assistant message; or the
            template writes the prompt differently before the two answers.
    """
    (made,) = render_pairs(tokenizer, template, [(prompt, chosen, rejected, tools)])
    if isinstance(made, ChatError):
        raise made
    return made


def render_pairs(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, pairs: Iterable[AnyPair]
) -> Iterator[PairIds | ChatError]:
    """Renders many pairs, their texts encoded together: the same ids, sooner.

    Args:
        pairs: (prompt, chosen, rejected, tools) of each.

    Yields:
        For each pair, in order, what `render_pair` returns, or the error that it raises.
    """
    remaining, encoder = iter(pairs), encoder_of(tokenizer)
    while chunk := list(islice(remaining, _CHUNK)):
        laid_out = [
            [
                _attempt(_lay_out_answer, tokenizer, template, prompt, answer, tools, which)
                for answer, which in ((chosen, "chosen"), (rejected, "rejected"))
            ]
            for prompt, chosen, rejected, tools in chunk
        ]
        encoder.expect([(one.text, one.starts) for both in laid_out for one in both if isinstance(one, _Layout)])
        for both in laid_out:
            yield _attempt(_encode_pair, tokenizer, template, *both)


def _encode_pair(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    chosen: _Layout | ChatError,
    rejected: _Layout | ChatError,
) -> PairIds:
    prompt_ids, chosen_ids = _encode_answer(tokenizer, template, chosen)
    other_prompt, rejected_ids = _encode_answer(tokenizer, template, rejected)
    if prompt_ids != other_prompt:
        raise ChatError(
            f"chat template {template.name}",
            "writes the prompt differently before the chosen and the rejected answer",
            "choose a template that keeps history as it was",
        )
    return prompt_ids, chosen_ids, rejected_ids


def _lay_out_answer(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    prompt: Sequence[Message],
    answer: Sequence[Message],
    tools: Tools,
    which: str,
) -> _Layout:
    if len(answer) != 1 or answer[0].get("role") != "assistant":
        roles = ", ".join(str(message.get("role")) for message in answer) or "no message"
        raise ChatError(which, f"is {roles}, not one assistant message", "put what comes before it into the prompt")
    return _lay_out(tokenizer, template, [*prompt, *answer], tools, [len(prompt)], {})


def _encode_answer(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, layout: _Layout | ChatError
) -> tuple[list[int], list[int]]:
    """Ids of a prompt, and of the last answer up to its end-of-turn token."""
    if isinstance(layout, ChatError):
        raise layout
    encoded = encoder_of(tokenizer).encode_at(layout.text, layout.starts)
    first = encoded.firsts[-1]
    after = _after_end(encoded, first, layout.spans[-1][1], end_of_turn(tokenizer, template))
    return encoded.ids[:first], encoded.ids[first:after]


def _attempt(work: Callable[..., Any], *given: Any) -> Any:
    """What a call returns, or the user's error that it raises."""
    try:
        return work(*given)
    except ChatError as error:
        return error


def _can_be_split(messages: Sequence[Message]) -> bool:
    answers = sorted(_answers(messages))
    return bool(answers) and answers != [len(messages) - 1]  # that would be the row it is


def _lay_out_whole(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, messages: Sequence[Message], tools: Tools
) -> _Layout:
    return _lay_out(tokenizer, template, messages, tools, _answers(messages), {})


def _lay_out_turns(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, messages: Sequence[Message], tools: Tools
) -> Iterator[_Layout]:
    known: dict[tuple[int, bool], str] = {}
    for index in sorted(_answers(messages)):
        layout = _lay_out(tokenizer, template, messages[: index + 1], tools, [index], known)
        yield replace(layout, trained=1)


def _answers(messages: Sequence[Message]) -> set[int]:
    return {index for index, message in enumerate(messages) if message.get("role") == "assistant"}


def _lay_out(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools,
    answers: Collection[int],
    known: dict[tuple[int, bool], str],
    **how: bool,
) -> _Layout:
    """Renders messages and finds their answers; only those of `answers` must be provable."""
    if not messages:
        raise ChatError("conversation", "has no message", "remove the row")
    safe_messages, safe_tools = without_control_tokens(tokenizer, template, messages, tools)
    marked, spans = template.facts.marks == "exact", None
    end = end_of_turn(tokenizer, template).text if answers or marked else ""  # a prompt alone may have none
    if marked:
        text, marks = render_marked(tokenizer, template, safe_messages, safe_tools, **how)
        opening, closed = answer_opening(tokenizer, template), not how.get("continue_final_message")
        if marks_hold(text, marks, safe_messages, opening, end, closed):
            spans = marks
    else:
        text = render_text(tokenizer, template, safe_messages, safe_tools, **how)
    if not how:
        known[len(messages), False] = text
    if spans is None:  # no marks, or marks that are not this conversation's answers
        spans = list(prove_answers(tokenizer, template, text, safe_messages, safe_tools, answers, end, known))
    plain = text.replace(BREAK, "")
    if safe_messages is not messages and plain != render_text(tokenizer, template, messages, tools, **how):
        raise ChatError(
            f"chat template {template.name}",
            "reads control tokens inside messages and renders such a message in another way",
            "remove the control tokens from the message, or choose a template that takes contents as they are",
        )
    check_nothing_left_out(template, plain, messages, tools, answers)
    return _Layout(text, spans, len(spans))


def _encode(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, layout: _Layout) -> Rendered:
    """Encodes a text, cut where an answer begins, with labels on the answers that are trained."""
    text, encoded = layout.text, encoder_of(tokenizer).encode_at(layout.text, layout.starts)
    ids, labels, runs = encoded.ids, [MASKED] * len(encoded.ids), []
    skipped = len(layout.spans) - layout.trained
    spans = layout.spans[skipped:]
    if spans:
        end = end_of_turn(tokenizer, template)
        for (_, stop), first in zip(spans, encoded.firsts[skipped:], strict=True):
            after = _after_end(encoded, first, stop, end)
            labels[first:after] = ids[first:after]
            runs.append((first, after))
    if BREAK in text:
        spans = [(_plain_index(text, start), _plain_index(text, stop)) for start, stop in spans]
        text = text.replace(BREAK, "")
    return Rendered(text, ids, labels, spans, encoded.straddled, runs)


def _after_end(encoded: Encoded, first: int, stop: int, end: EndOfTurn) -> int:
    """Index just after the end-of-turn token that closes a span (it may have eaten white space around it).

    Args:
        first: index of the span's first token.
        stop: character after the span.
    """
    piece = bisect_right(encoded.starts, stop - len(end.text)) - 1
    place = encoded.places[piece]
    if place < first or encoded.ids[place] != end.id:
        raise ChatError(
            "tokenizer", f"does not make the token {end.text!r} at the end of an answer", "check its added tokens"
        )
    return place + 1


def _plain_index(text: str, index: int) -> int:
    return index - text.count(BREAK, 0, index)
