"""Control tokens that people, systems and tools write are text: no control id, and not a character lost."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chat_tiny import bundled, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from spm_tiny import make_spm_tokenizer

from posttrain.chat.encode import encoder_of
from posttrain.chat.render import render_conversation, render_pair, render_prompt
from posttrain.chat.templates import ChatTemplate
from posttrain.chat.tokenizer import load_any_tokenizer
from posttrain.chat.turns import required_tokens_missing
from posttrain.errors import ChatError
from posttrain.recipe.bundled import list_bundled

NAMES = list_bundled("chat_templates")
REAL = ("qwen2", "mistral03", "phi-3-mini")
LITERAL = re.compile(r"<[|｜][^<>'\"{}+]+?[|｜]>|</?[a-z_]{1,30}>|\[/?[A-Z_]{4,}\]")
"""What looks like a control token inside a template."""
PLACES = ("system", "user", "result", "tool")


def control_texts() -> list[str]:
    """Every control token of every bundled template: what its facts name, and what its text spells."""
    found: dict[str, None] = {}
    for template in map(bundled, NAMES):
        named = [*template.facts.required_tokens, *template.facts.stop, *LITERAL.findall(template.source)]
        found |= dict.fromkeys(text for text in named if text not in ("eos_token", "bos_token"))
    return sorted(found)


CONTROL = control_texts()
SPECIAL = [text for number, text in enumerate(CONTROL) if number % 3]  # the others become added, not special, tokens
PLAIN = tuple(text for text in CONTROL if text not in SPECIAL)


@cache
def tokenizer_of(name: str, tokenizers: Path | None = None) -> Any:
    """A tokenizer for which every control token of every template is one token."""
    if name == "bytes":
        return make_tokenizer(["<s>", "</s>", *SPECIAL], PLAIN, bos_token="<s>", eos_token="</s>")
    if name == "spm":
        made = make_spm_tokenizer(["<s>", "</s>", *SPECIAL], bos_token="<s>", eos_token="</s>")
        made.add_tokens(list(PLAIN))
        return made
    assert tokenizers is not None
    real = load_any_tokenizer(tokenizers / name)
    real.add_special_tokens({"bos_token": real.bos_token or "<s>", "eos_token": real.eos_token or "</s>"})
    real.add_special_tokens({"additional_special_tokens": SPECIAL}, replace_extra_special_tokens=False)
    real.add_tokens(list(PLAIN))
    return real


def conversation(template: ChatTemplate, texts: dict[str, str]) -> tuple[list[dict[str, Any]], list[dict] | None]:
    """A conversation that the template takes, with these texts in it: the prompt of an answer, and its tools."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"1{texts['user']}1"}]
    if template.facts.system != "refused":
        messages.insert(0, {"role": "system", "content": f"2{texts['system']}2"})
    if not template.facts.tools:
        return messages, None
    call = {"type": "function", "id": "abcdefXYZ", "function": {"name": "find", "arguments": {"what": "x"}}}
    messages += [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefXYZ", "name": "find", "content": f"3{texts['result']}3"},
    ]
    schema = {"type": "object", "properties": {"what": {"type": "string", "description": f"5{texts['tool']}5"}}}
    about = {"name": "find", "description": f"4{texts['tool']}4", "parameters": schema}
    return messages, [{"type": "function", "function": about}]


def renderings(tokenizer: Any, template: ChatTemplate, texts: dict[str, str]) -> dict[str, list[int]]:
    """Ids of everything that renders: a conversation to train on, a prompt, and a pair."""
    prompt, tools = conversation(template, texts)
    answer = {"role": "assistant", "content": "An answer."}
    first = [message for message in prompt if message["role"] in ("system", "user")]
    pair = render_pair(tokenizer, template, prompt, [answer], [{**answer, "content": "Another."}], tools)
    return {
        "conversation": render_conversation(tokenizer, template, [*first, answer], tools).input_ids,
        "prompt": render_prompt(tokenizer, template, prompt, tools),
        "pair": [token for part in pair for token in part],
    }


def readable(text: str) -> str:
    """A text as every tokenizer can give it back: Qwen's writes NFC, and ▁ is a space to those with pieces."""
    return unicodedata.normalize("NFC", text).replace("▁", " ")


