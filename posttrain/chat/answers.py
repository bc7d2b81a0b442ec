"""Where the assistant's answers stand in a rendered text: by the template's marks, or proved by rendering."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from transformers import PreTrainedTokenizerFast

from posttrain.chat.encode import BREAK
from posttrain.chat.jinja import Message, Tools, render_text
from posttrain.chat.templates import ChatTemplate
from posttrain.errors import ChatError

Span = tuple[int, int]
"""(start, end) characters of a rendered text: what the assistant says and the token that ends its turn."""


def marks_hold(
    text: str, marks: Sequence[Span], messages: Sequence[Message], opening: str, end: str, closed: bool
) -> bool:
    """Whether generation marks are, one for one and in order, the answers of a conversation.

    Each must begin where a generation prompt ends, end with the first end-of-turn token in it, and hold what
    the message says and nothing else (more only where the message has more than its content).

    Args:
        opening: what a generation prompt adds, see `posttrain.chat.turns.answer_opening`.
        end: the end-of-turn token's text.
        closed: False where the last answer is left open, so that its mark ends in nothing.
    """
    answers = [message for message in messages if message.get("role") == "assistant"]
    if len(marks) != len(answers):
        return False
    for number, ((start, stop), message) in enumerate(zip(marks, answers, strict=True), start=1):
        if not text.endswith(opening, 0, start):
            return False
        if not closed and number == len(answers):
            continue
        inner = stop - len(end)
        if text.find(end, start, stop) != inner:
            return False
        if not _says(text[start:inner], message):
            return False
    return True


def _says(text: str, message: Message) -> bool:
    """Whether a text is a message's content; for one with more than content (tool calls, reasoning), holds it."""
    content = message.get("content")
    if not isinstance(content, str):
        return content is None and len(message) > 2
    return content.strip() == text.strip() if len(message) == 2 else content.strip() in text


def prove_answers(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    text: str,
    messages: Sequence[Message],
    tools: Tools,
    answers: Collection[int],
    end: str,
    known: dict[tuple[int, bool], str],
) -> Iterator[Span]:
    """Yields the span of each answer by rendering the conversation up to it and with it.

    An answer of `answers` that cannot be placed so is refused; any other is passed over.

    Args:
        end: the end-of-turn token's text.
        known: what the first n messages render to, by (n, with a generation prompt); it grows.

    Raises:
        ChatError: the template rewrites history, or has a generation prompt that is no prefix of the turn.
    """
    for index, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        wanted = index in answers
        try:
            for count, prompt in ((index, True), (index + 1, False)):
                if (count, prompt) not in known:
                    known[count, prompt] = render_text(tokenizer, template, messages[:count], tools, prompt)
        except ChatError:
            if wanted:
                raise
            continue
        before, after = known[index, True], known[index + 1, False]
        closed_by = end if wanted else ""
        closing = after.find(closed_by, len(before))  # after it, some templates close the whole text with an EOS
        stop = closing + len(closed_by)
        if closing >= 0 and text.startswith(before) and text.startswith(after[:stop]):
            yield len(before), stop
        elif wanted:
            found, todo = _what_moved(*(part.replace(BREAK, "") for part in (text, before, after)))
            raise ChatError(f"chat template {template.name}, message {index + 1}", found, todo)


def _what_moved(text: str, before: str, after: str) -> tuple[str, str]:
    """What was found, and what to do about it."""
    if not after.startswith(before):
        at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        return (
            "the prompt for this answer is not how the conversation with the answer begins: "
            f"{before[at : at + 30]!r} becomes {after[at : at + 30]!r}",
            "choose a template that writes every turn once and for all",
        )
    if text == after:
        return "this answer is not closed by the token that closes others", "choose a template that closes every answer"
    todo = (
        "make one row per answer (in a recipe, `data.history: split`), "
        "or choose a template that writes every turn once and for all"
    )
    if not text.startswith(before):
        return "the template rewrites history: what stands before this answer changes when turns follow", todo
    return "the template rewrites history: this answer is written differently, or not closed, when turns follow", todo
