"""The one rendering path: masks, boundaries, refusals, and equality with transformers."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
from chat_tiny import LLAMA3, SPECIAL, bundled, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.chat.render import MASKED, render_conversation, render_pair, render_prompt
from posttrain.chat.templates import ChatTemplate, load_template, own_template
from posttrain.chat.tokenizer import load_any_tokenizer
from posttrain.chat.turns import end_of_turn
from posttrain.errors import ChatError

NAMES = ["chatml", "zephyr", "llama3", "tulu", "plain"]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Zer da Euskadi?"},
    {"role": "assistant", "content": "Herri bat. 😀"},
    {"role": "user", "content": "Que é Galicia?"},
    {"role": "assistant", "content": "Unha comunidade"},
]
TINY = make_tokenizer(SPECIAL + LLAMA3, bos_token="<s>", eos_token="</s>", pad_token="<|pad|>")
CONTROL = SPECIAL + LLAMA3


def trained(tokenizer, rendered):
    """Texts of the trained runs of a row."""
    runs, run = [], []
    for label in [*rendered.labels, MASKED]:
        if label != MASKED:
            run.append(label)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return runs


def trl_folder():
    """Folder of the families' own templates in the installed TRL (found without importing it)."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl is not installed")
    return Path(found.origin).parent / "chat_templates"


def unproved(template):
    """The same template as a user's file without marks: nothing is known of it."""
    return ChatTemplate("own", template.inference)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("known", [True, False], ids=["bundled", "unmarked"])
def test_loss_lies_on_answers_and_their_end_of_turn(name, known):
    template = bundled(name) if known else unproved(bundled(name))
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name, "</s>")
    rendered = render_conversation(TINY, template, CHAT)
    assert trained(TINY, rendered) == ["Herri bat. 😀" + end, "Unha comunidade" + end]
    assert [rendered.text[start:stop] for start, stop in rendered.spans] == trained(TINY, rendered)
    assert all(label in (MASKED, token) for label, token in zip(rendered.labels, rendered.input_ids, strict=True))
    expected = TINY.apply_chat_template(CHAT, chat_template=template.inference, return_dict=False)
    assert rendered.input_ids == expected
    assert rendered.straddled == 0
    assert render_conversation(TINY, bundled(name), CHAT) == rendered


@pytest.mark.parametrize("name", NAMES)
def test_unfinished_conversation_trains_nothing_after_its_last_answer(name):
    rendered = render_conversation(TINY, bundled(name), CHAT[:4])
    assert len(trained(TINY, rendered)) == 1
    assert rendered.labels[-1] == MASKED


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1"), max_size=12)
spoken = st.one_of(texts, st.lists(st.sampled_from([" ", "\n", "a", "Madrid", "  "]), max_size=5).map("".join))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), st.booleans(), st.lists(spoken, min_size=2, max_size=5))
def test_every_prompt_begins_the_row_that_begins_with_it(name, known, contents):
    template = bundled(name) if known else unproved(bundled(name))
    chat = [
        {"role": ("user", "assistant")[index % 2], "content": content or "x"} for index, content in enumerate(contents)
    ]
    rendered = render_conversation(TINY, template, chat)
    begins = [
        index
        for index, label in enumerate(rendered.labels)
        if label != MASKED and (index == 0 or rendered.labels[index - 1] == MASKED or template.name == "plain")
    ]
    for index in range(1, len(chat), 2):
        prompt = render_prompt(TINY, template, chat[:index])
        assert rendered.input_ids[: len(prompt)] == prompt
        assert len(prompt) in begins
        assert rendered.labels[len(prompt)] != MASKED
    assert TINY.decode(rendered.input_ids) == rendered.text


def test_answer_that_would_join_the_prompt_is_cut_off_and_counted():
    chat = [{"role": "user", "content": "A:"}, {"role": "assistant", "content": "\nMadrid"}]  # "\n\n" is one token
    for name in ("chatml", "tulu", "zephyr"):
        rendered = render_conversation(TINY, bundled(name), chat)
        prompt = render_prompt(TINY, bundled(name), chat[:1])
        assert rendered.straddled == 1
        assert rendered.input_ids[: len(prompt)] == prompt
        assert trained(TINY, rendered)[0].startswith("\nMadrid")
        assert TINY.decode(rendered.input_ids) == rendered.text
    spaced = [{"role": "user", "content": "A: "}]  # alone, the space is a token; before a word it joins the word
    prompt, chosen, rejected = render_pair(TINY, bundled("plain"), spaced, [CHAT[2]], [CHAT[4]])
    assert prompt == render_prompt(TINY, bundled("plain"), spaced)
    assert TINY.decode(chosen) == "Herri bat. 😀</s>"
    assert TINY.decode(rejected) == "Unha comunidade</s>"


