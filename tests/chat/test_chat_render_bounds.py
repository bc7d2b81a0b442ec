"""What a template may not do: never end, drown the row, mark the wrong text, begin twice."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from chat_tiny import LLAMA3, SPECIAL, bundled, make_tokenizer

from posttrain.chat import jinja
from posttrain.chat.contract import check_beginning
from posttrain.chat.render import render_conversation, render_prompt
from posttrain.chat.templates import ChatTemplate, TemplateFacts
from posttrain.errors import ChatError

TINY = make_tokenizer([*SPECIAL, *LLAMA3], bos_token="<s>", eos_token="</s>", pad_token="<|pad|>")
CHAT = [
    {"role": "user", "content": "Zer da Euskadi?"},
    {"role": "assistant", "content": "Herri bat."},
    {"role": "user", "content": "Que é Galicia?"},
    {"role": "assistant", "content": "Unha comunidade"},
]
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def own(source, marks="unproved"):
    return ChatTemplate("own", source, TemplateFacts(marks=marks))


def test_a_template_that_writes_without_end_is_stopped():
    flood = own("{% for a in range(90000) %}{% for b in range(90000) %}{{ 'spam and more' }}{% endfor %}{% endfor %}")
    with pytest.raises(ChatError, match=r"writes more than 1,0\d\d,\d{3} characters"):
        render_prompt(TINY, flood, CHAT[:1])


def test_a_template_that_loops_without_writing_is_stopped(monkeypatch):
    monkeypatch.setattr(jinja, "SECONDS", 0.2)
    idle = own("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}")
    with pytest.raises(ChatError, match=r"not done with a conversation after 0\.2 seconds"):
        render_prompt(TINY, idle, CHAT[:1])
    assert render_prompt(TINY, bundled("chatml"), CHAT[:1])  # and the timer is off again


@pytest.mark.parametrize(
    "source", ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ range(10 ** 9) }}", "{{ messages[9].x }}"]
)
def test_a_template_that_breaks_down_is_no_traceback(source):
    with pytest.raises(ChatError, match="cannot render"):
        render_prompt(TINY, own(source), CHAT[:1])


def test_long_rows_are_no_flood_and_threads_render_too():
    long = [{"role": "user", "content": "ab " * 700_000}]
    assert len(jinja.render_text(TINY, bundled("chatml"), long)) > 2_000_000
    found = []
    thread = threading.Thread(target=lambda: found.append(render_prompt(TINY, bundled("chatml"), CHAT[:1])))
    thread.start()
    thread.join()
    assert found == [render_prompt(TINY, bundled("chatml"), CHAT[:1])]


def body(before, inside, after, rest=TURN):
    """A ChatML template whose marks lie somewhere in the assistant's turn."""
    turn = f"{before}{{% generation %}}{inside}{{% endgeneration %}}{after}"
    either = f"{{% if m.role == 'assistant' %}}{turn}{{% else %}}{rest}{{% endif %}}"
    return f"{{% for m in messages %}}{either}{{% endfor %}}{PROMPT}"


HEAD, SAID, END = "{{ '<|im_start|>assistant\\n' }}", "{{ m.content }}", "{{ '<|im_end|>' }}"
NEWLINE = "{{ '\\n' }}"
WRONG = {
    "header inside": body("", HEAD + SAID + END, NEWLINE),
    "header newline inside": body("{{ '<|im_start|>assistant' }}", NEWLINE + SAID + END, NEWLINE),
    "newline after inside": body(HEAD, SAID + END + NEWLINE, ""),
    "end outside": body(HEAD, SAID, END + NEWLINE),
    "first word outside": body(HEAD + "{{ m.content[:2] }}", "{{ m.content[2:] }}" + END, NEWLINE),
    "nothing marked": f"{{% for m in messages %}}{TURN}{{% endfor %}}{PROMPT}",
    "user marked too": f"{{% for m in messages %}}{{% generation %}}{TURN}{{% endgeneration %}}{{% endfor %}}{PROMPT}",
    "all in one": f"{{% generation %}}{{% for m in messages %}}{TURN}{{% endfor %}}{{% endgeneration %}}{PROMPT}",
    "user's words in it": body(
        HEAD, SAID + END + NEWLINE + "{{ '<|im_start|>user\\n' + messages[0].content + '<|im_end|>' }}", NEWLINE
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_marks_that_are_called_exact_and_are_not_change_nothing(name):
    trusted = own(WRONG[name], marks="exact")
    expected = render_conversation(TINY, own(trusted.inference), CHAT)
    assert render_conversation(TINY, trusted, CHAT) == expected
    assert expected.text[slice(*expected.spans[0])] == "Herri bat.<|im_end|>"


def test_right_marks_cost_one_rendering(monkeypatch):
    calls = []
    generate = jinja._generate
    monkeypatch.setattr(jinja, "_generate", lambda *given: calls.append(1) or generate(*given))
    render_conversation(TINY, bundled("chatml"), CHAT)
    calls.clear()
    render_conversation(TINY, bundled("chatml"), CHAT)
    assert len(calls) == 1
    render_conversation(TINY, own(bundled("chatml").inference), CHAT)
    assert len(calls) > 3


def test_a_conversation_does_not_begin_twice():
    for name in ("llama3", "chatml"):
        check_beginning(TINY, bundled(name))
    twice = replace(bundled("llama3"), source="{{ bos_token }}" + bundled("llama3").source, facts=TemplateFacts())
    with pytest.raises(ChatError, match=r"begins a conversation with '<s>' twice"):
        check_beginning(TINY, twice)
    assert render_conversation(TINY, bundled("llama3"), [{"role": "user", "content": "<s>"}, CHAT[1]]).input_ids[
        :2
    ] != [0, 0]
