"""What the tests of the second half of the bundled templates share."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
from chat_tiny import make_tokenizer
from transformers import PreTrainedTokenizerFast

from posttrain.chat.corpus import Conversation, conversations
from posttrain.chat.jinja import Message, Tools, render_text
from posttrain.chat.render import MASKED, Rendered
from posttrain.chat.templates import ChatTemplate
from posttrain.errors import ChatError

NAMES = [
    *("mistral-v1", "mistral-v3", "mistral-v7", "gemma", "gemma3"),
    *("phi3", "phi4", "deepseek-r1", "granite", "olmo3"),
]
R1 = ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
TOKENS = [
    *("<s>", "</s>", "<|pad|>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CONTENT]"),
    *("<start_of_turn>", "<end_of_turn>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<|im_start|>", "<|im_sep|>", "<|im_end|>", "<|endoftext|>", *R1),
    *("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
]
TINY = make_tokenizer(TOKENS, ("<think>", "</think>"), bos_token="<s>", eos_token="</s>", pad_token="<|pad|>")
END = {
    **dict.fromkeys(["mistral-v1", "mistral-v3", "mistral-v7"], "</s>"),
    **dict.fromkeys(["gemma", "gemma3"], "<end_of_turn>"),
    **dict.fromkeys(["phi4", "olmo3"], "<|im_end|>"),
    "phi3": "<|end|>",
    "deepseek-r1": R1[2],
    "granite": "<|end_of_text|>",
}
CHAT: list[Message] = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": " U1 "},
    {"role": "assistant", "content": " A1 "},
    {"role": "user", "content": "U2"},
    {"role": "assistant", "content": "A2"},
]


def text_of(
    template: ChatTemplate,
    messages: list[Message],
    tools: Tools = None,
    prompt: bool = False,
    tokenizer: PreTrainedTokenizerFast = TINY,
) -> str:
    """A rendering with the tiny tokenizer, unless another is given."""
    return render_text(tokenizer, template, messages, tools, prompt)


def tried(template: ChatTemplate, messages: list[Message], tools: Tools = None, prompt: bool = False) -> str | None:
    """A rendering, or None where the template refuses the conversation."""
    try:
        return text_of(template, messages, tools, prompt)
    except ChatError:
        return None


@cache
def corpus() -> list[Conversation]:
    """What every claim is tried on."""
    return conversations(160, seed=7)


def trl_template(name: str) -> ChatTemplate:
    """A family's own template as the installed TRL has it (found without importing it)."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl is not installed")
    source = (Path(found.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(name, source)


def trained(tokenizer: PreTrainedTokenizerFast, row: Rendered) -> list[str]:
    """Texts of the trained runs of a row."""
    runs: list[str] = []
    run: list[int] = []
    for label in [*row.labels, MASKED]:
        if label != MASKED:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs
