"""Generation marks for any template, where it is proved that nothing else changes.

The body of the loop over messages is captured as text, and an assistant's text is written in three
parts: header, answer with its end of turn (between the marks), and the rest. The body itself stays as it
is, so every byte does. What was made is then tried on generated conversations: the text must be that of
the unmarked template, and the marks the answers that are found there by rendering prefixes.

The marked text is for rendering: model folders get the template's own text (`ChatTemplate.saved`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import jinja2
from jinja2.ext import loopcontrols
from transformers import PreTrainedTokenizerFast

from posttrain.chat.answers import prove_answers
from posttrain.chat.contents import without_control_tokens
from posttrain.chat.corpus import Conversation, conversations
from posttrain.chat.encode import encoder_of
from posttrain.chat.jinja import Message, render_marked, render_text
from posttrain.chat.templates import ChatTemplate
from posttrain.chat.turns import end_of_turn
from posttrain.errors import ChatError

_PROOF, _FORGED, _SEED = 150, 10, 20261122
_ENOUGH = 10  # conversations with an answer that must render for a proof to mean anything
_USER: Message = {"role": "user", "content": "Sentinelone"}
_BLOCKS = frozenset("for if macro call filter with block autoescape".split())
_CAPTURES = frozenset("macro call filter set block".split())
_ENVIRONMENT = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])  # as transformers
_TURN, _FROM, _TO = "posttrain_turn", "posttrain_from", "posttrain_to"


@dataclass(frozen=True)
class Marking:
    """A template with proved marks, or why there are none."""

    template: ChatTemplate | None
    reason: str
    """One line; empty where there is a template."""


def mark(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> Marking:
    """Returns the template with marks that were proved with this tokenizer, or why they cannot be.

    Marks that the template has already are kept where they are exact. Costs some hundred renderings,
    once per tokenizer and template; without a marked template, render with offsets.
    """
    if template.facts.marks == "exact":
        return Marking(template, "")
    remembered = encoder_of(tokenizer).remembered
    key = ("marking", template.source, tokenizer.eos_token, tokenizer.bos_token)
    if key not in remembered:
        remembered[key] = _mark(tokenizer, template)
    source, reason = remembered[key]
    if source is None:
        return Marking(None, reason)
    return Marking(replace(_exact(template, source), saved=template.inference), "")


def _mark(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> tuple[str | None, str]:
    """The marked source, or None and the reason."""
    plain = ChatTemplate(template.name, template.inference, replace(template.facts, marks="unproved"))
    try:
        end = end_of_turn(tokenizer, plain).text
        header = _header(tokenizer, plain)
    except ChatError as error:
        return None, error.found
    reason = "it has no loop over messages whose text could be marked"
    if template.source != template.inference:
        reason = _disproof(tokenizer, plain, _exact(template, template.source), header, end)
        if not reason:
            return template.source, ""
    source = _marked(plain.source, header, end)
    if source == plain.source:
        return None, reason
    reason = _disproof(tokenizer, plain, _exact(template, source), header, end)
    return (None, reason) if reason else (source, "")


def _exact(template: ChatTemplate, source: str) -> ChatTemplate:
    return replace(template, source=source, facts=replace(template.facts, marks="exact"))


def _header(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> str:
    """What the generation prompt adds to a user's turn."""
    turn = render_text(tokenizer, template, [_USER])
    prompt = render_text(tokenizer, template, [_USER], add_generation_prompt=True)
    same = next((at for at, (a, b) in enumerate(zip(turn, prompt, strict=False)) if a != b), len(turn))
    return prompt[same:]


# --- rewriting ---


@dataclass(frozen=True)
class _Tag:
    """A `{% ... %}` of a template."""

    tokens: tuple[str, ...]
    start: int
    """Position of its `{`."""
    stop: int
    """Position after its `}`."""
    opens: str
    """White space control after `{%`: "-", "+" or nothing."""
    closes: str
    """White space control before `%}`."""
    written: int
    """How many pieces of text or `{{ ... }}` stand before it."""

    @property
    def keyword(self) -> str:
        return self.tokens[0]


@dataclass(frozen=True)
class _Loop:
    """A loop, by the tags before and after its body, and the name of its variable."""

    name: str
    first: _Tag
    last: _Tag


def _marked(source: str, header: str, end: str) -> str:
    """Captures the body of each outer loop, and marks what an assistant's message rendered there."""
    source = _as_lexed(source)
    pieces, at = [], 0
    for loop in _loops(list(_tags(source))):
        # Each tag that is put beside another has its white space control, so the text between stays what it was.
        pieces += [source[at : loop.first.stop], f"{{%- set {_TURN} {loop.first.closes}%}}"]
        pieces += [source[loop.first.stop : loop.last.start], f"{{%{loop.last.opens} endset -%}}"]
        pieces += [_slices(loop.name, header, end)]
        at = loop.last.start
    return "".join(pieces) + source[at:]


def _slices(name: str, header: str, end: str) -> str:
    """Jinja that writes the captured text: an assistant's in three parts, the middle one marked."""
    header_text, end_text = (json.dumps(text, ensure_ascii=False) for text in (header, end))
    return (
        f"{{%- set {_FROM} = {_TURN}.find({header_text}) + {len(header)} if {header_text} in {_TURN} else 0 -%}}"
        f"{{%- set {_TO} = {_TURN}.find({end_text}, {_FROM}) + {len(end)} -%}}"
        f"{{%- if {name}['role'] == 'assistant' and {end_text} in {_TURN}[{_FROM}:] -%}}"
        f"{{{{- {_TURN}[:{_FROM}] -}}}}"
        f"{{%- generation -%}}{{{{- {_TURN}[{_FROM}:{_TO}] -}}}}{{%- endgeneration -%}}"
        f"{{{{- {_TURN}[{_TO}:] -}}}}"
        f"{{%- else -%}}{{{{- {_TURN} -}}}}{{%- endif -%}}"
    )