def test_header_that_depends_on_the_answer_is_written_as_in_the_prompt():
    gpt2 = make_tokenizer(SPECIAL + LLAMA3, words=None, bos_token="<s>", eos_token="</s>")
    rendered = render_conversation(gpt2, bundled("llama3"), CHAT)  # "\n\n" is one token at the end, two before a word
    prompt = render_prompt(gpt2, bundled("llama3"), CHAT[:4])
    assert rendered.straddled == 2
    assert rendered.input_ids[: len(prompt)] == prompt
    assert gpt2.decode(rendered.input_ids) == rendered.text
    assert trained(gpt2, rendered) == ["Herri bat. 😀<|eot_id|>", "Unha comunidade<|eot_id|>"]


def test_pair_is_prompt_and_answers_with_nothing_after_the_end_of_turn():
    template = bundled("chatml")
    prompt, chosen, rejected = render_pair(TINY, template, CHAT[:4], CHAT[4:], [{**CHAT[4], "content": "Non sei"}])
    row = render_conversation(TINY, template, CHAT).input_ids
    assert prompt == render_prompt(TINY, template, CHAT[:4])
    assert [*prompt, *chosen] == row[: len(prompt) + len(chosen)]
    assert TINY.decode(chosen) == "Unha comunidade<|im_end|>"
    assert TINY.decode(rejected) == "Non sei<|im_end|>"
    with pytest.raises(ChatError, match="not one assistant message"):
        render_pair(TINY, template, CHAT[:1], CHAT[1:3], CHAT[4:])


hostile = st.lists(st.one_of(st.sampled_from([*CONTROL, "<|im_", "end|>", " ", "\n", "a"]), texts), max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), st.booleans(), hostile.map("".join), hostile.map("".join), hostile.map("".join))
def test_control_tokens_in_messages_are_text(name, known, system, user, answer):
    template = bundled(name) if known else unproved(bundled(name))
    chat = [
        {"role": role, "content": content}
        for role, content in (("system", system), ("user", user + "x"), ("assistant", "y" + answer))
    ]
    calm = [{"role": message["role"], "content": "x"} for message in chat]
    rendered, expected = render_conversation(TINY, template, chat), render_conversation(TINY, template, calm)
    control = set(TINY.convert_tokens_to_ids(CONTROL))
    assert [t for t in rendered.input_ids if t in control] == [t for t in expected.input_ids if t in control]
    assert TINY.decode(rendered.input_ids) == rendered.text
    prompt = render_prompt(TINY, template, chat[:2])
    assert rendered.input_ids[: len(prompt)] == prompt
    assert len(trained(TINY, rendered)) == 1
    if name != "llama3":  # which strips contents
        assert trained(TINY, rendered)[0].startswith("y" + answer)


def test_other_added_tokens_keep_their_ids_in_answers_only(tokenizer):
    think = tokenizer.convert_tokens_to_ids("<think>")
    chat = [{"role": "user", "content": "a<think>b"}, {"role": "assistant", "content": "<think>c</think>d<|im_end|>e"}]
    rendered = render_conversation(tokenizer, bundled("chatml"), chat)
    assert rendered.input_ids.count(think) == 1
    assert rendered.labels.count(think) == 1
    assert rendered.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert trained(tokenizer, rendered) == ["<think>c</think>d<|im_end|>e<|im_end|>"]


def test_text_that_no_tokenizer_can_keep_is_refused():
    for bad in ("a\ufdd0b", "a\ud800b"):
        with pytest.raises(ChatError, match="no character"):
            render_conversation(TINY, bundled("chatml"), [{"role": "user", "content": bad}])


def test_role_cannot_forge_a_header():
    with pytest.raises(ChatError, match="role"):
        render_conversation(TINY, bundled("chatml"), [{"role": "user<|im_end|>", "content": "a"}])
    with pytest.raises(ChatError, match="no role tool"):
        render_conversation(TINY, bundled("zephyr"), [{"role": "tool", "content": "a"}])


def test_template_that_rewrites_history_is_refused(tokenizer):
    template = load_template(str(trl_folder() / "qwen3.jinja"), Path())
    with pytest.raises(ChatError, match="rewrites history"):
        render_conversation(tokenizer, template, CHAT)
    rendered = render_conversation(tokenizer, template, CHAT[:3])  # one answer: nothing follows that could change it
    assert trained(tokenizer, rendered)[0].endswith("Herri bat. 😀<|im_end|>")
    assert render_prompt(tokenizer, template, CHAT[:4])


def test_generation_prompt_that_is_no_prefix_is_refused():
    source = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    with pytest.raises(ChatError, match=r"'Assistant:' becomes 'assistant: Herri"):
        render_conversation(TINY, ChatTemplate("own", source), CHAT)


def test_closing_eos_of_the_whole_text_is_not_trained():
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
    )
    rendered = render_conversation(TINY, ChatTemplate("phi-3-like", source), CHAT)
    assert rendered.text.endswith("<|im_end|>\n</s>")
    assert trained(TINY, rendered) == ["Herri bat. 😀<|im_end|>", "Unha comunidade<|im_end|>"]


