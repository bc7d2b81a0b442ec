"""Generated conversations: what every claim about a template is tried on.

They hold what real rows hold and templates stumble over: every order of roles, tool calls and their
results, reasoning, empty contents, white space at the edges, code, text that looks like Jinja, and the
writing systems of the world. They hold no control token's text, but for `<think>` in an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from posttrain.chat.jinja import Message, Tools


@dataclass(frozen=True)
class Conversation:
    """Messages, and the tools that are on offer in them (None: none)."""

    messages: list[Message]
    tools: Tools


# One letter per turn: s(ystem) u(ser) a(ssistant), c(alls a tool), p(arallel calls), t(ool's result);
# A and C answer and call with reasoning, I has the reasoning inside its content.
_PLAIN = "ua uaua u uau uauaua ua uauauauaua uaua".split()
_SYSTEM = "sua suaua su suauaua sua".split()
_TOOLS = "uct ucta uctaua uc uptta uctcta uauctua uctu".split()
_THINKING = "uA uAuA uauA uAua uI uIua uAuaua".split()
_BOTH = "uCtA uCtAua uCtCtA".split()
_ODD = "uua uaa aua a suaa uauuaa usa uasua ss uaaua".split()
_LETTERS = {"s": "system", "u": "user", "a": "assistant", "A": "assistant", "I": "assistant"}

_TEXTS = (
    "Zer da Euskadi? Herri bat.",
    "Què és l'ela geminada? Col·lecció, il·lusió.",
    "Que é Galicia? Unha nación; así, ñ, ó.",
    "¿Dónde está el camión? ¡Ahí!",
    "ما هي عاصمة مصر؟ القاهرة.",
    "東京は日本の首都です。北京呢?",
    "한국의 수도는 서울입니다",
    "Привет, мир — ещё раз",
    "नमस्ते दुनिया",
    "😀 👩‍👩‍👧 🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301 n\u0303",
    "a\u00a0b\u2009c\u200bd\u202ee",
    "def f(x):\n    if x:\n        return {'a': [1, 2]}\n    return None",
    "<b>1 < 2 & 3 > 2</b> \"quoted\" 'single' \\n back\\slash",
    "{{ messages[0] }} {% for x in y %}{# note #} {%- endfor %}",
    "# Title\n\n* one\n* two\n\n| a | b |\n|---|---|\n| 1 | 2 |",
    '{"name": "f", "arguments": {"x": 1}}',
    "1,234.56 € + 7 % = ½ x²",
    "Ok",
    "tab\there\r\nand a Windows line",
)
_EDGES = ("", "", "", " ", "\n", "  \n", "\t", "\n\n    ")
_TOOL_NAMES = ("get_weather", "buscar_paraula", "sum2")


def conversations(
    count: int,
    seed: int,
    *,
    system: bool = True,
    tools: bool = True,
    thinking: bool = True,
    odd: bool = True,
    empty: bool = True,
    edges: bool = True,
) -> list[Conversation]:
    """Generates conversations: the same ones for the same arguments, every kind within the first fifty.

    Contents that are not empty differ from all others of their conversation, so a search finds each.

    Args:
        system: some begin with a system message.
        tools: some offer tools, call them and hold their results.
        thinking: some answers have `reasoning_content`, or `<think>` inside their content.
        odd: some have no user turn before an answer, two turns of one role, or a system message in the middle.
        empty: some contents are empty, or nothing but white space.
        edges: some contents begin or end with white space.
    """
    shapes = _shapes(system, tools, thinking, odd)
    return [
        _Writer(Random(f"{seed}-{index}"), empty, edges).conversation(shapes[index % len(shapes)], tools)
        for index in range(count)
    ]


def _shapes(system: bool, tools: bool, thinking: bool, odd: bool) -> list[str]:
    """The orders of roles asked for, the kinds taken in turn so that a short corpus holds all of them."""
    kinds = [_PLAIN]
    kinds += [_SYSTEM] if system else []
    kinds += [[*_TOOLS, *(["s" + shape for shape in _TOOLS[1:3]] if system else [])]] if tools else []
    kinds += [_THINKING] if thinking else []
    kinds += [_BOTH] if tools and thinking else []
    kinds += [[shape for shape in _ODD if system or "s" not in shape]] if odd else []
    longest = max(map(len, kinds))
    return [kind[turn] for turn in range(longest) for kind in kinds if turn < len(kind)]


class _Writer:
    """Writes one conversation from its random numbers."""

    def __init__(self, random: Random, empty: bool, edges: bool) -> None:
        self.random, self.empty, self.edges = random, empty, edges
        self.written = 0

    def conversation(self, shape: str, tools: bool) -> Conversation:
        """A conversation of this shape; tools are on offer where they are called, and sometimes where not."""
        called = any(letter in shape for letter in "cpC")
        offered = called or (tools and self.random.random() < 0.1)
        return Conversation(list(self._messages(shape)), [_tool(name) for name in _TOOL_NAMES] if offered else None)

    def _messages(self, shape: str) -> Iterator[Message]:
        waiting: list[Message] = []  # calls without a result so far
        for letter in shape:
            if letter in "cpC":
                waiting = [self._call() for _ in range(2 if letter == "p" else 1)]
                yield self._calling(waiting, thinking=letter == "C")
            elif letter == "t":
                call = waiting.pop(0) if waiting else self._call()
                name = call["function"]["name"]
                yield {"role": "tool", "tool_call_id": call["id"], "name": name, "content": self._result()}
            else:
                yield self._spoken(letter)

    def _spoken(self, letter: str) -> Message:
        content = self._text()
        message: Message = {"role": _LETTERS[letter], "content": content}
        if letter == "A":
            message["reasoning_content"] = self._text(empty=False)
        if letter == "I":
            message["content"] = f"<think>\n{self._text(empty=False)}\n</think>\n\n{content}"
        return message

    def _calling(self, calls: list[Message], thinking: bool) -> Message:
        content = self.random.choice(["", "", self._text(empty=False)])
        message: Message = {"role": "assistant", "content": content, "tool_calls": list(calls)}
        return message | {"reasoning_content": self._text(empty=False)} if thinking else message

    def _call(self) -> Message:
        name = self.random.choice(_TOOL_NAMES)
        arguments = {"text": self._text(empty=False), "count": self.random.randrange(100), "exact": True}
        identifier = "".join(self.random.choice("abcdefXYZ0123456789") for _ in range(9))  # as Mistral wants them
        return {"type": "function", "id": identifier, "function": {"name": name, "arguments": arguments}}

    def _result(self) -> str:
        return f'{{"result": "{self.random.choice(_TEXTS[:5])} {self._mark()}"}}'

    def _text(self, empty: bool = True) -> str:
        if empty and self.empty and self.random.random() < 0.06:
            return self.random.choice(["", "", " \n"]) if self.edges else ""
        text = " ".join(self.random.sample(_TEXTS, self.random.choice([1, 1, 1, 2])))
        left, right = (self.random.choice(_EDGES) if self.edges else "" for _ in range(2))
        return f"{left}{text} {self._mark()}{right}"

    def _mark(self) -> str:
        """A short word that no other text of the conversation has."""
        self.written += 1
        return f"n{self.written}{self.random.choice('bdfg')}."


def _tool(name: str) -> Message:
    parameters = {
        "type": "object",
        "properties": {
            "text": {"type": "string", "description": "What to look for: paraula, hitza, palabra"},
            "count": {"type": "integer", "description": "How many"},
            "exact": {"type": "boolean", "description": "Whole words only"},
        },
        "required": ["text"],
    }
    return {
        "type": "function",
        "function": {"name": name, "description": f"The tool {name}.", "parameters": parameters},
    }
