"""The ChatML, Llama, Qwen and end-of-text families: what they write, byte for byte, and where their marks stand."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_first_families import CORPUS, LLAMA, LLAMA4, NAMES, SPOKEN, TINY, WITH_TOOLS, attempt, rendered, say, write
from chat_tiny import bundled
from jinja2 import TemplateError

from posttrain.chat.corpus import Conversation
from posttrain.chat.jinja import Message
from posttrain.chat.templates import recognise, template_digest
from posttrain.chat.turns import end_of_turn

# --- layouts written out in Python ---


def blocks(pattern: str, prompt: str, bos: str = "", system: str | None = None) -> Callable[[list[Message]], str]:
    """A layout of one pattern per message, after a system message that is put in where there is none."""

    def lay_out(messages: list[Message]) -> str:
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        return bos + "".join(pattern.format(role=m["role"], content=m["content"]) for m in messages) + prompt

    return lay_out


def tulu(messages: list[Message], bos: str = "") -> str:
    end = {"assistant": "</s>"}
    text = "".join(f"<|{m['role']}|>\n{m['content']}{end.get(m['role'], '')}\n" for m in messages)
    return bos + text + "<|assistant|>\n"


def alpaca(messages: list[Message]) -> str:
    head = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    heading = {"system": "", "user": "\n\n### Instruction:\n", "assistant": "\n\n### Response:\n"}
    text = "".join(heading[m["role"]] + m["content"] + "</s>" * (m["role"] == "assistant") for m in messages)
    return "<s>" + ("" if messages[0]["role"] == "system" else head) + text + "\n\n### Response:\n"


CHATML, CHATML_PROMPT = "<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n"
LAYOUTS = {
    "chatml": blocks(CHATML, CHATML_PROMPT),
    "salamandra": blocks(CHATML, CHATML_PROMPT),
    "salamandra-default": blocks(CHATML, CHATML_PROMPT, system="system message. Today Date: 2024-09-30"),
    "smollm2": blocks(
        CHATML, CHATML_PROMPT, system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    ),
    "qwen2.5": blocks(
        CHATML, CHATML_PROMPT, system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    ),
    "qwen3-instruct": blocks(CHATML, CHATML_PROMPT),
    "zephyr": blocks("<|{role}|>\n{content}</s>\n", "<|assistant|>\n"),
    "llama4": blocks(
        "<|header_start|>{role}<|header_end|>\n\n{content}<|eot|>",
        "<|header_start|>assistant<|header_end|>\n\n",
        bos="<s>",
    ),
    "tulu": tulu,
    "olmo2": lambda messages: tulu(messages, "<s>"),
    "alpaca": alpaca,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str) -> None:
    compared = 0
    for talk in SPOKEN:
        messages = [dict(message) for message in talk.messages]
        if name == "llama4" and messages[0]["role"] == "system":
            messages[0]["content"] = messages[0]["content"].strip()
        if name == "alpaca" and "system" in [message["role"] for message in messages[1:]]:
            continue
        assert write(bundled(name).source, talk, prompt=True)[0] == LAYOUTS[name](messages)
        compared += 1
    assert compared >= 100


# --- the families' own templates, where they are installed ---


def installed(package: str, path: str) -> str:
    """A template that an installed package holds, read without importing the package."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"{package} is not installed")
    text = (Path(found.origin).parent / path).read_text(encoding="utf-8")
    if not path.endswith(".py"):
        return text
    values = [node.value for node in ast.parse(text).body if isinstance(node, ast.Assign)]
    return max((v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)), key=len)


LLAMA4_FILE = "models/llama4/processing_llama4.py"
TOOLS_FIRST = "tools into the first message, which must be the user's"
OWN = [
    ("llama3", "trl", "llama3.jinja", {}, None),
    ("llama3.1", "trl", "llama3_1.jinja", {}, TOOLS_FIRST),
    ("llama3.1", "trl", "llama3_1.jinja", {"date_string": "1 Urt 2026"}, TOOLS_FIRST),
    ("llama3.1", "trl", "llama3_1.jinja", {"tools_in_user_message": False}, None),
    ("llama3.1", "trl", "llama3_2.jinja", {"date_string": "1 Urt 2026"}, TOOLS_FIRST),
    ("llama4", "transformers", LLAMA4_FILE, {}, TOOLS_FIRST),
    ("llama4", "transformers", LLAMA4_FILE, {"tools_in_user_message": False}, "needs a system message"),
    ("qwen2.5", "trl", "qwen2_5.jinja", {}, None),
    ("qwen3", "trl", "qwen3.jinja", {}, None),
    ("qwen3", "trl", "qwen3.jinja", {"enable_thinking": False}, None),
    ("qwen3", "trl", "qwen3.jinja", {"enable_thinking": True}, None),
    ("qwen3-instruct", "trl", "qwen3_instruct_2507.jinja", {}, None),
]


