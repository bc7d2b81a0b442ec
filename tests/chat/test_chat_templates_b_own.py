"""Mistral, Gemma, Phi, DeepSeek-R1, Granite, OLMo-3: equality with the families' own templates, and what is trained."""

from __future__ import annotations

import pytest
from chat_families import CHAT, END, NAMES, R1, TINY, corpus, text_of, trained, tried, trl_template
from chat_tiny import bundled

from posttrain.chat.render import MASKED, render_conversation, render_pair, render_prompt
from posttrain.chat.templates import ChatTemplate, own_template
from posttrain.chat.tokenizer import load_any_tokenizer, load_tokenizer
from posttrain.chat.turns import end_of_turn
from posttrain.errors import ChatError


def plain_turns(messages):
    return all(message["role"] in ("user", "assistant") and not message.get("tool_calls") for message in messages)


@pytest.mark.parametrize(("name", "own"), [("gemma", "gemma"), ("gemma3", "gemma3")])
def test_gemma_equals_the_familys_own_template(name, own):
    template, own = bundled(name), trl_template(own)
    same = folded = 0
    for talk in corpus():
        system = talk.messages[0]["role"] == "system"
        rest = talk.messages[1:] if system else talk.messages
        for prompt in (False, True):
            mine, theirs = (tried(each, talk.messages, None, prompt) for each in (template, own))
            if mine == theirs:
                same += mine is not None
            elif theirs is None:
                assert system
                assert name == "gemma"
                assert mine == tried(trl_template("gemma3"), talk.messages, None, prompt)
                folded += 1
            else:
                assert mine is None
                assert not plain_turns(rest)
    assert same > 60
    assert (folded > 5) == (name == "gemma")


@pytest.mark.parametrize("own", ["phi3", "phi3_5"])
def test_phi3_equals_the_familys_own_template(own):
    template, own = bundled("phi3"), trl_template(own)
    same = 0
    for talk in corpus():
        messages = [dict(message, content=message["content"] or " ") for message in talk.messages]
        for prompt in (False, True):
            mine, theirs = (tried(each, messages, None, prompt) for each in (template, own))
            assert mine == theirs or (mine is None and any(message["role"] == "tool" for message in messages))
            same += mine == theirs
    assert same > 200
    empty = [{"role": "system", "content": ""}, *CHAT[1:]]
    assert (text_of(template, empty) == text_of(own, empty)) == (own.name == "phi3")


def test_deepseek_r1_equals_the_familys_own_template_up_to_the_last_answer():
    template, own = bundled("deepseek-r1"), trl_template("deepseek_r1_distill")
    same = answered = 0
    for talk in corpus():
        roles = [message["role"] for message in talk.messages]
        if "tool" in roles or "system" in roles[1:] or any(message.get("tool_calls") for message in talk.messages):
            assert tried(template, talk.messages) is None
            continue
        users = [index for index, role in enumerate(roles) if role == "user"]
        upto = users[-1] + 1 if users else 0
        if upto:  # all that a model is served
            prompt = text_of(template, talk.messages[:upto], prompt=True)
            assert prompt == text_of(own, talk.messages[:upto], prompt=True)
            same += 1
        if upto == len(roles) - 1 and upto:
            answered += 1
            answer = talk.messages[-1]
            reasoning, _, said = answer["content"].rpartition("</think>\n\n")
            reasoning = (answer.get("reasoning_content") or reasoning.removeprefix("<think>\n")).strip("\n")
            body = said.lstrip("\n") if "</think>" in answer["content"] else said
            assert text_of(template, talk.messages) == prompt + f"{reasoning}\n</think>\n\n{body}{R1[2]}"
    assert same > 60
    assert answered > 30


def mistral03(shared_dir):
    tokenizer = load_tokenizer(shared_dir / "tokenizers" / "mistral03")
    own = own_template(tokenizer.chat_template, "mistral03")
    assert own is not None
    assert own.facts.family == "unknown"
    return tokenizer, own


def test_mistral_v3_equals_the_familys_own_template(shared_dir):
    tokenizer, own = mistral03(shared_dir)
    template = bundled("mistral-v3")
    same = moved = refused = 0
    for talk in corpus():
        system = talk.messages[0]["role"] == "system"
        users = sum(message["role"] == "user" for message in talk.messages)
        try:
            theirs = text_of(own, talk.messages, talk.tools, tokenizer=tokenizer)
        except ChatError:
            theirs = None
        try:
            mine = text_of(template, talk.messages, talk.tools, tokenizer=tokenizer)
        except ChatError:
            mine = None
        if mine == theirs:
            same += mine is not None
        elif mine is None:  # they lose what is said beside a call
            assert any(message.get("tool_calls") and message["content"] for message in talk.messages)
            refused += 1
        else:
            assert theirs is not None
            assert system or (talk.tools and users > 1)
            moved += 1
    assert same > 40
    assert moved > 5
    assert refused > 0


