"""Mistral, Gemma, Phi, DeepSeek-R1, Granite, OLMo-3: layouts, marks, and every fact of their facts files."""

from __future__ import annotations

import pytest
from chat_families import CHAT, END, NAMES, TINY, TOKENS, corpus, text_of, tried, trl_template
from chat_tiny import bundled

from posttrain.chat.jinja import render_marked
from posttrain.chat.templates import ChatTemplate, TemplateFacts, recognise
from posttrain.errors import ChatError

GEMMA = (
    "<s><start_of_turn>user\nS\n\nU1<end_of_turn>\n<start_of_turn>model\nA1<end_of_turn>\n"
    "<start_of_turn>user\nU2<end_of_turn>\n<start_of_turn>model\nA2<end_of_turn>\n"
)
GOLDEN = {
    "mistral-v1": "<s> [INST] S\n\n U1  [/INST]  A1 </s> [INST] U2 [/INST] A2</s>",
    "mistral-v3": "<s>[INST] S\n\n U1 [/INST] A1</s>[INST] U2[/INST] A2</s>",
    "mistral-v7": "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST] U1 [/INST] A1 </s>[INST]U2[/INST]A2</s>",
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "phi3": "<|system|>\nS<|end|>\n<|user|>\n U1 <|end|>\n<|assistant|>\n A1 <|end|>\n"
    "<|user|>\nU2<|end|>\n<|assistant|>\nA2<|end|>\n</s>",
    "phi4": "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|> U1 <|im_end|>"
    "<|im_start|>assistant<|im_sep|> A1 <|im_end|><|im_start|>user<|im_sep|>U2<|im_end|>"
    "<|im_start|>assistant<|im_sep|>A2<|im_end|>",
    "deepseek-r1": "<s>S<｜User｜> U1 <｜Assistant｜> A1 <｜end▁of▁sentence｜><｜User｜>U2"
    "<｜Assistant｜><think>\n\n</think>\n\nA2<｜end▁of▁sentence｜>",
    "granite": "<|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|> U1 <|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|> A1 <|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>U2<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>A2<|end_of_text|>\n",
    "olmo3": "<|im_start|>system\nS<|im_end|>\n"
    "<|im_start|>user\n U1 <|im_end|>\n<|im_start|>assistant\n A1 <|im_end|>\n"
    "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
}
PROMPT_END = {
    **dict.fromkeys(["mistral-v1", "mistral-v3", "mistral-v7"], ""),
    **dict.fromkeys(["gemma", "gemma3"], "<start_of_turn>model\n"),
    "phi3": "<|assistant|>\n",
    "phi4": "<|im_start|>assistant<|im_sep|>",
    "deepseek-r1": "<｜Assistant｜><think>\n",
    "granite": "<|start_of_role|>assistant<|end_of_role|>",
    "olmo3": "<|im_start|>assistant\n",
}
TOOLS = [{"type": "function", "function": {"name": "sum2", "description": "Two", "parameters": {"type": "object"}}}]
SUM2 = '{"type": "function", "function": {"name": "sum2", "description": "Two", "parameters": {"type": "object"}}}'
CALL = {"type": "function", "id": "abcdef123", "function": {"name": "sum2", "arguments": {"a": 1, "b": "é"}}}
TOOL_CHAT = [
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"x": 1}', "tool_call_id": "abcdef123", "name": "sum2"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
]
TOOL_GOLDEN = {
    "mistral-v3": f"<s>[AVAILABLE_TOOLS] [{SUM2}][/AVAILABLE_TOOLS][INST] U1[/INST]"
    '[TOOL_CALLS] [{"name": "sum2", "arguments": {"a": 1, "b": "é"}, "id": "abcdef123"}]</s>'
    '[TOOL_RESULTS] {"content": {"x": 1}, "call_id": "abcdef123"}[/TOOL_RESULTS] A1</s>[INST] U2[/INST]',
    "mistral-v7": f"<s>[AVAILABLE_TOOLS][{SUM2}][/AVAILABLE_TOOLS][INST]U1[/INST]"
    '[TOOL_CALLS][{"name": "sum2", "arguments": {"a": 1, "b": "é"}, "id": "abcdef123"}]</s>'
    '[TOOL_RESULTS]abcdef123[TOOL_CONTENT]{"x": 1}[/TOOL_RESULTS]A1</s>[INST]U2[/INST]',
    "granite": "<|start_of_role|>user<|end_of_role|>U1<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>"
    '<|tool_call|>[{"name": "sum2", "arguments": {"a": 1, "b": "é"}}]<|end_of_text|>\n'
    '<|start_of_role|>tool<|end_of_role|>{"x": 1}<|end_of_text|>\n'
    "<|start_of_role|>assistant<|end_of_role|>A1<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>U2<|end_of_text|>\n",
    "olmo3": f"plug into functions.<functions>[{SUM2}]</functions><|im_end|>\n<|im_start|>user\nU1<|im_end|>\n"
    '<|im_start|>assistant\n<function_calls>sum2(a=1, b="é")</function_calls><|im_end|>\n'
    '<|im_start|>environment\n{"x": 1}<|im_end|>\n'
    "<|im_start|>assistant\nA1<|im_end|>\n<|im_start|>user\nU2<|im_end|>\n",
}
GRANITE_TOOLS = """<|start_of_role|>available_tools<|end_of_role|>[
    {
        "type": "function",
        "function": {
            "name": "sum2",
            "description": "Two",
            "parameters": {
                "type": "object"
            }
        }
    }
]<|end_of_text|>
"""