@pytest.mark.parametrize(("name", "package", "file", "kwargs", "departs"), OWN)
def test_equals_the_familys_own(name: str, package: str, file: str, kwargs: Any, departs: str | None) -> None:
    own = installed(package, file if package == "transformers" else f"chat_templates/{file}")
    same = 0
    for talk in CORPUS:
        for prompt in (False, True):
            expected, _ = attempt(own, talk, prompt, **kwargs)
            text, refused = attempt(bundled(name).source, talk, prompt, **kwargs)
            assert text == expected or (departs and departs in refused)
            same += text is not None
    assert same > 1.2 * len(CORPUS)


@pytest.mark.parametrize(
    ("name", "package", "file"), sorted({(name, package, file) for name, package, file, *_ in OWN if "3_2" not in file})
)
def test_a_folder_with_the_familys_own_text_is_known(name: str, package: str, file: str) -> None:
    own = installed(package, file if package == "transformers" else f"chat_templates/{file}")
    known = recognise(own, "chat_template.jinja")
    assert known.name == f"{name} (the family's own)"
    assert (known.source, known.digest) == (own, template_digest(own))
    assert known.facts == dataclasses.replace(bundled(name).facts, marks="unproved")


def test_chatml_is_what_its_descendants_write_without_a_default() -> None:
    for own in ("smollm2", "salamandra-default", "qwen2.5", "qwen3-instruct"):
        for talk in SPOKEN:
            if talk.messages[0]["role"] == "system":
                assert write(bundled("chatml").source, talk) == write(bundled(own).source, talk)


# --- tools, thinking and dates ---

TOOL = {"type": "function", "function": {"name": "eguraldia", "parameters": {"type": "object", "properties": {}}}}
TOOL_LINE = (
    '{"type": "function", "function": {"name": "eguraldia", "parameters": {"type": "object", "properties": {}}}}'
)
ARGUMENTS = '{"non": "Irún"}'
CALL: Message = {"role": "assistant", "tool_calls": [{"function": {"name": "eguraldia", "arguments": {"non": "Irún"}}}]}
USED = Conversation([*say("uZer?").messages, CALL, *say("t12 °C", "aHotz.").messages], [TOOL])
HERMES = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    f"signatures within <tools></tools> XML tags:\n<tools>\n{TOOL_LINE}\n</tools>\n\nFor each function call, return a "
    "json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nZer?<|im_end|>\n<|im_start|>assistant\n"
)
HERMES_CALL = '<tool_call>\n{"name": "eguraldia", "arguments": {"non": "Irún"}}\n</tool_call><|im_end|>'
HERMES_RESULT = (
    "\n<|im_start|>user\n<tool_response>\n12 °C\n</tool_response><|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
)
LLAMA_CALL = '{"name": "eguraldia", "parameters": {"non": "Irún"}}'
LLAMA_TOOLS = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    'answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of argument '
    'name and its value}.Do not use variables.\n\n{\n    "type": "function",\n    "function": {\n        "name": '
    '"eguraldia",\n        "parameters": {\n            "type": "object",\n            "properties": {}\n        }\n'
    "    }\n}\n\nZer?"
)


def headed(start: str, end: str, close: str, turns: list[tuple[str, str]]) -> str:
    """Turns in a Llama layout."""
    return "<s>" + "".join(f"{start}{role}{end}\n\n{text}{close}" for role, text in turns)


def llama(call: str) -> list[tuple[str, str]]:
    return [("user", LLAMA_TOOLS), ("assistant", call), ("ipython", '"12 °C"'), ("assistant", "Hotz.")]


DATED = "Environment: ipython\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
WRITTEN = {
    "llama3.1": headed(*LLAMA, [("system", DATED), *llama(LLAMA_CALL)]),
    "llama4": headed(*LLAMA4[:3], llama(f"<|python_start|><|python_end|>{LLAMA_CALL}")),
    "qwen2.5": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n"
    + HERMES
    + HERMES_CALL
    + HERMES_RESULT.format("Hotz."),
    # the call, too, comes after the last question, but only the last answer gets a block without reasoning
    "qwen3": "<|im_start|>system\n" + HERMES + HERMES_CALL + HERMES_RESULT.format("<think>\n\n</think>\n\nHotz."),
    "qwen3-instruct": "<|im_start|>system\n" + HERMES + HERMES_CALL + HERMES_RESULT.format("Hotz."),
}


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools_calls_and_results(name: str) -> None:
    text, spans = write(bundled(name).source, USED)
    assert text == WRITTEN[name]
    call = HERMES_CALL if "qwen" in name else LLAMA_CALL + {"llama3.1": "<|eot_id|>", "llama4": "<|eot|>"}[name]
    call = "<|python_start|><|python_end|>" + call if name == "llama4" else call
    assert text[slice(*spans[0])] == call
    given: Message = {"role": "assistant", "tool_calls": [{"function": {"name": "eguraldia", "arguments": ARGUMENTS}}]}
    as_text = Conversation([USED.messages[0], given, *USED.messages[2:]], [TOOL])
    assert write(bundled(name).source, as_text) == (text, spans)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_empty_lists_are_none_and_values_are_no_text(name: str) -> None:
    source, talk = bundled(name).source, say("uZer?", "aHotz.")
    empty = Conversation([talk.messages[0], {**talk.messages[1], "tool_calls": []}], [])
    assert write(source, empty) == write(source, talk)
    value = Conversation([*USED.messages[:2], {"role": "tool", "content": {"c": 12}}], [TOOL])
    if name.startswith("qwen"):
        with pytest.raises((TypeError, TemplateError)):
            write(source, value)
    else:
        assert '{"c": 12}' in write(source, value)[0]


