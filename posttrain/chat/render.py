"""The one rendering path: conversations to token ids and labels, for training, evaluation, chat and export.

Loss lies on what the assistant says and the token that ends its turn, and on nothing else, by rendering
and offsets, for any template. A prompt's ids are always the beginning of the row's ids. Control tokens
inside messages are plain text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from re import Pattern
from typing import Any

from transformers import PreTrainedTokenizerFast

from posttrain.chat.encode import BREAK, break_up, encoder_of
from posttrain.chat.jinja import Message, Tools, render_marked, render_text
from posttrain.chat.templates import ChatTemplate
from posttrain.chat.turns import EndOfTurn, answer_pattern, end_of_turn
from posttrain.errors import ChatError

MASKED = -100
ROLES = frozenset(
    ["system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "tool_results"]
)
_SPOKEN = ("system", "developer", "user", "assistant")
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it."""

    text: str
    input_ids: list[int]
    labels: list[int]
    """As `input_ids`, -100 where there is no loss."""
    spans: list[tuple[int, int]]
    """Characters of `text` that carry loss: an answer and its end-of-turn token each."""
    straddled: int
    """Answers whose first characters would have joined the prompt's last token; the text was cut there."""


@dataclass(frozen=True)
class _Layout:
    """A rendered text, with BREAKs where contents hold control tokens, and the answers in it."""

    text: str
    spans: list[tuple[int, int]]


def render_conversation(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, messages: Sequence[Message], tools: Tools = None
) -> Rendered:
    """Renders a conversation with labels on every assistant turn.

    Raises:
        ChatError: the template rewrites history, has a generation prompt that is no prefix of the turn,
            leaves a message out, or cannot render the conversation; `where` names the message.
    """
    answers = {index for index, message in enumerate(messages) if message.get("role") == "assistant"}
    layout = _lay_out(tokenizer, template, messages, tools, answers)
    encoded = encoder_of(tokenizer).encode_at(layout.text, [start for start, _ in layout.spans])
    ids, labels = encoded.ids, [MASKED] * len(encoded.ids)
    for (_, stop), first in zip(layout.spans, encoded.firsts, strict=True):
        after = _after_end(ids, encoded.starts, stop, end_of_turn(tokenizer, template))
        labels[first:after] = ids[first:after]
    spans = [(_plain_index(layout.text, start), _plain_index(layout.text, stop)) for start, stop in layout.spans]
    return Rendered(layout.text.replace(BREAK, ""), ids, labels, spans, encoded.straddled)


def render_prompt(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, messages: Sequence[Message], tools: Tools = None
) -> list[int]:
    """Returns the ids of a conversation that awaits an answer, generation prompt included.

    Raises:
        ChatError: the template cannot render the conversation, or leaves a message out.
    """
    layout = _lay_out(tokenizer, template, messages, tools, answers=(), prompt=True)
    return encoder_of(tokenizer).encode_at(layout.text, [start for start, _ in layout.spans]).ids


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
    prompt_ids, chosen_ids = _complete(tokenizer, template, prompt, chosen, tools, "chosen")
    other_prompt, rejected_ids = _complete(tokenizer, template, prompt, rejected, tools, "rejected")
    if prompt_ids != other_prompt:
        raise ChatError(
            f"chat template {template.name}",
            "writes the prompt differently before the chosen and the rejected answer",
            "choose a template that keeps history as it was",
        )
    return prompt_ids, chosen_ids, rejected_ids


def _complete(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    prompt: Sequence[Message],
    answer: Sequence[Message],
    tools: Tools,
    which: str,
) -> tuple[list[int], list[int]]:
    if len(answer) != 1 or answer[0].get("role") != "assistant":
        roles = ", ".join(str(message.get("role")) for message in answer) or "no message"
        raise ChatError(which, f"is {roles}, not one assistant message", "put what comes before it into the prompt")
    layout = _lay_out(tokenizer, template, [*prompt, *answer], tools, answers={len(prompt)})
    encoded = encoder_of(tokenizer).encode_at(layout.text, [start for start, _ in layout.spans])
    after = _after_end(encoded.ids, encoded.starts, layout.spans[-1][1], end_of_turn(tokenizer, template))
    return encoded.ids[: encoded.firsts[-1]], encoded.ids[encoded.firsts[-1] : after]


def _lay_out(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools,
    answers: Collection[int],
    prompt: bool = False,
) -> _Layout:
    """Renders messages and finds their answers; only those of `answers` must be provable."""
    if not messages:
        raise ChatError("conversation", "has no message", "remove the row")
    safe_messages, safe_tools = _without_control_tokens(tokenizer, template, messages, tools)
    if template.facts.marks == "exact":
        text, spans = render_marked(tokenizer, template, safe_messages, safe_tools, prompt)
    else:
        text = render_text(tokenizer, template, safe_messages, safe_tools, prompt)
        spans = list(_prove_spans(tokenizer, template, text, safe_messages, safe_tools, answers))
    plain = text.replace(BREAK, "")
    if safe_messages is not messages and plain != render_text(tokenizer, template, messages, tools, prompt):
        raise ChatError(
            f"chat template {template.name}",
            "reads control tokens inside messages and renders such a message in another way",
            "remove the control tokens from the message, or choose a template that takes contents as they are",
        )
    _check_nothing_left_out(template, plain, messages, tools)
    return _Layout(text, spans)