def rendered(name):
    """The conversations that a template takes and writes in full, with their texts and marks."""
    template = bundled(name)
    for talk in corpus():
        if talk.tools and not template.facts.tools:
            continue
        if tried(template, talk.messages, talk.tools) is not None:
            yield talk, *render_marked(TINY, template, talk.messages, talk.tools)


# layouts


@pytest.mark.parametrize("name", NAMES)
def test_template_renders_its_layout(name):
    template = bundled(name)
    assert text_of(template, CHAT) == GOLDEN[name]
    prompt = text_of(template, CHAT[:4], prompt=True)
    assert prompt.endswith(PROMPT_END[name])
    assert GOLDEN[name].startswith(prompt)
    last = " A2" if name in ("mistral-v1", "mistral-v3") else "A2"
    rest = GOLDEN[name][len(prompt) :].removeprefix("\n</think>\n\n")
    assert rest.removesuffix("</s>" if name == "phi3" else "").rstrip("\n") == last + END[name]


@pytest.mark.parametrize("name", list(TOOL_GOLDEN))
def test_tools_calls_and_results(name):
    template = bundled(name)
    assert text_of(template, TOOL_CHAT, TOOLS).endswith(TOOL_GOLDEN[name])
    text, spans = render_marked(TINY, template, TOOL_CHAT, TOOLS)
    calls, answer = [text[start:stop] for start, stop in spans]
    assert "sum2" in calls
    assert calls.endswith(END[name])
    assert answer.lstrip(" ") == "A1" + END[name]
    as_text = [dict(CALL, function={"name": "sum2", "arguments": '{"a": 1, "b": "é"}'})]
    as_text = [TOOL_CHAT[0], dict(TOOL_CHAT[1], tool_calls=as_text), *TOOL_CHAT[2:]]
    if name == "olmo3":
        with pytest.raises(ChatError, match="as an object"):
            text_of(template, as_text, TOOLS)
    else:
        assert text_of(template, as_text, TOOLS) == text
    if name == "granite":
        assert GRANITE_TOOLS in text
        assert "respond only with <|tool_call|> followed by a JSON list" in text


def test_olmo3_writes_tools_into_a_given_system_text():
    system = [{"role": "system", "content": "S."}, *TOOL_CHAT]
    assert text_of(bundled("olmo3"), system, TOOLS).startswith(
        f"<|im_start|>system\nS.<functions>[{SUM2}]</functions><|im_end|>\n<|im_start|>user\nU1"
    )