def test_mistral_v3_keeps_the_system_text_where_the_family_moves_and_loses_it(shared_dir):
    tokenizer, own = mistral03(shared_dir)
    template = bundled("mistral-v3")
    for turns, family in ((2, "<s>[INST] S\n\n U1 [/INST]"), (4, "<s>[INST]  U1 [/INST] A1</s>[INST] S\n\nU2[/INST]")):
        assert text_of(own, CHAT[:turns], tokenizer=tokenizer) == family
        assert text_of(template, CHAT[:turns], tokenizer=tokenizer).startswith("<s>[INST] S\n\n U1 [/INST]")
    assert "S\n\n" not in text_of(own, CHAT, tokenizer=tokenizer)
    assert text_of(template, CHAT, tokenizer=tokenizer).count("S\n\n") == 1
    quoted = [{"type": "function", "function": {"name": "f", "description": 'say "x"', "return": {"type": "null"}}}]
    assert '"description": "say \\"x\\""}}]' in text_of(template, CHAT[1:2], quoted)
    assert '"description": "say "x""}}]' in text_of(own, CHAT[1:2], quoted)


# masks and ids


@pytest.mark.parametrize("name", NAMES)
def test_loss_lies_on_answers_and_their_end_of_turn(name):
    template = bundled(name)
    assert end_of_turn(TINY, template).text == END[name]
    chat = CHAT[:3] if name == "deepseek-r1" else CHAT
    row = render_conversation(TINY, template, chat)
    said = [message["content"] for message in chat if message["role"] == "assistant"]
    said = [text.strip() if template.facts.trims else text for text in said]
    before = {"deepseek-r1": "\n</think>\n\n", "mistral-v1": " ", "mistral-v3": " "}.get(name, "")
    assert trained(TINY, row) == [before + text + END[name] for text in said]
    expected = TINY.apply_chat_template(chat, chat_template=template.inference, return_dict=False)
    if not row.straddled:
        assert row.input_ids == expected
    assert row.input_ids[: len(render_prompt(TINY, template, chat[:2]))] == render_prompt(TINY, template, chat[:2])
    prompt, chosen, rejected = render_pair(TINY, template, chat[:2], [chat[2]], [{"role": "assistant", "content": "B"}])
    assert prompt + chosen == row.input_ids[: len(prompt + chosen)]
    assert [answer[-1] for answer in (chosen, rejected)] == [end_of_turn(TINY, template).id] * 2
    unknown = ChatTemplate("own", template.inference)
    assert trained(TINY, render_conversation(TINY, unknown, chat)) == trained(TINY, row)


def test_phi3_does_not_train_what_follows_the_last_answer():
    row = render_conversation(TINY, bundled("phi3"), CHAT)
    assert row.text.endswith("<|end|>\n</s>")
    assert (TINY.decode(row.input_ids[-1:]), row.labels[-1]) == ("</s>", MASKED)


def test_deepseek_r1_trains_reasoning_and_refuses_history():
    thought = {"role": "assistant", "content": "A1", "reasoning_content": "Hmm.\n"}
    inside = {"role": "assistant", "content": "<think>\nHmm.\n</think>\n\nA1"}
    for answer in (thought, inside):
        row = render_conversation(TINY, bundled("deepseek-r1"), [CHAT[1], answer])
        assert trained(TINY, row) == [f"Hmm.\n</think>\n\nA1{R1[2]}"]
        assert row.text.startswith("<s><｜User｜> U1 <｜Assistant｜><think>\nHmm.")
    with pytest.raises(ChatError, match="rewrites history"):
        render_conversation(TINY, bundled("deepseek-r1"), CHAT[1:])


@pytest.mark.parametrize(("folder", "name"), [("mistral03", "mistral-v3"), ("phi-3-mini", "phi3")])
def test_real_tokenizers(shared_dir, folder, name):
    tokenizer, template = load_any_tokenizer(shared_dir / "tokenizers" / folder), bundled(name)
    chat = [message for message in CHAT if message["role"] != "system"]
    row = render_conversation(tokenizer, template, chat)
    assert row.input_ids == tokenizer.apply_chat_template(chat, chat_template=template.inference, return_dict=False)
    assert row.straddled == 0
    assert [text.split("<")[0].strip() for text in trained(tokenizer, row)] == ["A1", "A2"]
    assert all(text.endswith(END[name]) for text in trained(tokenizer, row))
    assert end_of_turn(tokenizer, template).text == END[name]
    own = own_template(tokenizer.chat_template, folder)
    assert row.text == text_of(own, chat, tokenizer=tokenizer)
    if name == "phi3":  # the family's own text is known, by its digest
        assert (own.facts.family, own.facts.marks) == ("Phi-3", "unproved")
