"""System messages for templates that refuse them: their text goes before the user's."""

from __future__ import annotations

from collections.abc import Sequence

from posttrain.chat.jinja import SYSTEM_ROLES, Message
from posttrain.errors import ChatError


def fold_system(messages: Sequence[Message]) -> list[Message]:
    """Returns a conversation without system messages: each text goes before the next user's, a blank line apart.

    Raises:
        ChatError: no user message follows a system message.
    """
    folded: list[Message] = []
    texts: list[str] = []
    for message in messages:
        if message.get("role") in SYSTEM_ROLES:
            texts.append(str(message.get("content") or ""))
            continue
        if texts and message.get("role") == "user":
            message = {**message, "content": "\n\n".join([*filter(str.strip, texts), message["content"]])}
            texts = []
        folded.append(message)
    if texts:
        raise ChatError("conversation", "no user message follows a system message", "remove it, or the row")
    return folded