def test_mistral_wants_ids_of_nine_characters():
    for name in ("mistral-v3", "mistral-v7"):
        for message in ({"tool_calls": [dict(CALL, id="call_1")]}, {"tool_calls": [{"function": CALL["function"]}]}):
            with pytest.raises(ChatError, match="9 characters"):
                text_of(bundled(name), [TOOL_CHAT[0], {"role": "assistant", "content": "", **message}])
        with pytest.raises(ChatError, match="9 characters"):
            text_of(bundled(name), [*TOOL_CHAT[:2], {"role": "tool", "content": "1"}])


def test_words_beside_a_call():
    both = [TOOL_CHAT[0], dict(TOOL_CHAT[1], content="Wait.")]
    with pytest.raises(ChatError, match="both speaks and calls"):
        text_of(bundled("mistral-v3"), both)
    assert "[/INST]Wait.[TOOL_CALLS][{" in text_of(bundled("mistral-v7"), both)
    assert "<|end_of_role|>Wait.<|tool_call|>[{" in text_of(bundled("granite"), both)
    assert "assistant\nWait.<function_calls>sum2(" in text_of(bundled("olmo3"), both)


def test_granite_date_is_the_same_every_day():
    text = text_of(bundled("granite"), CHAT[1:2])
    assert (
        "Today's Date: December 19, 2024.\nYou are Granite, developed by IBM. You are a helpful AI assistant." in text
    )
    own = TINY.apply_chat_template(
        CHAT[1:2], chat_template=bundled("granite").inference, tokenize=False, date_string="May 01, 2026"
    )
    assert own == text.replace("December 19, 2024", "May 01, 2026")