def test_reasoning_of_the_last_answer_is_kept_and_of_earlier_ones_left_out() -> None:
    thinks: Message = {"role": "assistant", "content": "Bai.", "reasoning_content": "Agian."}
    last = Conversation([*say("uBai?").messages, thinks], None)
    text, spans = write(bundled("qwen3").source, last)
    assert text[slice(*spans[0])] == "<think>\nAgian.\n</think>\n\nBai.<|im_end|>"
    inside = say("uBai?", "a<think>\nAgian.\n</think>\n\nBai.")
    assert write(bundled("qwen3").source, inside) == (text, spans)
    later = Conversation([*last.messages, *say("uZiur?").messages], None)
    text, spans = write(bundled("qwen3").source, later)
    assert text[slice(*spans[0])] == "Bai.<|im_end|>"
    assert "Agian" not in text


def test_without_thinking_the_empty_block_belongs_to_the_prompt() -> None:
    talk = say("uBai?", "aBai.")
    source = bundled("qwen3").source
    text, spans = write(source, talk, enable_thinking=False)
    prompt = write(source, say("uBai?"), prompt=True, enable_thinking=False)[0]
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (text[: spans[0][0]], text[slice(*spans[0])]) == (prompt, "Bai.<|im_end|>")
    text, spans = write(source, talk)
    assert text[slice(*spans[0])] == "<think>\n\n</think>\n\nBai.<|im_end|>"


@pytest.mark.parametrize(("name", "date"), [("llama3.1", "26 Jul 2024"), ("salamandra-default", "2024-09-30")])
def test_the_date_is_fixed_and_can_be_given(name: str, date: str) -> None:
    assert date in write(bundled(name).source, say("uBai?"))[0]
    given = write(bundled(name).source, say("uBai?"), date_string="1714")[0]
    assert "1714" in given
    assert date not in given


# --- marks ---


@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen3"])
def test_marks_hold_every_answer_and_its_end_of_turn(name: str) -> None:
    """Each span begins where the prompt for it ends and stops with the end of turn; nothing before it ever changes."""
    source, end, proved = bundled(name).source, end_of_turn(TINY, bundled(name)).text, 0
    for talk, text, spans in rendered(CORPUS, name):
        answers = [index for index, message in enumerate(talk.messages) if message["role"] == "assistant"]
        for (start, stop), index in zip(spans, answers, strict=True):
            answer, said = text[start:stop], str(talk.messages[index].get("content") or "").strip()
            assert answer.endswith(end)
            assert said in answer or (name == "llama3.1" and "tool_calls" in talk.messages[index])
            if index > 0:  # a family that reads its first message has no prompt before it
                before = Conversation(talk.messages[:index], talk.tools)
                after = Conversation(talk.messages[: index + 1], talk.tools)
                assert text[:start] == write(source, before, prompt=True)[0]
                assert text[:stop] == write(source, after)[0].removesuffix("\n")
                proved += 1
    assert proved > 150


@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}], ids=["thinking", "no-thinking"])
def test_marks_hold_the_last_answer_where_history_is_rewritten(kwargs: dict[str, Any]) -> None:
    source, proved, moved = bundled("qwen3").source, 0, 0
    for talk in CORPUS:
        if talk.messages[-1]["role"] != "assistant" or len(talk.messages) == 1:
            continue
        text, spans = write(source, talk, **kwargs)
        assert len(spans) == sum(message["role"] == "assistant" for message in talk.messages)
        before = write(source, Conversation(talk.messages[:-1], talk.tools), prompt=True, **kwargs)[0]
        if text.startswith(before):
            assert spans[-1] == (len(before), len(text) - 1)
            proved += 1
        moved += not text.startswith(before)
        assert all(text[start:stop].endswith("<|im_end|>") for start, stop in spans)
    assert proved > 70
    assert 0 < moved < 50


@pytest.mark.parametrize("name", NAMES)
def test_saved_form_renders_the_same(name: str) -> None:
    template, compared = bundled(name), 0
    assert "{%- generation" not in template.inference
    assert "{% generation" not in template.inference
    for talk, text, _ in rendered(CORPUS, name):
        assert write(template.inference, talk) == (text, [])
        prompt = write(template.source, talk, prompt=True)[0]
        assert write(template.inference, talk, prompt=True)[0] == prompt
        compared += 1
    assert compared > 100
    assert recognise(template.inference, "x") == template
