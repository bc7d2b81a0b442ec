"""Mends chat templates: by another one, or by a change that is proved on generated conversations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import takewhile

from transformers import PreTrainedTokenizerFast

from posttrain.artifact import write_atomically
from posttrain.chat.corpus import conversations
from posttrain.chat.jinja import Message, Tools, render_text
from posttrain.chat.templates import ChatTemplate, load_template, strip_marks
from posttrain.doctor.behaviour import BYTE_ORDER_MARK
from posttrain.doctor.mend import JINJA, TOKENIZER_CONFIG, Patient
from posttrain.doctor.mend_tokens import template_tokens
from posttrain.doctor.probes import Probes
from posttrain.doctor.tokens import missing_tokens
from posttrain.doctor.vocabulary import suggest_template
from posttrain.errors import ChatError

BOS = "{{ bos_token }}"
FOLD = """\
{%- set posttrain_fold = namespace(messages=[], held=[]) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' and message['content'] is string -%}
        {%- set posttrain_fold.held = posttrain_fold.held + [message] -%}
    {%- elif posttrain_fold.held and message['role'] == 'user' and message['content'] is string -%}
        {%- set text = (posttrain_fold.held + [message]) | map(attribute='content') | join('\n\n') -%}
        {%- set posttrain_fold.messages = posttrain_fold.messages + [{'role': 'user', 'content': text}] -%}
        {%- set posttrain_fold.held = [] -%}
    {%- else -%}
        {%- set posttrain_fold.messages = posttrain_fold.messages + posttrain_fold.held + [message] -%}
        {%- set posttrain_fold.held = [] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = posttrain_fold.messages + posttrain_fold.held %}
"""
"""Puts system messages into the user's turn after them. Its last newline is Jinja's (`trim_blocks`)."""
FOLD_LATER = FOLD.replace("== 'system' and", "== 'system' and not loop.first and")
"""The same for all but a system message that begins the conversation."""
_BOS = re.compile(r"\{\{-?\s*bos_token\s*-?\}\}|\bbos_token\s*(?:\+|~)\s*")
_TAG = re.compile(
    r"\{#[-+]?(?P<comment>.*?)[-+]?#\}"
    r"|\{(?P<open>[%{])[-+]?(?P<inside>(?:'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"|[^'\"])*?)[-+]?(?P<close>[%}])\}",
    re.DOTALL,
)
_TALK: list[Message] = [
    {"role": "system", "content": "Sentinelsystem"},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]
_SYSTEM_FIRST = [(_TALK[:2], True), (_TALK[:3], False), (_TALK, False)]
_PROOF, _SEED = 60, 20261122
Expected = Callable[[list[Message], Tools, bool], "str | None"]
"""(messages, tools, generation prompt) -> what the changed template must render; None = what it refuses."""


def install(patient: Patient, template: ChatTemplate) -> None:
    """Makes a template the folder's own, unless its own is this one, or this one after what BOS and FOLD put first."""
    own = patient.checkpoint().own_template
    if own is None or not own.inference.endswith(template.inference):
        patient.say(f"{JINJA}: {template.name} ({template.digest[:12]})")
        _write(patient, template.inference)


def suggested(patient: Patient) -> None:
    """Gives a folder without template the bundled one that fits its vocabulary."""
    checkpoint = patient.checkpoint()
    if checkpoint.tokenizer is not None:
        install(patient, load_template(suggest_template(checkpoint.tokenizer, checkpoint.config), patient.folder))


def ending(patient: Patient) -> None:
    """Gives a template whose turns end with no token its token, or the folder a template whose turns do."""
    checkpoint = patient.checkpoint()
    if checkpoint.tokenizer is None or checkpoint.template is None:
        return
    if missing_tokens(Probes(checkpoint.tokenizer, checkpoint.template)):
        template_tokens(patient)
    else:
        suggested(patient)


def without_marks(patient: Patient) -> None:
    """Takes generation marks out: folders are saved without them, and masks are made from offsets."""
    source = patient.checkpoint().own_source
    if source is not None:
        patient.say(f"{JINJA}: generation marks removed, rendering is the same")
        _write(patient, strip_marks(source))


def one_bos(patient: Patient) -> None:
    """Takes one of two BOS out of the template."""
    own, tokenizer, old = _own(patient)
    bos = str(tokenizer.bos_token)
    for found in _BOS.finditer(own.inference):
        source = own.inference[: found.start()] + own.inference[found.end() :]
        if _proved(tokenizer, source, lambda *given: _without(old(*given), bos)):
            patient.say(f"{JINJA}: one of two BOS removed, nothing else changes")
            _write(patient, source)
            return


def bos_if_base(patient: Patient) -> None:
    """Begins the conversations of a base model with BOS, as its plain texts do; a chat model keeps its habit."""
    if patient.was_base:
        bos_first(patient)


def bos_first(patient: Patient) -> None:
    """Begins every conversation with BOS."""
    own, tokenizer, old = _own(patient)
    bos = tokenizer.bos_token
    if bos is not None and _proved(tokenizer, BOS + own.inference, lambda *given: _after(bos, old(*given))):
        patient.say(f"{JINJA}: begins with BOS")
        _write(patient, BOS + own.inference)


def fold_system(patient: Patient) -> None:
    """Puts system messages, which the template refuses or drops, into the user's turn after them.

    One that begins the conversation stays where it is if the template writes it. Proved: conversations without
    any render as before, others as if the user had said both; a system message that no user follows is left
    to the template.
    """
    own, tokenizer, old = _own(patient)
    later = all("Sentinelsystem" in (old(messages, None, prompt) or "") for messages, prompt in _SYSTEM_FIRST)
    prelude = FOLD_LATER if later else FOLD

    def expected(messages: list[Message], tools: Tools, prompt: bool) -> str | None:
        first = messages[:1] if later else []
        return old(first + _folded(messages[len(first) :]), tools, prompt)

    if not own.inference.startswith(prelude) and _proved(tokenizer, prelude + own.inference, expected):
        which = "later system messages" if later else "system messages"
        patient.say(f"{JINJA}: {which} go into the user's turn after them; other conversations as before")
        _write(patient, prelude + own.inference)


def _folded(messages: list[Message]) -> list[Message]:
    """What FOLD makes of messages."""
    folded: list[Message] = []
    for message in messages:
        held = list(takewhile(lambda earlier: earlier["role"] == "system", reversed(folded)))[::-1]
        if held and message["role"] == "user":
            texts = [part["content"] for part in (*held, message)]
            folded[len(folded) - len(held) :] = [{"role": "user", "content": "\n\n".join(texts)}]
        else:
            folded.append(message)
    return folded


def minify(patient: Patient) -> None:
    """Keeps the white space between a template's tags out of what it renders.

    Only where nothing but white space stands between its tags: then all that is rendered comes from
    expressions, and what goes is the source's own layout. Proved: no letter of any conversation changes.
    """
    own, tokenizer, old = _own(patient)
    if own.inference.startswith(BYTE_ORDER_MARK):
        patient.say(f"{JINJA}: the byte order mark at its beginning is no longer rendered")
        _write(patient, own.inference.removeprefix(BYTE_ORDER_MARK))
        return
    if _TAG.sub("", own.inference).strip():
        return
    source = "".join(_dashed(tag) for tag in _TAG.finditer(own.inference))
    rendered = _renderer(tokenizer, ChatTemplate("minified", source))
    for messages, tools, prompt in _corpus():
        before, after = old(messages, tools, prompt), rendered(messages, tools, prompt)
        if (before is None) != (after is None) or "".join((before or "").split()) != "".join((after or "").split()):
            return
    patient.say(f"{JINJA}: the white space of its layout is no longer rendered")
    _write(patient, source)


def _dashed(tag: re.Match[str]) -> str:
    if tag["open"] is None:
        return ""  # a comment
    close = "%}" if tag["open"] == "%" else "}}"
    return f"{{{tag['open']}- {tag['inside'].strip()} -{close}\n"


def _write(patient: Patient, source: str) -> None:
    """Writes the folder's template, and takes any other out of `tokenizer_config.json`."""
    write_atomically(patient.folder / JINJA, source)
    settings = patient.read(TOKENIZER_CONFIG)
    if settings.pop("chat_template", None) is not None:
        patient.write(TOKENIZER_CONFIG, settings)


def _own(patient: Patient) -> tuple[ChatTemplate, PreTrainedTokenizerFast, Expected]:
    """The folder's template, its tokenizer, and how it renders now: a finding about them sent whoever asks."""
    checkpoint = patient.checkpoint()
    assert checkpoint.own_template is not None
    assert checkpoint.tokenizer is not None
    return checkpoint.own_template, checkpoint.tokenizer, _renderer(checkpoint.tokenizer, checkpoint.own_template)


def _renderer(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> Expected:
    def render(messages: list[Message], tools: Tools, prompt: bool) -> str | None:
        try:
            return render_text(tokenizer, template, messages, tools, add_generation_prompt=prompt)
        except ChatError:
            return None

    return render


def _proved(tokenizer: PreTrainedTokenizerFast, source: str, expected: Expected) -> bool:
    """Whether a changed template renders exactly what is expected of it, over the whole corpus."""
    rendered = _renderer(tokenizer, ChatTemplate("changed", source))
    return all(rendered(*given) == expected(*given) for given in _corpus())


@lru_cache(maxsize=1)
def _conversations() -> tuple[tuple[list[Message], Tools], ...]:
    made = conversations(_PROOF, _SEED)
    return tuple((conversation.messages, conversation.tools) for conversation in made)


def _corpus() -> Iterator[tuple[list[Message], Tools, bool]]:
    """Conversations with and without generation prompt; the plain ones first, which every family takes."""
    for messages, tools in ((_TALK[1:], None), (_TALK, None), *_conversations()):
        yield messages, tools, False
        yield messages, tools, True


def _without(text: str | None, bos: str) -> str | None:
    return text if text is None else text.removeprefix(bos)


def _after(bos: str, text: str | None) -> str | None:
    return text if text is None else bos + text
