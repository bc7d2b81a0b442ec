"""Templates that rewrite history, answers that go on, and system messages that a template refuses."""

from __future__ import annotations

import pytest
from chat_tiny import LLAMA3, SPECIAL, bundled, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.chat import render
from posttrain.chat.render import (
    MASKED,
    render_conversation,
    render_conversations,
    render_pair,
    render_prompt,
    render_turns,
)
from posttrain.chat.system import fold_system
from posttrain.chat.templates import ChatTemplate
from posttrain.errors import ChatError

GEMMA = ["<start_of_turn>", "<end_of_turn>"]
TINY = make_tokenizer(
    [*SPECIAL, *LLAMA3, *GEMMA], ("<think>", "</think>"), bos_token="<s>", eos_token="</s>", pad_token="<|pad|>"
)
THOUGHT = [
    {"role": "user", "content": "Zer da Euskadi?"},
    {"role": "assistant", "content": "Herri bat.", "reasoning_content": "Geografia da."},
    {"role": "user", "content": "Que é Galicia?"},
    {"role": "assistant", "content": "Unha comunidade", "reasoning_content": "Pregunta por outra."},
    {"role": "user", "content": "Grazas"},
    {"role": "assistant", "content": "De nada."},
]
CLOSED_ONCE = ChatTemplate(  # as Phi-4-mini: the end of turn is there, and the very last is another token
    "closed-once",
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{{ eos_token if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
)


def trained(rendered):
    """What the loss lies on, as text."""
    return TINY.decode([label for label in rendered.labels if label != MASKED])


def test_a_conversation_that_can_stay_whole_is_one_row():
    plain = [{key: message[key] for key in ("role", "content")} for message in THOUGHT]
    for name in ("chatml", "llama3", "plain"):
        assert render_turns(TINY, bundled(name), plain) == [render_conversation(TINY, bundled(name), plain)]
    (single,) = render_turns(TINY, bundled("qwen3"), THOUGHT[:2])
    assert single == render_conversation(TINY, bundled("qwen3"), THOUGHT[:2])


def test_rewritten_history_is_refused_with_the_option_named():
    with pytest.raises(ChatError, match=r"rewrites history(.|\n)*data\.history: split"):
        render_conversation(TINY, bundled("qwen3"), THOUGHT)
    forgets = ChatTemplate("forgets", bundled("chatml").inference)  # writes no reasoning at all
    with pytest.raises(ChatError, match=r"reasoning is left out(.|\n)*data\.history: split"):
        render_turns(TINY, forgets, THOUGHT)


def test_one_row_per_answer_trains_that_answer_alone_as_the_template_writes_it_then():
    rows = render_turns(TINY, bundled("qwen3"), THOUGHT)
    assert [trained(row) for row in rows] == [
        "<think>\nGeografia da.\n</think>\n\nHerri bat.<|im_end|>",
        "<think>\nPregunta por outra.\n</think>\n\nUnha comunidade<|im_end|>",
        "<think>\n\n</think>\n\nDe nada.<|im_end|>",
    ]
    for number, row in enumerate(rows):
        stop = 2 * number + 2
        text = TINY.apply_chat_template(THOUGHT[:stop], chat_template=bundled("qwen3").inference, tokenize=False)
        assert row.text == text
        assert len(row.spans) == 1
        assert row.text[slice(*row.spans[0])] == trained(row)
        prompt = render_prompt(TINY, bundled("qwen3"), THOUGHT[: stop - 1])
        assert row.input_ids[: len(prompt)] == prompt
        assert row.labels[: len(prompt)] == [MASKED] * len(prompt)
        assert row.labels[len(prompt)] != MASKED
    assert "Geografia" not in rows[1].text  # what the model will read of its own past


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["Herri bat.", "a\n\nb", " x ", "<think>\nhm\n</think>\n\nbai", "ez <|im_end|>"]),
        min_size=1,
        max_size=5,
    )
)
def test_rows_of_one_conversation_train_every_answer_once(contents):
    chat = [m for text in contents for m in ({"role": "user", "content": "?"}, {"role": "assistant", "content": text})]
    rows = render_turns(TINY, bundled("qwen3"), chat)
    assert len(rows) in (1, len(contents))
    said = "".join(map(trained, rows))
    assert said.count("<|im_end|>") == len(contents) + sum("<|im_end|>" in text for text in contents)
    for text in contents:
        assert text.split("</think>")[-1].strip() in said