def _prove_spans(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    text: str,
    messages: Sequence[Message],
    tools: Tools,
    answers: Collection[int],
) -> Iterator[tuple[int, int]]:
    """Yields the span of each answer by rendering the conversation up to it and with it.

    An answer of `answers` that cannot be placed so is refused; any other is passed over.
    """
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        wanted = index in answers
        try:
            before = render_text(tokenizer, template, messages[:index], tools, add_generation_prompt=True)
        except ChatError:
            if wanted:
                raise
            continue
        after = text if index + 1 == len(messages) else render_text(tokenizer, template, messages[: index + 1], tools)
        end = end_of_turn(tokenizer, template).text if wanted else ""
        closing = after.find(end, len(before))  # after it, some templates close the whole text with an EOS
        stop = closing + len(end)
        if closing >= 0 and text.startswith(before) and text.startswith(after[:stop]):
            yield len(before), stop
        elif wanted:
            raise ChatError(
                f"chat template {template.name}, message {index + 1}",
                _what_moved(*(part.replace(BREAK, "") for part in (text, before, after))),
                "choose a template that writes every turn once and for all"
                + ("" if index + 1 == len(messages) else ", or train on conversations with one answer"),
            )


def _what_moved(text: str, before: str, after: str) -> str:
    if not after.startswith(before):
        at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        return (
            "the prompt for this answer is not how the conversation with the answer begins: "
            f"{before[at : at + 30]!r} becomes {after[at : at + 30]!r}"
        )
    if not text.startswith(before):
        return "the template rewrites history: what stands before this answer changes when turns follow"
    return "the template rewrites history: this answer is written differently, or not closed, when turns follow"


def _without_control_tokens(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, messages: Sequence[Message], tools: Tools
) -> tuple[Sequence[Message], Tools]:
    """Breaks up control tokens inside messages and tools; returns the very arguments where there are none."""
    pattern = encoder_of(tokenizer).forbidden
    changed, safe = False, []
    for index, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise ChatError(f"message {index + 1}", f"role {role!r}", f"use one of {', '.join(sorted(ROLES))}")
        if _contains(message, pattern):
            own = answer_pattern(tokenizer, template) if role == "assistant" else pattern
            message = {key: value if key == "role" else _broken(value, own) for key, value in message.items()}
            changed = True
        safe.append(message)
    safe_tools = [_broken(tool, pattern) for tool in tools] if tools and _contains(tools, pattern) else tools
    return (safe if changed or safe_tools is not tools else messages), safe_tools


def _contains(value: Any, pattern: Pattern[str]) -> bool:
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, dict):
        return any(_contains(key, pattern) or _contains(inner, pattern) for key, inner in value.items())
    return isinstance(value, (list, tuple)) and any(_contains(inner, pattern) for inner in value)


def _broken(value: Any, pattern: Pattern[str]) -> Any:
    if isinstance(value, str):
        return break_up(value, pattern)
    if isinstance(value, dict):
        return {_broken(key, pattern): _broken(inner, pattern) for key, inner in value.items()}
    return [_broken(inner, pattern) for inner in value] if isinstance(value, (list, tuple)) else value


def _check_nothing_left_out(template: ChatTemplate, text: str, messages: Sequence[Message], tools: Tools) -> None:
    for index, message in enumerate(messages):
        where = f"chat template {template.name}, message {index + 1} ({message['role']})"
        content = message.get("content")
        as_is = message["role"] in _SPOKEN and "</think>" not in str(content)  # others may be written as JSON
        if as_is and isinstance(content, str) and content.strip() not in text:
            raise ChatError(where, "its content is left out or changed", "choose a template that has this role")
        calls = message.get("tool_calls") or []
        names = [str(call.get("function", call).get("name", "")) for call in calls]
        if any(name not in text for name in names):
            raise ChatError(where, "its tool calls are left out", "choose a template that writes tool calls")
        reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
        if isinstance(reasoning, str) and reasoning.strip() not in text:
            raise ChatError(where, "its reasoning is left out", "remove the field, or choose a template that keeps it")
    if any(str(tool.get("function", tool).get("name", "")) not in text for tool in tools or []):
        raise ChatError(f"chat template {template.name}", "leaves the tools out", "choose a template that writes tools")


def _after_end(ids: list[int], starts: list[int], stop: int, end: EndOfTurn) -> int:
    """Index just after the end-of-turn token that closes a span (it may have eaten white space around it)."""
    last = bisect_right(starts, stop - len(end.text)) - 1
    if ids[last] != end.id:
        raise ChatError(
            "tokenizer", f"does not make the token {end.text!r} at the end of an answer", "check its added tokens"
        )
    return last + 1


def _plain_index(text: str, index: int) -> int:
    return index - text.count(BREAK, 0, index)
