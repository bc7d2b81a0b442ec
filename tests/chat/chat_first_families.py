"""What the tests of the first families share: a tokenizer that fits them all, and transformers' own rendering."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from chat_tiny import SPECIAL, bundled, make_tokenizer
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from posttrain.chat.corpus import Conversation, conversations

PLAIN = [
    "chatml",
    "zephyr",
    "tulu",
    "olmo2",
    "llama3",
    "salamandra",
    "salamandra-default",
    "smollm2",
    "alpaca",
    "plain",
]
WITH_TOOLS = ["llama3.1", "llama4", "qwen2.5", "qwen3", "qwen3-instruct"]
NAMES = PLAIN + WITH_TOOLS
LLAMA = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLAMA4 = ["<|header_start|>", "<|header_end|>", "<|eot|>", "<|python_start|>", "<|python_end|>"]
TINY = make_tokenizer(SPECIAL + LLAMA + LLAMA4, bos_token="<s>", eos_token="</s>", pad_token="<|pad|>")

CORPUS = conversations(200, seed=3)
SPOKEN = [talk for talk in conversations(120, seed=4, tools=False, thinking=False) if talk.tools is None]


def write(source: str, talk: Conversation, prompt: bool = False, **kwargs: Any) -> tuple[str, list[tuple[int, int]]]:
    """Renders as transformers does, with marks, any variables, and `<s>` and `</s>`."""
    variables = {"bos_token": "<s>", "eos_token": "</s>", **kwargs}
    texts, spans = render_jinja_template(
        [talk.messages],
        tools=talk.tools,
        chat_template=source,
        return_assistant_tokens_mask=True,
        add_generation_prompt=prompt,
        **variables,
    )
    return texts[0], spans[0]


def attempt(source: str, talk: Conversation, prompt: bool = False, **kwargs: Any) -> tuple[str | None, str]:
    """The rendered text and "", or None and why the template refuses the conversation."""
    try:
        return write(source, talk, prompt, **kwargs)[0], ""
    except TemplateError as error:
        return None, str(error)


def say(*turns: str, tools: Any = None) -> Conversation:
    """A conversation of texts, each under the role that its first letter stands for."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return Conversation([{"role": roles[turn[0]], "content": turn[1:]} for turn in turns], tools)


def rendered(talks: list[Conversation], name: str) -> Iterator[tuple[Conversation, str, list[tuple[int, int]]]]:
    """The conversations that a template takes, with text and marks."""
    for talk in talks:
        if attempt(bundled(name).source, talk)[0] is not None:
            yield talk, *write(bundled(name).source, talk)
