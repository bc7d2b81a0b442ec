"""Templates: what each renders, byte for byte, and what is saved of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from chat_tiny import bundled

from posttrain.chat.jinja import render_marked, render_text
from posttrain.chat.templates import (
    ChatTemplate,
    load_template,
    own_template,
    read_folder_template,
    recognise,
    strip_marks,
    template_digest,
)
from posttrain.errors import ChatError, UserError

NAMES = ["chatml", "zephyr", "llama3", "tulu", "plain"]
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": " A1 "},
    {"role": "user", "content": "U2"},
    {"role": "assistant", "content": "A2"},
]
GOLDEN = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU1<|im_end|>\n<|im_start|>assistant\n A1 <|im_end|>\n"
    "<|im_start|>user\nU2<|im_end|>\n<|im_start|>assistant\nA2<|im_end|>\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU1</s>\n<|assistant|>\n A1 </s>\n<|user|>\nU2</s>\n<|assistant|>\nA2</s>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU1<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA2<|eot_id|>",
    "tulu": "<|system|>\nS\n<|user|>\nU1\n<|assistant|>\n A1 </s>\n<|user|>\nU2\n<|assistant|>\nA2</s>",
    "plain": "<s>SU1 A1 </s>U2A2</s>",
}
PROMPT_END = {
    "chatml": "<|im_start|>assistant\n",
    "zephyr": "<|assistant|>\n",
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "tulu": "<|assistant|>\n",
    "plain": "",
}


@pytest.mark.parametrize("name", NAMES)
def test_bundled_template_renders_its_layout(rich_tokenizer, name):
    template = bundled(name)
    assert render_text(rich_tokenizer, template, CHAT) == GOLDEN[name]
    prompt = render_text(rich_tokenizer, template, CHAT[:2], add_generation_prompt=True)
    assert prompt == render_text(rich_tokenizer, template, CHAT[:2]) + PROMPT_END[name]
    assert GOLDEN[name].startswith(prompt)


@pytest.mark.parametrize("name", NAMES)
def test_marks_hold_answer_and_end_of_turn(rich_tokenizer, name):
    text, spans = render_marked(rich_tokenizer, bundled(name), CHAT)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    first = "A1" if name == "llama3" else " A1 "
    assert [text[start:stop] for start, stop in spans] == [first + end, "A2" + end]


@pytest.mark.parametrize("name", NAMES)
def test_saved_form_has_no_marks_and_renders_the_same(rich_tokenizer, name):
    template = bundled(name)
    assert "generation " not in template.inference.replace("generation_prompt", "")
    saved = ChatTemplate("saved", template.inference)
    for turns in range(1, 6):
        for prompt in (False, True):
            assert render_text(rich_tokenizer, saved, CHAT[:turns], None, prompt) == render_text(
                rich_tokenizer, template, CHAT[:turns], None, prompt
            )
    assert recognise(template.inference, "x") == template
    assert template.digest == template_digest(template.inference)


@pytest.mark.parametrize(
    "source",
    [
        "a {% generation %}\n  {{ messages[0].content }}\n  {% endgeneration %}\n  {% if true %}b{% endif %}\n c",
        "a {%- generation -%}\n  {{ messages[0].content }}\n  {%- endgeneration %}\n  {% if true %}b{% endif %}\n c",
        "x\n  {% generation %}{% if true %}\n y {% endif %}{% endgeneration %}\n  z",
        "x{% generation %}\n  {% if true %}y{% endif %}{% endgeneration %}z",
        "{% generation %}{{ 1 }}{% endgeneration %}",
        "q {%+ generation +%}\n {{ 1 }} {%- endgeneration -%} \n r",
    ],
)
def test_stripping_marks_keeps_every_byte_of_white_space(tokenizer, source):
    stripped = strip_marks(source)
    assert "generation" not in stripped
    assert render_text(tokenizer, ChatTemplate("m", source), CHAT) == render_text(
        tokenizer, ChatTemplate("s", stripped), CHAT
    )


def test_llama3_equals_the_familys_own_template(rich_tokenizer):
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl is not installed")
    path = Path(found.origin).parent / "chat_templates" / "llama3.jinja"
    own = load_template(str(path), Path())
    for turns in range(1, 6):
        for prompt in (False, True):
            expected = render_text(rich_tokenizer, own, CHAT[:turns], None, prompt)
            assert render_text(rich_tokenizer, bundled("llama3"), CHAT[:turns], None, prompt) == expected


def test_user_file_is_found_from_the_recipe_and_errors_name_it(tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    template = load_template("own.jinja", tmp_path)
    assert (template.name, template.facts.marks) == ("own.jinja", "unproved")
    with pytest.raises(ChatError, match=r"missing\.jinja"):
        load_template("missing.jinja", tmp_path)
    (tmp_path / "empty.jinja").write_text(" \n")
    with pytest.raises(ChatError, match="holds no text"):
        load_template("empty.jinja", tmp_path)
    with pytest.raises(UserError, match="chatml"):
        load_template("chatlm", tmp_path)


def test_jinja_file_beats_tokenizer_config(tmp_path):
    assert read_folder_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    assert read_folder_template(tmp_path).source == "old"
    (tmp_path / "chat_template.jinja").write_text(bundled("chatml").inference)
    assert read_folder_template(tmp_path) == bundled("chatml")


def test_several_templates_need_a_default():
    assert own_template([{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}], "x").source == "d"
    with pytest.raises(ChatError, match="rag"):
        own_template({"rag": "r"}, "x")
