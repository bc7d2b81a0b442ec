"""Marks added to any template: nothing changes, and they hold what the offset mask holds, or there are none."""

from __future__ import annotations

from itertools import pairwise

import pytest
from chat_tiny import LLAMA3, SPECIAL, bundled, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.chat.corpus import conversations
from posttrain.chat.jinja import render_marked, render_text
from posttrain.chat.marking import mark
from posttrain.chat.render import render_conversation
from posttrain.chat.templates import ChatTemplate
from posttrain.errors import ChatError

MORE = ["[INST]", "[/INST]", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|im_sep|>"]
MORE += ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<start_of_turn>", "<end_of_turn>"]
TINY = make_tokenizer(SPECIAL + LLAMA3 + MORE, bos_token="<s>", eos_token="</s>", pad_token="<|pad|>")
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}" + PROMPT
)
CHAT = [
    {"role": "user", "content": "Zer da Euskadi?"},
    {"role": "assistant", "content": "Herri bat."},
    {"role": "user", "content": "Eta Galicia?"},
    {"role": "assistant", "content": "Beste bat."},
]
EASY = {
    "one line": CHATML,
    "lines": """{% for message in messages %}
    {% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
    {% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] + eos_token }}
    {% endif %}
    {% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
    {% endif %}
{% endfor %}
""",
    "text between tags": """{% for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}""",
    "windows newlines": "{% for m in\r\n messages %}\r\n<|im_start|>{{ m.role }}\r\n{{ m.content }}<|im_end|>\r\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\r\n{% endif %}\r\n",
    "traps": """{#- {% for x in y %} -#}
{%- macro turn(role, text) -%}{%- for part in [role, text] -%}{{ part + '\n' if loop.first else part }}{%- endfor -%}
{%- endmacro -%}
{%- set ns = namespace(count=0, system='') -%}
{%- for message in messages -%}{%- if message.role == 'system' -%}{%- set ns.system = message.content -%}
{%- break -%}{%- endif -%}{%- endfor -%}
{{- '{% endfor %}' + "{{ x }}" -}} {% raw %}{% for %}{{ {% endraw +%}
{%- for message in messages if message.role != 'system' %}
    {%- if message.role == 'tool' and not message.content %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- set body %}{{ turn(message.role, message.content) }}{% endset %}
    {{- '<|im_start|>' ~ body }}{% set closing = '<|im_end|>' %}
    {%- for call in message.tool_calls or [] -%}{{- call.function.name -}}{%- else %}{%- endfor -%}
    {{- closing }}  {{ ns.count if message.role == 'user' }}{%+ if loop.last %}{% endif +%}
{% else -%}
    nothing
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "header in the turn before": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% else %}"
    "{{ raise_exception('no role ' + m.role) }}{% endif %}{% endfor %}",
    "closed text": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
    "other role name": "{{ bos_token }}{% for m in messages %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
}
FAMILIES = ["chatml", "llama3", "zephyr", "tulu", "qwen2.5", "granite", "phi4", "smollm2", "mistral-v1", "llama3.1"]
STRIPS = CHATML.replace(
    "message['content']", "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
)
HARD = {
    "reasoning is stripped from history": (STRIPS, "rewrites history"),
    "prompt with more than the header": (
        CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\nSure: '"),
        "the prompt for this answer is not how the conversation with the answer begins",
    ),
    "closed by the next turn": (
        "{% for m in messages %}{{ ('' if loop.first else '<|im_end|>\n') + '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}",
        "only when something follows",
    ),
    "no loop": ("{{ messages[0].content + '<|im_start|>' + messages[1].content + '<|im_end|>' }}", ""),
    "loop over numbers": (
        CHATML.replace(
            "for message in messages %}", "for i in range(messages|length) %}{% set message = messages[i] %}"
        ),
        "marks would not lie on each answer",
    ),
    "two variables": (
        CHATML.replace("for message in messages %}", "for _, message in messages | zip | list %}"),
        "",
    ),
    "inside a macro": (
        "{% macro all() %}" + CHATML.replace(PROMPT, "") + "{% endmacro %}{{ all() }}" + PROMPT,
        "no loop over messages",
    ),
    "text before continue": (
        CHATML.replace("{{'<|im", "{{ bos_token }}{% if message.role == 'system' %}{% continue %}{% endif %}{{'<|im"),
        "no loop over messages",
    ),
}


def marked(template: ChatTemplate) -> ChatTemplate:
    """The template with marks; fails with the reason where there are none."""
    marking = mark(TINY, template)
    assert marking.template is not None, marking.reason
    return marking.template


def outcome(template, conversation):
    """A rendered row, or its refusal."""
    try:
        return render_conversation(TINY, template, conversation.messages, conversation.tools)
    except ChatError:
        return None


def check_equal(plain: ChatTemplate, found: ChatTemplate, seed: int) -> int:
    """Compares rows of conversations that the proof did not use; returns how many answers were compared."""
    compared = 0
    for conversation in conversations(60, seed):
        row = outcome(plain, conversation)
        roles = ["assistant", *(message["role"] for message in conversation.messages)]
        if row is None or ("assistant", "assistant") in pairwise(roles):
            continue  # an answer that nobody prompts for
        assert outcome(found, conversation) == row
        text, spans = render_marked(TINY, found, conversation.messages, conversation.tools)
        assert (text, spans) == (row.text, row.spans)
        assert text == render_text(TINY, plain, conversation.messages, conversation.tools)
        compared += len(spans)
    return compared


@pytest.mark.parametrize("source", EASY.values(), ids=EASY)
def test_marks_are_added_and_nothing_changes(source):
    plain = ChatTemplate("own", source)
    found = marked(plain)
    assert found.facts.marks == "exact"
    assert "{%- generation -%}" in found.source
    assert check_equal(plain, found, seed=5) > 20


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_marked_as_by_hand(name):
    by_hand = bundled(name)
    plain = ChatTemplate("own", by_hand.inference)
    found = marked(plain)
    assert check_equal(plain, found, seed=6) > 20
    for conversation in conversations(40, 7, odd=False):
        row = outcome(by_hand, conversation)
        assert row is None or outcome(found, conversation) == row


def test_the_text_that_is_saved_is_the_users_own():
    for source in EASY.values():
        plain = ChatTemplate("own", source)
        found = marked(plain)
        assert found.inference == source
        assert found.digest == plain.digest
        assert found.name == "own"


def test_answers_and_their_end_of_turn_are_marked():
    text, spans = render_marked(TINY, marked(ChatTemplate("own", CHATML)), CHAT)
    assert [text[start:stop] for start, stop in spans] == ["Herri bat.<|im_end|>", "Beste bat.<|im_end|>"]
    prompt, spans = render_marked(TINY, marked(ChatTemplate("own", CHATML)), CHAT[:3], add_generation_prompt=True)
    assert [prompt[start:stop] for start, stop in spans] == ["Herri bat.<|im_end|>"]


def test_right_marks_stay_and_wrong_ones_are_replaced():
    for name in ("chatml", "llama3", "tulu"):
        own = ChatTemplate("own", bundled(name).source)
        assert marked(own).source == own.source
        assert marked(own).inference == own.inference
    early = (
        bundled("chatml")
        .source.replace("{%- generation -%}", "")
        .replace(
            "{{- '<|im_start|>' + message['role'] + '\\n' -}}\n    {%- if message['role'] == 'assistant' -%}",
            "{%- if message['role'] == 'assistant' -%}{%- generation -%}{{- '<|im_start|>assistant\\n' -}}",
        )
    )
    early = early.replace("{%- else -%}", "{%- else -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}")
    found = marked(ChatTemplate("own", early))
    assert found.source != early
    assert check_equal(ChatTemplate("own", bundled("chatml").inference), found, seed=8) > 20


def test_marks_that_change_the_text_are_replaced():
    loses_x = (
        "{% for m in messages %}{% set x = '' %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{% set x = '!' %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m.content + '<|im_end|>' }}{% endif %}{{ x if loop.last }}{% endfor %}"
    )
    own = ChatTemplate("own", loses_x + PROMPT)
    texts = [render_text(TINY, ChatTemplate("own", source), CHAT) for source in (own.source, own.inference)]
    assert texts[0] != texts[1]
    found = marked(own)
    assert found.source != own.source
    assert render_marked(TINY, found, CHAT)[0] == texts[1]


@pytest.mark.parametrize(("source", "reason"), HARD.values(), ids=HARD)
def test_what_cannot_be_proved_is_refused_with_its_reason(source, reason):
    marking = mark(TINY, ChatTemplate("own", source))
    assert marking.template is None
    assert reason in marking.reason
    assert marking.reason
    assert "\n" not in marking.reason


def test_a_template_that_takes_next_to_nothing_is_not_proved():
    picky = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + CHATML
    assert "too long" in mark(TINY, ChatTemplate("own", picky.replace("> 2", "> 3 or messages[0].content"))).reason


def test_the_proof_is_remembered_per_tokenizer_and_template():
    first = marked(ChatTemplate("one", CHATML))
    second = marked(ChatTemplate("two", CHATML))
    assert first.source is second.source
    assert (first.name, second.name) == ("one", "two")


def test_a_proved_template_is_returned_as_it_is():
    assert mark(TINY, bundled("chatml")).template is bundled("chatml")


SIGNS = st.sampled_from(["", "-", "+"])
SPACE = st.sampled_from(["", " ", "\n", "\n  ", " \n", "\n\n"])


@settings(max_examples=25, deadline=None)
@given(st.lists(SIGNS, min_size=8, max_size=8), st.lists(SPACE, min_size=5, max_size=5))
def test_white_space_control_of_any_kind_stays(signs, space):
    a, b, c, d, e, f, g, h = signs
    first, second, third, fourth, fifth = space
    source = (
        f"X{first}{{%{a} for m in messages {b}%}}{second}<|im_start|>{{{{ m.role + '\n' + m.content }}}}"
        f"{third}{{%{c} if m.role {d}%}}{fourth}<|im_end|>{{%{e} endif {f}%}}{fifth}{{%{g} endfor {h}%}}"
        f"{{% if add_generation_prompt {b}%}}{second}<|im_start|>assistant{{{{ '\n' }}}}{{% endif %}}"
    )
    plain = ChatTemplate("own", source)
    assert check_equal(plain, marked(plain), seed=9) > 20
