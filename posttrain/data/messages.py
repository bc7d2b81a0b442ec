"""Messages of every spelling become one: roles, tool calls and tools as Hugging Face templates expect them."""

from __future__ import annotations

from typing import Any

from posttrain.data.jsontext import BadJson, parse_json
from posttrain.data.rows import Message, Origin, Tool

CALL_ROLES = ("function_call", "tool_call")
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    **dict.fromkeys(CALL_ROLES, "assistant"),
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function": "tool",
}
_KEPT = ("name", "tool_call_id", "reasoning_content")
_WEIGHTS = ("weight", "loss_weight", "train")


def as_messages(value: Any, origin: Origin, column: str) -> list[Message]:
    """Normalises a list of messages in OpenAI (`role`, `content`) or ShareGPT (`from`, `value`) spelling.

    Raises:
        DataError: not a list of such messages, an unknown role, content that is not one string, or an
            assistant turn that asks not to be trained on.
    """
    if not isinstance(value, list):
        raise origin.broken(
            f"`{column}` is {_kind(value)}, not a list of messages", 'expected [{"role": …, "content": …}, …]'
        )
    return [_message(item, origin, f"{column}[{index}]") for index, item in enumerate(value)]


def as_message(value: Any, origin: Origin, column: str) -> Message:
    """Normalises one message; raises like `as_messages`."""
    return _message(value, origin, column)


def as_text(value: Any, origin: Origin, column: str) -> str:
    """Returns a string field, or raises DataError for any other type (null included)."""
    if not isinstance(value, str):
        raise origin.broken(f"`{column}` is {_kind(value)}, not a string", "write it as text, or leave the row out")
    return value


def user(text: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """An assistant turn."""
    return {"role": "assistant", "content": text}


def with_system(text: Any, messages: list[Message], origin: Origin) -> list[Message]:
    """Puts a row's `system` column before its messages; null and blank mean that there is none."""
    if text is None or not as_text(text, origin, "system").strip():
        return messages
    if messages and messages[0]["role"] == "system":
        raise origin.broken("a `system` column beside messages that begin with a system turn", "keep one of the two")
    return [{"role": "system", "content": text}, *messages]


def as_tools(value: Any, origin: Origin) -> list[Tool] | None:
    """Normalises a row's `tools`: a list of functions, bare or wrapped, or its JSON text; none -> None."""
    if isinstance(value, str) and value.strip():
        value = _json(value, origin, "tools")
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise origin.broken(f"`tools` is {_kind(value)}, not a list of functions", 'expected [{"name": …}, …]')
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in value]
    for index, tool in enumerate(tools):
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise origin.broken(f"`tools[{index}]` has no name", 'a tool is {"name": …, "parameters": …}')
    return tools


def _message(item: Any, origin: Origin, at: str) -> Message:
    if not isinstance(item, dict):
        raise origin.broken(f"`{at}` is {_kind(item)}, not a message", 'a message is {"role": …, "content": …}')
    role_key, content_key = ("role", "content") if "role" in item else ("from", "value")
    spelled = item.get(role_key)
    role = ROLES.get(spelled) if isinstance(spelled, str) else None
    if role is None:
        found = f"`{at}` has the unknown role {spelled!r}" if role_key in item else f"`{at}` has no role"
        raise origin.broken(found, f"known roles: {', '.join(ROLES)}")
    _refuse_weights(item, role, origin, at)
    kept = {key: item[key] for key in _KEPT if isinstance(item.get(key), str)}
    content = item.get(content_key)
    if spelled in CALL_ROLES:
        calls = _calls(_json(as_text(content, origin, at), origin, at), origin, at)
        return {"role": role, "content": "", "tool_calls": calls, **kept}
    calls = _calls(item["tool_calls"], origin, at) if item.get("tool_calls") else []
    if content is None and calls:
        content = ""  # what OpenAI writes beside tool calls
    return {"role": role, "content": _content(content, origin, f"{at}.{content_key}"), **_present(calls), **kept}


def _content(content: Any, origin: Origin, at: str) -> str:
    if isinstance(content, list):
        raise origin.broken(f"`{at}` is a list of content blocks", "join its text blocks into one string per message")
    return as_text(content, origin, at)


def _present(calls: list[dict[str, Any]]) -> dict[str, Any]:
    return {"tool_calls": calls} if calls else {}


def _refuse_weights(item: dict[str, Any], role: str, origin: Origin, at: str) -> None:
    """A weight that would be ignored changes what is trained, so it is refused."""
    for key in _WEIGHTS:
        if role == "assistant" and item.get(key) not in (None, 1):
            raise origin.broken(
                f"`{at}.{key}` is {item[key]!r}", "every assistant turn is trained alike: remove the field or the turn"
            )


def _calls(value: Any, origin: Origin, at: str) -> list[dict[str, Any]]:
    """Tool calls as `{"type": "function", "function": {"name", "arguments": dict}}`, from one or a list."""
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise origin.broken(f"`{at}` calls nothing", "remove the turn")
    return [_call(call, origin, at) for call in calls]


def _call(call: Any, origin: Origin, at: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise origin.broken(f"`{at}` has a tool call without a name", 'a call is {"name": …, "arguments": {…}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", origin, f"{at} arguments")
    if not isinstance(arguments, dict):
        raise origin.broken(f"`{at}` has arguments that are {_kind(arguments)}", "arguments are a JSON object")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _json(text: str, origin: Origin, column: str) -> Any:
    try:
        return parse_json(text)
    except BadJson as error:
        raise origin.broken(f"`{column}` is {error}", "write it as JSON text") from None


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")