def test_gemma3_takes_contents_in_parts():
    parts = [
        {"role": "system", "content": [{"type": "text", "text": "S"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What? "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
    ]
    template = bundled("gemma3")
    assert text_of(template, parts) == text_of(trl_template("gemma3"), parts)
    text, spans = render_marked(TINY, template, parts)
    assert "user\nS\n\n<start_of_image>What?<end_of_turn>" in text
    assert [text[start:stop] for start, stop in spans] == ["That.<end_of_turn>"]


# marks, and the saved form


@pytest.mark.parametrize("name", NAMES)
def test_marks_hold_every_answer_and_its_end_and_nothing_else(name):
    template, count = bundled(name), 0
    for talk, text, spans in rendered(name):
        answers = [index for index, message in enumerate(talk.messages) if message["role"] == "assistant"]
        assert len(spans) == len(answers)
        for index, (start, stop) in zip(answers, spans, strict=True):
            count += 1
            said, message = text[start:stop], talk.messages[index]
            assert said.endswith(END[name])
            assert said.count(END[name]) == 1
            for word in [message["content"].split("</think>")[-1], *(message.get("tool_calls") or [])]:
                assert (word["function"]["name"] if isinstance(word, dict) else word.strip()) in said
            if not message.get("tool_calls") and "<think>" not in message["content"]:
                exact = message["content"].strip() if template.facts.trims else message["content"]
                space = " " if name in ("mistral-v1", "mistral-v3") else ""
                before = said.removesuffix(END[name])
                assert before == space + exact or (name == "deepseek-r1" and before.endswith("</think>\n\n" + exact))
            for other in talk.messages[:index] + talk.messages[index + 1 :]:
                mark = other["content"].strip().rsplit(" ", 1)[-1]  # the corpus ends every text with its own word
                assert not mark.endswith(".") or mark not in said or mark in message["content"]
    assert count > 60


@pytest.mark.parametrize("name", NAMES)
def test_marks_begin_where_the_prompt_ends_and_history_is_kept(name):
    """Every prompt is how the text with its answer begins, whatever follows; but for deepseek-r1, once users follow."""
    template = bundled(name)
    assert (template.facts.history, template.facts.marks) == (
        ("rewritten", "offsets") if name == "deepseek-r1" else ("kept", "exact")
    )
    moved = 0
    for talk, text, spans in rendered(name):
        answers = [index for index, message in enumerate(talk.messages) if message["role"] == "assistant"]
        for index, (start, stop) in zip(answers, spans, strict=True):
            prompt = text_of(template, talk.messages[:index], talk.tools, prompt=True) if index else text[:start]
            if name == "deepseek-r1" and any(message["role"] == "user" for message in talk.messages[index:]):
                moved += text[:start] != prompt
                continue
            assert text[:start] == prompt
            assert text_of(template, talk.messages[: index + 1], talk.tools).startswith(text[:stop])
    assert (moved > 0) == (name == "deepseek-r1")


@pytest.mark.parametrize("name", NAMES)
def test_saved_form_has_no_marks_and_renders_the_same(name):
    template = bundled(name)
    assert "generation " not in template.inference.replace("generation_prompt", "")
    saved = ChatTemplate("saved", template.inference)
    for talk in corpus():
        for prompt in (False, True):
            mine = tried(template, talk.messages, talk.tools, prompt)
            assert tried(saved, talk.messages, talk.tools, prompt) == mine
    assert recognise(template.inference, "x") == template
    assert not any(bundled(other).digest == template.digest for other in NAMES if other != name)


# facts


def without(text):
    """The opening of a conversation without its system text, and without the block around it."""
    for block in ("<|system|>\nBe brief.<|end|>\n", "<|im_start|>system<|im_sep|>Be brief.<|im_end|>"):
        text = text.replace(block, "")
    return (
        text.replace("[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT]", "")
        .replace("Be brief.\n\n", "")
        .replace("Be brief.", "")
    )


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_complete(name):
    facts = bundled(name).facts
    assert facts.family != "unknown"
    assert facts.sources
    assert facts.checked_against
    unknown = TemplateFacts()
    for field in ("bos", "system", "default_system", "date", "order", "tools", "thinking", "history", "trims", "marks"):
        assert getattr(facts, field) != getattr(unknown, field), field
    assert all(len(digest) == 64 for digest in facts.digests)
    end = "eos_token" if END[name] == "</s>" else END[name]
    assert facts.stop[0] == end
    assert end in facts.required_tokens


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_true(name):
    template, facts = bundled(name), bundled(name).facts
    texts = [text_of(template, CHAT), text_of(template, CHAT[:2], prompt=True)]
    if facts.tools:
        texts.append(text_of(template, TOOL_CHAT, TOOLS))
    own = {"bos_token": "<s>", "eos_token": "</s>"}
    assert all(any(own.get(token, token) in text for text in texts) for token in facts.required_tokens)
    written = {token for token in TOKENS if any(token in text for text in texts)}
    plain = {"[INST]", "[/INST]"} if name == "mistral-v1" else set()
    assert written - plain <= {own.get(token, token) for token in facts.required_tokens}
    assert text_of(template, CHAT).startswith("<s>") == (facts.bos == "template")
    assert (" A1 " not in text_of(template, CHAT)) == facts.trims
    given = text_of(template, [{"role": "system", "content": "Be brief."}, CHAT[1]])
    default = facts.default_system.replace("{date}", "December 19, 2024")
    assert text_of(template, CHAT[1:2]) == (given.replace("Be brief.", default) if default else without(given))
    assert ("Be brief.\n\n" in given) == (facts.system == "folded")
    assert ("reasoned" in text_of(template, [CHAT[1], dict(CHAT[2], reasoning_content="reasoned")])) == facts.thinking
    assert (
        tried(template, TOOL_CHAT, TOOLS) is not None and "sum2" in text_of(template, TOOL_CHAT, TOOLS)
    ) == facts.tools


@pytest.mark.parametrize("name", NAMES)
def test_orders_and_roles_are_as_the_facts_say(name):
    template, facts = bundled(name), bundled(name).facts
    twice = tried(template, [CHAT[1], CHAT[3], CHAT[2]]) is not None
    first = tried(template, [CHAT[2], CHAT[1], CHAT[4]]) is not None
    late = tried(template, [*CHAT[1:3], CHAT[0], *CHAT[3:]]) is not None
    assert {(True, True, True): "free", (True, True, False): "system first", (False, False, False): "alternating"}[
        (twice, first, late)
    ] == facts.order
    asked = [CHAT[1], {"role": "tool", "content": "T", "tool_call_id": "abcdef123"}]
    assert (tried(template, asked) is not None) == ("tool" in facts.roles)