SOME = [
    THOUGHT,
    THOUGHT[:2],
    [{"role": "user", "content": "A:"}, {"role": "assistant", "content": "\nMadrid <|im_end|>"}],  # cut, and broken up
    [{"role": "narrator", "content": "no such role"}],
    [THOUGHT[0], {**THOUGHT[1], "tool_calls": [{"function": {"name": "unwritten"}}]}],
    [],
]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", ["chatml", "qwen3", "tulu", "plain"])
def test_many_at_once_are_what_each_is_alone(name, split, monkeypatch):
    monkeypatch.setattr(render, "_CHUNK", 4)
    alone = []
    for messages in SOME * 3:
        try:
            made = render_turns if split else lambda *given: [render_conversation(*given)]
            alone.append(made(TINY, bundled(name), messages))
        except ChatError as error:
            alone.append(str(error))
    together = render_conversations(TINY, bundled(name), ((messages, None) for messages in SOME * 3), split)
    assert [str(made) if isinstance(made, ChatError) else made for made in together] == alone


def test_a_turn_that_cannot_stand_alone_either_is_refused():
    with pytest.raises(ChatError, match="only when something follows"):
        render_turns(TINY, CLOSED_ONCE, THOUGHT)
    bad = [
        *THOUGHT[4:],
        *THOUGHT[:1],
        {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "find"}}]},
    ]
    with pytest.raises(ChatError, match="tool calls"):
        render_turns(TINY, bundled("chatml"), bad)


def test_reasoning_of_the_past_does_not_stop_a_pair_or_a_prompt():
    template = bundled("qwen3")
    prompt, chosen, _ = render_pair(TINY, template, THOUGHT[:3], THOUGHT[3:4], [{**THOUGHT[3], "content": "Non sei"}])
    assert prompt == render_prompt(TINY, template, THOUGHT[:3])
    assert "Pregunta" in TINY.decode(chosen)
    assert "Geografia" not in TINY.decode(prompt)


@pytest.mark.parametrize("name", ["chatml", "zephyr", "llama3", "tulu", "plain", "qwen2.5", "qwen3", "gemma"])
def test_an_answer_that_goes_on_is_left_open(name):
    template = bundled(name)
    chat = [*THOUGHT[:1], {"role": "assistant", "content": "Herri bat. 😀"}, *THOUGHT[2:3]]
    chat += [{"role": "assistant", "content": "Unha comun"}]
    for messages in (chat[:2], chat):
        opened = render_prompt(TINY, template, messages, continue_final_message=True)
        assert opened == TINY.apply_chat_template(
            messages, chat_template=template.inference, return_dict=False, continue_final_message=True
        )
        row = render_turns(TINY, template, messages)[-1].input_ids
        assert row[: len(opened)] == opened
        assert TINY.decode(opened).endswith(messages[-1]["content"])
    with pytest.raises(ChatError, match="no assistant message to continue"):
        render_prompt(TINY, template, chat[:3], continue_final_message=True)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(["chatml", "tulu", "plain"]), st.text("ab \n<|im_end|>é", min_size=1, max_size=12).filter(str.strip)
)
def test_an_open_answer_begins_the_row_that_ends_with_it(name, said):
    chat = [{"role": "user", "content": "Que?"}, {"role": "assistant", "content": said}]
    opened = render_prompt(TINY, bundled(name), chat, continue_final_message=True)
    assert render_conversation(TINY, bundled(name), chat).input_ids[: len(opened)] == opened
    assert TINY.decode(opened).endswith(said)


SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_refused_system_message_is_told_with_what_to_do():
    refuses = ChatTemplate(
        "refuses", "{{ raise_exception('no system') if messages[0].role == 'system' }}" + bundled("chatml").source
    )
    with pytest.raises(ChatError) as error:
        render_conversation(TINY, refuses, [SYSTEM, *THOUGHT[4:]])
    assert "takes no system message" in error.value.found
    assert "data.system: fold" in error.value.todo
    assert "posttrain doctor" in error.value.todo
    drops = ChatTemplate(
        "drops",
        "{% for m in messages if m.role != 'system' %}"
        "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    )
    with pytest.raises(ChatError, match=r"left out or changed(.|\n)*data\.system: fold"):
        render_conversation(TINY, drops, [SYSTEM, *THOUGHT[4:]])
    rendered = render_conversation(TINY, refuses, fold_system([SYSTEM, *THOUGHT[4:]]))
    assert "<|im_start|>user\nBe brief.\n\nGrazas<|im_end|>" in rendered.text


def test_folding_goes_before_the_next_user_and_loses_nothing():
    chat = [
        SYSTEM,
        *THOUGHT[:2],
        {"role": "developer", "content": "New rule"},
        {**SYSTEM, "content": " "},
        *THOUGHT[4:],
    ]
    folded = fold_system(chat)
    assert [message["role"] for message in folded] == ["user", "assistant", "user", "assistant"]
    assert folded[0]["content"] == "Be brief.\n\nZer da Euskadi?"
    assert folded[1] is THOUGHT[1]
    assert folded[2]["content"] == "New rule\n\nGrazas"
    assert fold_system(folded) == folded
    assert chat[1] == THOUGHT[0]
    with pytest.raises(ChatError, match="no user message follows"):
        fold_system([*THOUGHT[:2], SYSTEM])
