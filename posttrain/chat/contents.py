"""What messages hold: control tokens made plain text before rendering, and nothing lost after it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from re import Pattern
from typing import Any

from transformers import PreTrainedTokenizerFast

from posttrain.chat.encode import break_up, encoder_of
from posttrain.chat.jinja import REASONING, SYSTEM_ROLES, Message, Tools, is_simple
from posttrain.chat.templates import ChatTemplate
from posttrain.chat.turns import answer_pattern
from posttrain.errors import ChatError

ROLES = frozenset(
    ["system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "tool_results"]
)
_SPOKEN = (*SYSTEM_ROLES, "user", "assistant")
_THINK = re.compile(r"</?think>")


def without_control_tokens(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, messages: Sequence[Message], tools: Tools
) -> tuple[Sequence[Message], Tools]:
    """Breaks up control tokens inside messages and tools; returns the very arguments where there are none.

    Raises:
        ChatError: what is no message, call or tool in the spelling that `posttrain.data.messages` gives them, or a
            text with what is no character.
    """
    pattern = encoder_of(tokenizer).forbidden
    changed, safe = False, []
    for index, message in enumerate(messages):
        simple = is_simple(message)
        if not simple:
            _check_form(message, f"message {index + 1}")
        role = message["role"]
        if role not in ROLES:
            raise ChatError(f"message {index + 1}", f"role {role!r}", f"use one of {', '.join(sorted(ROLES))}")
        if pattern.search(message["content"]) if simple else _contains(message, pattern):
            own = answer_pattern(tokenizer, template) if role == "assistant" else pattern
            message = {key: value if key == "role" else _broken(value, own) for key, value in message.items()}
            changed = True
        safe.append(message)
    for index, tool in enumerate(tools or ()):
        _check_function(tool, f"tool {index + 1}")
    safe_tools = [_broken(tool, pattern) for tool in tools] if tools and _contains(tools, pattern) else tools
    return (safe if changed or safe_tools is not tools else messages), safe_tools


def _check_form(message: Message, where: str) -> None:
    """Raises ChatError for what templates would render as Python spells it: contents that are no text, for one."""
    if not isinstance(message.get("role"), str):
        raise ChatError(where, "has no role", 'a message is {"role": …, "content": …}')
    content, calls = message.get("content"), message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        kind = "null" if content is None else f"a {type(content).__name__}"
        raise ChatError(f"{where} ({message['role']})", f"its content is {kind}, not a text", "write it as one text")
    if calls is not None and not isinstance(calls, list):
        raise ChatError(f"{where}, tool_calls", f"a {type(calls).__name__}, not a list", "write a list of calls")
    for index, call in enumerate(calls or ()):
        _check_function(call, f"{where}, tool call {index + 1}")


def _check_function(value: Any, where: str) -> None:
    """Raises ChatError for a tool, or a call of one, that names no function."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ChatError(where, "names no function", 'write {"type": "function", "function": {"name": …, …}}')


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


def check_nothing_left_out(
    template: ChatTemplate, text: str, messages: Sequence[Message], tools: Tools, answers: Collection[int]
) -> None:
    """Raises ChatError where a rendered text lacks what a message says, calls or thinks, or a tool.

    Args:
        answers: messages that are trained on: what others thought may be left out, as at inference.
    """
    name = f"chat template {template.name}"
    at = 0
    for index, message in enumerate(messages):
        said = _said(message)
        found = text.find(said, at)  # messages mostly stand in their order: one pass over the text
        if found >= 0:
            at = found + len(said)
        elif not _stands(text, said, messages[: index + 1], index in answers):
            where = f"{name}, message {index + 1} ({message['role']})"
            raise ChatError(where, "its content is left out or changed", _remedy(message["role"]))
        if len(message) > 2:
            _check_more(text, message, f"{name}, message {index + 1} ({message['role']})", index in answers)
    if tools and any(str(tool.get("function", tool).get("name", "")) not in text for tool in tools):
        raise ChatError(name, "leaves the tools out", "choose a template that writes tools")


def _said(message: Message) -> str:
    return (message.get("content") or "").strip()


def _stands(text: str, said: str, messages: Sequence[Message], trained: bool) -> bool:
    """Whether the last message's content stands in a text, once for each message that says the same.

    A tool's result may stand there quoted, an answer with its `<think>` spelled anew, or without its reasoning
    where it is not trained on.
    """
    role = messages[-1]["role"]
    if text.count(said) >= sum(_said(message) == said for message in messages):
        return True
    if role not in _SPOKEN:
        return any(json.dumps(said, ensure_ascii=ascii)[1:-1] in text for ascii in (False, True))
    *thoughts, answer = _THINK.split(said)
    return bool(thoughts) and all(part.strip() in text for part in ([*thoughts, answer] if trained else [answer]))


def _check_more(text: str, message: Message, where: str, trained: bool) -> None:
    """Raises ChatError where a message's tool calls are left out, or the reasoning of one that is trained on."""
    calls = message.get("tool_calls") or []
    if any(str(call.get("function", call).get("name", "")) not in text for call in calls):
        raise ChatError(where, "its tool calls are left out", "choose a template that writes tool calls")
    reasoning = next((message[key] for key in REASONING if message.get(key)), None)
    if trained and isinstance(reasoning, str) and reasoning.strip() not in text:
        raise ChatError(
            where,
            "its reasoning is left out",
            "remove the field, choose a template that keeps it, or, where it is kept in the last answer alone, "
            "make one row per answer (in a recipe, `data.history: split`)",
        )


def _remedy(role: str) -> str:
    if role in SYSTEM_ROLES:
        return (
            "choose a template that has this role, or fold the system text into the user's turn "
            "(in a recipe, `data.system: fold`); `posttrain doctor` tells what a template takes"
        )
    return "choose a template that has this role"
