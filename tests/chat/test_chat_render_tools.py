"""Tool calls carry loss, tool results and tools never do."""

from __future__ import annotations

import pytest
from chat_tiny import LLAMA3, SPECIAL, bundled, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.chat.render import MASKED, render_conversation, render_prompt, render_turns
from posttrain.chat.templates import ChatTemplate

TINY = make_tokenizer(
    [*SPECIAL, *LLAMA3], ("<think>", "</think>"), bos_token="<s>", eos_token="</s>", pad_token="<|pad|>"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "eguraldia",
            "description": "Weather of a town",
            "parameters": {"type": "object", "properties": {"herria": {"type": "string"}}},
        },
    }
]


def call(**arguments):
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "eguraldia", "arguments": arguments}}],
    }


CHAT = [
    {"role": "user", "content": "Zer eguraldi dago Gasteizen?"},
    call(herria="Gasteiz"),
    {"role": "tool", "name": "eguraldia", "content": '{"tenperatura": 4, "oharra": "elurra ❄"}'},
    {"role": "assistant", "content": "Elurra, 4 °C."},
]
GOLDEN = {
    "qwen2.5": [
        '<tool_call>\n{"name": "eguraldia", "arguments": {"herria": "Gasteiz"}}\n</tool_call><|im_end|>',
        "Elurra, 4 °C.<|im_end|>",
    ],
    "llama3.1": [
        '{"name": "eguraldia", "parameters": {"herria": "Gasteiz"}}<|eot_id|>',
        "Elurra, 4 °C.<|eot_id|>",
    ],
}


def runs(rendered):
    """Texts of the trained runs of a row."""
    found, run = [], []
    for label in [*rendered.labels, MASKED]:
        if label != MASKED:
            run.append(label)
        elif run:
            found.append(TINY.decode(run))
            run = []
    return found


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("known", [True, False], ids=["bundled", "unmarked"])
def test_calls_are_trained_and_results_are_not(name, known):
    template = bundled(name) if known else ChatTemplate("own", bundled(name).inference)
    rendered = render_conversation(TINY, template, CHAT, TOOLS)
    assert runs(rendered) == GOLDEN[name]
    assert rendered.input_ids == TINY.apply_chat_template(
        CHAT, tools=TOOLS, chat_template=bundled(name).inference, return_dict=False
    )
    assert "elurra ❄" in rendered.text
    for stop in (1, 3):
        prompt = render_prompt(TINY, template, CHAT[:stop], TOOLS)
        assert rendered.input_ids[: len(prompt)] == prompt
        assert rendered.labels[len(prompt)] != MASKED


def test_two_calls_at_once_and_a_thought_before_them():
    double = {**call(herria="Bilbo"), "content": "Goazen."}
    double["tool_calls"] = [*double["tool_calls"], *call(herria="Iruñea")["tool_calls"]]
    rendered = render_conversation(TINY, bundled("qwen2.5"), [CHAT[0], double, CHAT[2], CHAT[2], CHAT[3]], TOOLS)
    assert len(runs(rendered)) == 2
    assert runs(rendered)[0].startswith('Goazen.\n<tool_call>\n{"name": "eguraldia", "arguments": {"herria": "Bilbo"}}')
    assert runs(rendered)[0].endswith('{"herria": "Iruñea"}}\n</tool_call><|im_end|>')
    thinking = {**call(herria="Bilbo"), "reasoning_content": "Galdetu behar dut."}
    rendered = render_conversation(TINY, bundled("qwen3"), [CHAT[0], thinking], TOOLS)
    assert runs(rendered) == [
        "<think>\nGaldetu behar dut.\n</think>\n\n<tool_call>\n"
        '{"name": "eguraldia", "arguments": {"herria": "Bilbo"}}\n</tool_call><|im_end|>'
    ]


words = st.text("ab {}\"':\n<>|é❄", max_size=8)
asked = words.map(lambda text: {"role": "user", "content": f"q{text}?"})
answered = words.map(lambda text: {"role": "assistant", "content": f"a{text}."})
called = words.map(lambda text: [call(herria=text), {"role": "tool", "name": "eguraldia", "content": f"r{text}!"}])


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["qwen2.5", "llama3.1", "qwen3"]),
    st.booleans(),
    st.lists(st.tuples(asked, st.lists(called, max_size=2), answered), min_size=1, max_size=3),
)
def test_every_trained_run_is_one_assistant_message(name, known, rounds):
    template = bundled(name) if known else ChatTemplate("own", bundled(name).inference)
    chat = []
    for question, uses, answer in rounds:
        chat += [question, *(message for use in uses for message in use), answer]
    rows = render_turns(TINY, template, chat, TOOLS)
    found = [text for row in rows for text in runs(row)]
    spoken = [message for message in chat if message["role"] == "assistant"]
    assert len(found) == len(spoken)
    for text, message in zip(found, spoken, strict=True):
        assert text.count("<|im_end|>") + text.count("<|eot_id|>") == 1
        assert ("eguraldia" in text) == ("tool_calls" in message)
        assert message["content"].strip() in text
    for row in rows:
        assert TINY.decode(row.input_ids) == row.text
        for message in chat:
            if message["role"] in ("user", "tool"):
                assert not any(message["content"] in row.text[start:stop] for start, stop in row.spans)
