"""Small conversations rendered with a template: what every check of its behaviour looks at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.chat.encode import encoder_of
from posttrain.chat.jinja import Message, render_text
from posttrain.chat.templates import ChatTemplate
from posttrain.chat.turns import EndOfTurn, end_of_turn
from posttrain.errors import ChatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SYSTEM: Message = {"role": "system", "content": "Sentinelsystem"}
USER: Message = {"role": "user", "content": "Sentinelone"}
ANSWER: Message = {"role": "assistant", "content": "Sentineltwo"}
NEXT: Message = {"role": "user", "content": "Sentinelthree"}
LAST: Message = {"role": "assistant", "content": "Sentinelfour"}
REASON = "Sentinelreason"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "sentinel_tool",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
    },
}
RESULT: Message = {
    "role": "tool",
    "name": "sentinel_tool",
    "tool_call_id": "call12345",  # nine letters and digits, as Mistral's templates ask for
    "content": "Sentinelresult",
}


def call(arguments: str | dict[str, str]) -> Message:
    """An assistant's message that calls the tool."""
    function = {"name": "sentinel_tool", "arguments": arguments}
    calls = [{"id": "call12345", "type": "function", "function": function}]
    return {"role": "assistant", "content": "", "tool_calls": calls}


@dataclass(frozen=True)
class Probes:
    """A tokenizer and a template, and what they make of conversations; every rendering is done once."""

    tokenizer: PreTrainedTokenizerFast
    template: ChatTemplate
    _seen: dict[str, str | ChatError] = field(default_factory=dict)

    @property
    def bundled(self) -> bool:
        """Whether the template's facts file says how it behaves."""
        return self.template.facts.family != "unknown"

    @property
    def bos(self) -> str:
        """Text of the BOS token, "" where there is none."""
        return str(self.tokenizer.bos_token or "")

    def refusal(self, messages: Sequence[Message], prompt: bool = False, tools: bool = False) -> str:
        """Says why the template does not render a conversation; "" when it does."""
        found = self._render(messages, prompt, tools)
        return found.found.removeprefix("cannot render this conversation: ") if isinstance(found, ChatError) else ""

    def text(self, messages: Sequence[Message], prompt: bool = False, tools: bool = False) -> str | None:
        """Renders a conversation; None when the template refuses it.

        Args:
            prompt: with the generation prompt.
            tools: with `TOOL` among the tools.
        """
        found = self._render(messages, prompt, tools)
        return None if isinstance(found, ChatError) else found

    def has(self, sentinel: str, messages: Sequence[Message], prompt: bool = False, tools: bool = False) -> bool:
        """Whether a conversation renders, and a text stands in it."""
        return sentinel in (self.text(messages, prompt, tools) or "")

    def ids(self, text: str) -> list[int]:
        """Ids of a rendered text: nothing is added to it."""
        return encoder_of(self.tokenizer).encode(text)[0]

    def closed(self, messages: Sequence[Message]) -> str | None:
        """Renders a conversation that ends with an answer, cut after that answer's end of turn.

        Some families (Phi-3) write an EOS after the whole conversation: it is no part of what is kept.
        """
        text, answer, end = self.text(messages), str(messages[-1]["content"]), self.end
        if text is None:
            return None
        said = text.rfind(answer) + len(answer)
        stop = text.find(end.text, said) if end is not None else -1
        return text[:said] if end is None or stop < 0 else text[: stop + len(end.text)]

    @property
    def end(self) -> EndOfTurn | None:
        """The token that ends an answer, or None where there is no such token."""
        try:
            return end_of_turn(self.tokenizer, self.template)
        except ChatError:
            return None

    @property
    def start(self) -> str:
        """What stands before the first user's text, BOS left out."""
        text = (self.text([USER]) or "").partition(str(USER["content"]))[0]
        while self.bos and text.startswith(self.bos):
            text = text.removeprefix(self.bos)
        return text

    @property
    def ending(self) -> str:
        """What stands between an answer and the next user's text, header of that turn included."""
        return self.between([USER, ANSWER, NEXT], ANSWER, NEXT)

    def between(self, messages: Sequence[Message], first: Message, second: Message, tail: bool = False) -> str:
        """Returns what stands between the contents of two messages, or after the first (`tail`); "" if not there."""
        text = self.text(messages) or ""
        after = text.partition(str(first["content"]))[2]
        inside, found, _ = after.partition(str(second["content"]))
        return after if tail else inside if found else ""

    def _render(self, messages: Sequence[Message], prompt: bool, tools: bool) -> str | ChatError:
        key = json.dumps([messages, prompt, tools])
        if key not in self._seen:
            try:
                self._seen[key] = render_text(
                    self.tokenizer, self.template, messages, [TOOL] if tools else None, add_generation_prompt=prompt
                )
            except ChatError as error:
                self._seen[key] = error
        return self._seen[key]
