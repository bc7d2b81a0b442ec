"""What messages hold: control tokens made plain text before rendering, and nothing lost after it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from re import Pattern
from typing import Any

from transformers import PreTrainedTokenizerFast

from posttrain.chat.encode import break_up, encoder_of
from posttrain.chat.jinja import Message, Tools, is_simple
from posttrain.chat.templates import ChatTemplate
from posttrain.chat.turns import answer_pattern
from posttrain.errors import ChatError

ROLES = frozenset(
    ["system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "tool_results"]
)
_SPOKEN = ("system", "developer", "user", "assistant")
_REASONING = ("reasoning_content", "thinking", "reasoning")


def without_control_tokens(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, messages: Sequence[Message], tools: Tools
) -> tuple[Sequence[Message], Tools]:
    """Breaks up control tokens inside messages and tools; returns the very arguments where there are none.

    Raises:
        ChatError: a message of an unknown role, or a text with what is no character.
    """
    pattern = encoder_of(tokenizer).forbidden
    changed, safe = False, []
    for index, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            raise ChatError(f"message {index + 1}", f"role {role!r}", f"use one of {', '.join(sorted(ROLES))}")
        if pattern.search(message["content"]) if is_simple(message) else _contains(message, pattern):
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
        content = message.get("content")
        if isinstance(content, str) and message["role"] in _SPOKEN:
            said = content.strip()
            found = text.find(said, at)  # messages mostly stand in their order: one pass over the text
            if found >= 0:
                at = found + len(said)
            elif said not in text and "</think>" not in said:
                where = f"{name}, message {index + 1} ({message['role']})"
                raise ChatError(where, "its content is left out or changed", _remedy(message["role"]))
        if len(message) > 2:
            _check_more(text, message, f"{name}, message {index + 1} ({message['role']})", index in answers)
    if tools and any(str(tool.get("function", tool).get("name", "")) not in text for tool in tools):
        raise ChatError(name, "leaves the tools out", "choose a template that writes tools")


def _check_more(text: str, message: Message, where: str, trained: bool) -> None:
    """Raises ChatError where a message's tool calls are left out, or the reasoning of one that is trained on."""
    calls = message.get("tool_calls") or []
    if any(str(call.get("function", call).get("name", "")) not in text for call in calls):
        raise ChatError(where, "its tool calls are left out", "choose a template that writes tool calls")
    reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
    if trained and isinstance(reasoning, str) and reasoning.strip() not in text:
        raise ChatError(
            where,
            "its reasoning is left out",
            "remove the field, choose a template that keeps it, or, where it is kept in the last answer alone, "
            "make one row per answer (in a recipe, `data.history: split`)",
        )


def _remedy(role: str) -> str:
    if role in ("system", "developer"):
        return (
            "choose a template that has this role, or fold the system text into the user's turn "
            "(in a recipe, `data.system: fold`); `posttrain doctor` tells what a template takes"
        )
    return "choose a template that has this role"
