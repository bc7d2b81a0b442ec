"""What closes an assistant's turn, found by rendering: names and configuration files lie."""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from posttrain.chat.encode import Encoder, encoder_of, pattern_of
from posttrain.chat.jinja import Message, render_text
from posttrain.chat.templates import ChatTemplate
from posttrain.errors import ChatError

_USER: Message = {"role": "user", "content": "Sentinelone"}
_ANSWER: Message = {"role": "assistant", "content": "Sentineltwo"}
_NEXT: Message = {"role": "user", "content": "Sentinelthree"}


@dataclass(frozen=True)
class EndOfTurn:
    """The one token after which an answer is over."""

    text: str
    id: int


def end_of_turn(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> EndOfTurn:
    """Returns the control token that closes an assistant's turn, wherever in the conversation it stands.

    Raises:
        ChatError: there is none (no token, several tokens, or another one after the last turn than before it).
    """
    encoder = encoder_of(tokenizer)
    key = ("end of turn", template.source, tokenizer.eos_token, tokenizer.bos_token)
    if key not in encoder.remembered:
        encoder.remembered[key] = _find(tokenizer, template, encoder)
    return encoder.remembered[key]


def required_tokens_missing(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> list[str]:
    """Lists the tokens that a bundled template needs and the tokenizer lacks (or splits into several)."""
    added = set(encoder_of(tokenizer).added.values())
    own = {"eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token}
    return [text for text in template.facts.required_tokens if own.get(text, text) not in added]


def missing_tokens_remedy(template: ChatTemplate) -> str:
    """What to do where a tokenizer lacks the tokens of a template."""
    return (
        "choose a template by the tokens there are (plain, tulu and zephyr need only an eos_token), or give the "
        f"model these tokens: posttrain doctor BASE --template {template.name} --fix OUT"
    )


def _find(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, encoder: Encoder) -> EndOfTurn:
    where = f"chat template {template.name}"
    if missing := required_tokens_missing(tokenizer, template):
        raise ChatError(
            where,
            f"needs {', '.join(missing)}, which this tokenizer does not have as one token each",
            missing_tokens_remedy(template),
        )
    between = _after_answer(tokenizer, template, [_USER, _ANSWER, _NEXT]).split(_NEXT["content"])[0]
    last = _after_answer(tokenizer, template, [_USER, _ANSWER])
    control = [token for token in encoder.encode(between)[0] if token in encoder.added]
    if not control:
        raise ChatError(
            where,
            f"closes an answer with {between!r}, which is no token of this tokenizer",
            "choose a template whose end of turn it has as one token: plain, tulu and zephyr use its eos_token "
            f"({tokenizer.eos_token or 'not set'})",
        )
    end = EndOfTurn(encoder.added[control[0]], control[0])
    if end.text not in last:
        raise ChatError(
            where,
            f"closes an answer with {end.text!r} only when something follows; the last one ends with {last!r}",
            "choose a template that closes every answer with the same token",
        )
    return end


def _after_answer(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, messages: list[Message]) -> str:
    text = render_text(tokenizer, template, messages)
    _, found, after = text.partition(_ANSWER["content"])
    if not found:
        raise ChatError(f"chat template {template.name}", "leaves out what the assistant says", "choose another one")
    return after


def answer_opening(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> str:
    """Returns what a generation prompt adds to a conversation: the header of an answer, or nothing."""
    encoder = encoder_of(tokenizer)
    key = ("answer opening", template.source, tokenizer.eos_token, tokenizer.bos_token)
    if key not in encoder.remembered:
        turn = render_text(tokenizer, template, [_USER])
        encoder.remembered[key] = render_text(tokenizer, template, [_USER], add_generation_prompt=True)[len(turn) :]
    return encoder.remembered[key]


def answer_pattern(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> re.Pattern[str]:
    """Compiles what must be plain text inside an answer: special tokens, and those that structure turns.

    Other added tokens (`<think>`, `<tool_call>`) keep their ids there: models write them.
    """
    encoder = encoder_of(tokenizer)
    key = ("answer pattern", template.source, tokenizer.eos_token, tokenizer.bos_token)
    if key not in encoder.remembered:
        turn = render_text(tokenizer, template, [_USER])
        opening = encoder.encode(answer_opening(tokenizer, template))[0]
        header = [token for token in opening if token in encoder.added][:1]
        structure = {*encoder.encode(turn)[0], *header, end_of_turn(tokenizer, template).id, *encoder.special}
        encoder.remembered[key] = pattern_of([text for token, text in encoder.added.items() if token in structure])
    return encoder.remembered[key]
