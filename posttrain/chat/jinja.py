"""Rendering a conversation's text in transformers' sandbox, with bounds, and errors a user can read."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NoReturn

import jinja2
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from posttrain.chat.templates import ChatTemplate
from posttrain.errors import ChatError

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

SECONDS = 20.0
"""Processor time that one rendering may take."""
_FREE, _TIMES = 1_000_000, 16
"""Characters that any rendering may have, and how many more for each character of the conversation."""
SYSTEM_ROLES = ("system", "developer")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which an assistant's message has its reasoning."""
_BROKEN = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
"""What a template of somebody else's may raise on a row of somebody else's."""


class _TooLong(Exception):
    """The signal that a rendering took its time; never leaves this module."""


def render_text(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """Renders a conversation as transformers' `apply_chat_template(tokenize=False)` does.

    Raises:
        ChatError: the template refuses the conversation, fails on it, or does not come to an end.
    """
    how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    return _render(tokenizer, template, messages, tools, False, **how)[0]


def render_marked(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Renders a conversation in one go with the (start, end) characters of its generation marks.

    Raises:
        ChatError: the template refuses the conversation, fails on it, or does not come to an end.
    """
    how = {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message}
    return _render(tokenizer, template, messages, tools, True, **how)


def _render(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools,
    marks: bool,
    **how: bool,
) -> tuple[str, list[tuple[int, int]]]:
    own = tokenizer.special_tokens_map
    try:
        with _limited():
            if how["continue_final_message"]:
                chat = [_present(message) for message in messages]
                texts, spans = render_jinja_template([chat], tools, None, template.source, marks, **how, **own)
                return texts[0], spans[0] if marks else []
            return _generate(template, messages, tools, how["add_generation_prompt"], own, marks)
    except _TooLong:
        _refuse(template, f"is not done with a conversation after {SECONDS:g} seconds", "does it loop for ever?")
    except _BROKEN as error:
        if _refuses_system(tokenizer, template, messages, tools, how):
            raise ChatError(
                f"chat template {template.name}",
                f"takes no system message here: {error or type(error).__name__}",
                "fold the system text into the user's turn (in a recipe, `data.system: fold`); "
                "`posttrain doctor` tells what a template takes",
            ) from None
        _refuse(
            template,
            f"cannot render this conversation: {error or type(error).__name__}",
            "change the row (roles, order, text contents), or choose a template that takes it",
        )


def _generate(
    template: ChatTemplate, messages: Sequence[Message], tools: Tools, prompt: bool, own: dict[str, Any], marks: bool
) -> tuple[str, list[tuple[int, int]]]:
    """Renders with the very compiled template that transformers keeps, block by block, so that the length is bounded.

    Nothing is copied first: rows are JSON, and nothing in the sandbox can change them.
    """
    compiled: Any = _compile_jinja_template(template.source)
    chat: Any = messages
    if tools is not None or not all(map(is_simple, messages)):
        chat = [_named_reasoning(_present(message)) for message in messages]
    blocks: list[str] = []
    spans: list[tuple[int, int]] = []
    length, most = 0, _FREE
    tracker = compiled.environment.activate_tracker(blocks, spans) if marks else contextlib.nullcontext()
    with tracker:
        for block in compiled.generate(messages=chat, tools=tools, documents=None, add_generation_prompt=prompt, **own):
            blocks.append(block)
            length += len(block)
            if length > most:
                most = _FREE + _TIMES * (len(str(messages)) + len(str(tools)))
                if length > most:
                    _refuse(template, f"writes more than {most:,} characters", "does it loop for ever?")
    return "".join(blocks), spans


def is_simple(message: Message) -> bool:
    """Whether a message is text under the keys that every message has; others may need what transformers adds."""
    return len(message) == 2 and type(message.get("content")) is str and type(message.get("role")) is str


def _present(message: Message) -> Message:
    """Drops keys with the value None, as transformers does: templates test for the key."""
    return {key: value for key, value in message.items() if value is not None}


def _named_reasoning(message: Message) -> Message:
    """Gives reasoning both of the names that templates read, as transformers 5.23 does."""
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _refuse(template: ChatTemplate, found: str, todo: str) -> NoReturn:
    raise ChatError(f"chat template {template.name}", found, todo) from None


def _refuses_system(
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate,
    messages: Sequence[Message],
    tools: Tools,
    how: dict[str, bool],
) -> bool:
    """Whether a conversation that failed renders once its system messages are away."""
    others = [message for message in messages if message.get("role") not in SYSTEM_ROLES]
    if not others or len(others) == len(messages):
        return False
    try:
        render_text(tokenizer, template, others, tools, **how)
    except ChatError:
        return False
    return True


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Ends what takes longer than `SECONDS` of processor time; only the main thread can be ended so."""
    if threading.get_ident() != threading.main_thread().ident:
        yield
        return
    _listen()
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@cache
def _listen() -> None:
    """Takes the timer's signal, once: nobody else in this house uses it."""
    signal.signal(signal.SIGVTALRM, _give_up)


def _give_up(*_: Any) -> None:
    raise _TooLong