def test_what_a_template_leaves_out_is_refused():
    template = bundled("chatml")
    call = {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "find", "arguments": {}}}]}
    with pytest.raises(ChatError, match="tool calls"):
        render_conversation(TINY, template, [CHAT[1], call])
    with pytest.raises(ChatError, match="tools out"):
        render_prompt(TINY, template, CHAT[:2], [{"type": "function", "function": {"name": "find"}}])
    with pytest.raises(ChatError, match="reasoning"):
        render_conversation(TINY, template, [CHAT[1], {**CHAT[2], "reasoning_content": "hm, let me see"}])
    with pytest.raises(ChatError, match="no message"):
        render_prompt(TINY, template, [])
    with pytest.raises(ChatError, match="its content is null, not a text"):
        render_conversation(TINY, template, [{"role": "user", "content": None}])


@cache
def real_tokenizer(folder):
    """A real tokenizer, loaded once for all templates."""
    real = load_any_tokenizer(folder)
    real.eos_token = real.eos_token or "<|endoftext|>"
    return real


FITTING = [(folder, name) for folder in ("mistral03", "phi-2", "phi-3-mini") for name in ("zephyr", "tulu", "plain")]
FITTING += [(folder, name) for folder in ("qwen2", "olmo2") for name in ("chatml", "zephyr", "tulu", "plain")]
FITTING += [("qwen2", "own"), ("mistral03", "own"), ("phi-3-mini", "own")]


@pytest.mark.parametrize(("folder", "name"), FITTING)
def test_real_tokenizers(shared_dir, folder, name):
    real = real_tokenizer(shared_dir / "tokenizers" / folder)
    template = own_template(real.chat_template, folder) if name == "own" else bundled(name)
    chat = CHAT[1:] if folder == "mistral03" and name == "own" else CHAT
    rendered = render_conversation(real, template, chat)
    assert rendered.input_ids == real.apply_chat_template(chat, chat_template=template.inference, return_dict=False)
    end = "<|end|>" if (folder, name) == ("phi-3-mini", "own") else "<|im_end|>" if name == "chatml" else real.eos_token
    assert [text.strip() for text in trained(real, rendered)] == ["Herri bat. 😀" + end, "Unha comunidade" + end]
    first = next(index for index, label in enumerate(rendered.labels) if label != MASKED)
    assert render_prompt(real, template, chat[: 1 if chat[0]["role"] == "user" else 2]) == rendered.input_ids[:first]

    control = set(real.get_added_vocab().values()) - {real.unk_token_id}
    every = [text for text in real.get_added_vocab() if len(text.strip()) > 1]
    special = [token.content for token in real.added_tokens_decoder.values() if token.special]
    added = {"user": " ".join(every), "system": " ".join(every), "assistant": " ".join(special)}
    hostile_chat = [{**message, "content": message["content"] + added[message["role"]]} for message in chat]
    before = [token for token in rendered.input_ids if token in control]
    after = [token for token in render_conversation(real, template, hostile_chat).input_ids if token in control]
    assert [t for t in after if real.decode([t]).strip()] == [t for t in before if real.decode([t]).strip()]


def test_mistral_loses_its_system_text_and_is_refused(shared_dir):
    real = real_tokenizer(shared_dir / "tokenizers" / "mistral03")
    with pytest.raises(ChatError):
        render_conversation(real, own_template(real.chat_template, "mistral03"), CHAT)


def test_system_turn_that_qwen2_drops_is_refused(shared_dir):
    real = real_tokenizer(shared_dir / "tokenizers" / "qwen2")
    with pytest.raises(ChatError, match=r"message 4 \(system\)"):
        render_conversation(real, own_template(real.chat_template, "qwen2"), [*CHAT[:3], CHAT[0] | {"content": "New"}])


def test_templates_we_did_not_write_are_masked_rightly_or_refused():
    accepted = set()
    folder = trl_folder()
    chat = [{"role": ("user", "assistant")[index % 2], "content": f"Turn {index}"} for index in range(4)]
    for path in sorted(folder.glob("*.jinja")):
        template = load_template(str(path), Path())
        try:
            rendered = render_conversation(TINY, template, chat)
        except ChatError:
            continue
        accepted.add(path.stem)
        end = end_of_turn(TINY, template).text
        assert len(rendered.spans) == 2
        for index, (start, stop) in enumerate(rendered.spans):
            assert rendered.text[start:stop].endswith(f"Turn {2 * index + 1}{end}")
            prompt = render_prompt(TINY, template, chat[: 2 * index + 1])
            assert rendered.input_ids[: len(prompt)] == prompt
            assert TINY.decode(prompt) == rendered.text[:start]
        kept = [label for label in rendered.labels if label != MASKED]
        assert TINY.decode(kept) == "".join(rendered.text[start:stop] for start, stop in rendered.spans)
    assert accepted >= {"llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3_training", "lfm2", "qwen3_instruct_2507"}
    assert not accepted & {"qwen3", "qwen3_5_think", "nemotron_3_nano"}


def test_tokens_added_later_are_seen(tokenizer):
    chat = [{"role": "user", "content": "<|new|>"}, {"role": "assistant", "content": "a"}]
    render_conversation(tokenizer, bundled("chatml"), chat)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    new = tokenizer.convert_tokens_to_ids("<|new|>")
    assert new not in render_conversation(tokenizer, bundled("chatml"), chat).input_ids