def _loops(tags: list[_Tag]) -> Iterator[_Loop]:
    """Yields loops with one variable that stand in no other loop and in nothing that captures their text."""
    open_tags: list[_Tag] = []
    body_ends: dict[int, _Tag] = {}
    left: set[int] = set()  # loops that break or continue would leave with their text half captured
    for tag in tags:
        if tag.keyword.startswith("end"):
            opened = open_tags.pop()
            body_ends.setdefault(opened.start, tag)
            enclosing = {outer.keyword for outer in open_tags}
            plain = opened.tokens[2:3] == ("in",) and opened.tokens[-1] != "recursive" and opened.start not in left
            if opened.keyword == "for" and plain and not enclosing & {*_CAPTURES, "for"}:
                yield _Loop(opened.tokens[1], opened, body_ends[opened.start])
        elif tag.keyword == "else" and open_tags[-1].keyword == "for":
            body_ends[open_tags[-1].start] = tag
        elif tag.keyword in ("break", "continue"):
            loop = next(outer for outer in reversed(open_tags) if outer.keyword == "for")
            left |= {loop.start} if tag.written > loop.written else set()
        elif tag.keyword in _BLOCKS or (tag.keyword == "set" and "=" not in tag.tokens):
            open_tags.append(tag)


def _as_lexed(source: str) -> str:
    """The text as Jinja's lexer counts it: one kind of newline (the last one is dropped wherever it stands)."""
    return source.replace("\r\n", "\n").replace("\r", "\n")


def _tags(source: str) -> Iterator[_Tag]:
    """Yields the block tags of a template with their places; the lexer gives only lines.

    Args:
        source: valid Jinja with "\\n" as its only newline and without generation marks.
    """
    at, start, opens, written, tokens = 0, 0, "", 0, list[str]()
    for _, kind, value in _ENVIRONMENT.lex(source):
        if kind.endswith("_begin") or kind == "raw_end":  # of what stands before them, white space may be left out
            at = source.index("{", at)
        written += kind in ("data", "variable_begin")
        if kind == "block_begin":
            start, opens, tokens = at, value[2:], []
        elif kind == "block_end":
            closes = value[0] if value[0] in "-+" else ""
            yield _Tag(tuple(tokens), start, at + len(closes) + 2, opens, closes, written)
        elif kind != "whitespace":
            tokens.append(value)
        at += len(value)


# --- proof ---


def _disproof(
    tokenizer: PreTrainedTokenizerFast, plain: ChatTemplate, marked: ChatTemplate, header: str, end: str
) -> str:
    """Says in one line what speaks against a marked template; "" = nothing over the whole corpus."""
    proved, refusal = 0, ""
    for generated in _corpus(header + end):
        messages, tools = without_control_tokens(tokenizer, plain, generated.messages, generated.tools)
        conversation = Conversation(list(messages), tools)
        try:
            texts = [render_text(tokenizer, plain, messages, tools, prompt) for prompt in (False, True)]
        except ChatError as error:
            if _takes(tokenizer, marked, conversation):
                return "marks would let it take what it refuses"
            refusal = refusal or f": {error.found}"
            continue
        if reason := _difference(tokenizer, plain, marked, conversation, end, texts):
            roles = ", ".join(str(message["role"]) for message in messages)
            return f"{reason} (roles: {roles}{'; with tools' if tools else ''})"
        proved += any(message["role"] == "assistant" for message in messages)
    return "" if proved >= _ENOUGH else f"it takes too few conversations to prove anything{refusal}"


def _corpus(control: str) -> Iterator[Conversation]:
    """Generated conversations, the last of them with control tokens in their contents."""
    for index, conversation in enumerate(conversations(_PROOF, _SEED)):
        if index < _PROOF - _FORGED:
            yield conversation
        else:
            yield Conversation(
                [message | {"content": f"{message['content']}{control} x"} for message in conversation.messages],
                conversation.tools,
            )


def _takes(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, conversation: Conversation) -> bool:
    try:
        for prompt in (False, True):
            render_marked(tokenizer, template, conversation.messages, conversation.tools, prompt)
    except ChatError:
        return False
    return True


def _difference(
    tokenizer: PreTrainedTokenizerFast,
    plain: ChatTemplate,
    marked: ChatTemplate,
    conversation: Conversation,
    end: str,
    texts: list[str],
) -> str:
    """What marks change of a conversation's text, without and with a generation prompt, or "".

    Also what speaks against any marks: a template that rewrites history has no answers that stay.
    """
    messages, tools = conversation.messages, conversation.tools
    try:
        found = [render_marked(tokenizer, marked, messages, tools, prompt) for prompt in (False, True)]
    except ChatError as error:
        return f"with marks, {error.found}"
    if [text for text, _ in found] != texts:
        return "marks would change its text"
    roles = [str(message["role"]) for message in messages]
    if ("assistant", "assistant") in pairwise(["assistant", *roles]):
        # Nobody prompts for an answer that begins a conversation or follows another one, so there is no prompt to
        # prove it by; what marks hold in such a row is checked when it is rendered, as for every row.
        return ""
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    try:
        expected = list(prove_answers(tokenizer, plain, texts[0], messages, tools, answers, end, {}))
    except ChatError as error:
        return error.found
    if any(spans != expected for _, spans in found):
        return "marks would not lie on each answer and its end of turn"
    return ""