def check(tokenizer: Any, template: ChatTemplate, texts: dict[str, str]) -> None:
    """The control ids are those of harmless texts, and every text can be read back from the ids."""
    assert required_tokens_missing(tokenizer, template) == []
    encoder = encoder_of(tokenizer)
    calm = renderings(tokenizer, template, dict.fromkeys(PLACES, "x"))
    for name, ids in renderings(tokenizer, template, texts).items():
        found, expected = (Counter(token for token in some if token in encoder.added) for some in (ids, calm[name]))
        assert found == expected, (name, [encoder.added[token] for token in (found - expected)])
        decoded = readable(encoder.decode(ids))
        messages, tools = conversation(template, texts)
        written = [] if name == "conversation" else [one for one in messages if one["role"] == "tool"]
        written += [one for one in messages if one["role"] in ("system", "user")]
        for message in written:
            content = readable(message["content"])
            spelled = (content, json.dumps(content, ensure_ascii=False)[1:-1])
            assert any(one in decoded for one in spelled), (name, message["role"], decoded)
        if tools:
            about = json.dumps(readable(tools[0]["function"]["description"]), ensure_ascii=False)
            assert about[1:-1] in decoded or json.dumps(about[1:-1])[1:-1] in decoded, (name, decoded)


def everything(separator: str) -> dict[str, str]:
    return dict.fromkeys(PLACES, separator + separator.join(CONTROL) + separator)


def test_the_list_holds_the_tokens_of_the_families():
    assert {"<|im_start|>", "<|eot_id|>", "[INST]", "<start_of_turn>", "<|end|>", "<think>", "<tool_call>"} <= {
        *CONTROL
    }


@pytest.mark.parametrize("separator", ["", " ", "\n"], ids=["joined", "spaces", "lines"])
@pytest.mark.parametrize("tokenizer", ["bytes", "spm"])
@pytest.mark.parametrize("name", NAMES)
def test_every_control_token_of_every_template_is_text(name, tokenizer, separator):
    check(tokenizer_of(tokenizer), bundled(name), everything(separator))


@pytest.mark.parametrize("separator", ["", "\n"], ids=["joined", "lines"])
@pytest.mark.parametrize("tokenizer", REAL)
@pytest.mark.parametrize("name", NAMES)
def test_with_real_tokenizers(shared_dir, name, tokenizer, separator):
    check(tokenizer_of(tokenizer, shared_dir / "tokenizers"), bundled(name), everything(separator))


def parts_of(text: str) -> list[str]:
    """A control token, and what is left of it when it is cut."""
    return [text, text[:-1], text[1:], text[: len(text) // 2], text[len(text) // 2 :]]


characters = st.characters(exclude_categories=["Cs"], exclude_characters="\ufdd0\ufdd1\ufffd\x00")
hostile = st.lists(
    st.one_of(
        st.sampled_from(CONTROL),
        st.sampled_from([part for text in CONTROL for part in parts_of(text)]),
        st.sampled_from([" ", "\n", "\t", "\n\n", "\u00a0", "\u200b", "a", "ñ", "▁", "Ġ", "<0x0A>", "{{", "%}", "\\"]),
        st.text(characters, max_size=4),
    ),
    max_size=8,
).map("".join)
places = st.fixed_dictionaries(dict.fromkeys(PLACES, hostile))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(["bytes", "spm"]), places)
def test_fuzzed(name, tokenizer, texts):
    check(tokenizer_of(tokenizer), bundled(name), texts)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from(REAL), places)
def test_fuzzed_with_real_tokenizers(shared_dir, name, tokenizer, texts):
    check(tokenizer_of(tokenizer, shared_dir / "tokenizers"), bundled(name), texts)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_template_reads_in_a_text_is_refused_or_harmless(name):
    """Qwen3 looks for `<tool_response>` around a user's text, for instance."""
    pairs = [(text, f"</{text[1:]}") for text in CONTROL if f"</{text[1:]}" in CONTROL]
    refused = []
    for opening, closing in pairs:
        texts = dict.fromkeys(PLACES, "x") | {"user": f"{opening}y{closing}"}
        try:
            check(tokenizer_of("bytes"), bundled(name), texts)
        except ChatError as error:
            refused.append(error.found)
    assert all(found.startswith("reads control tokens inside messages") for found in refused)
