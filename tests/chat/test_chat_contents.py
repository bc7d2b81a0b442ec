"""What messages may hold, and that nothing of it is lost, changed or forged on the way to the text."""

from __future__ import annotations

from typing import Any

import pytest
from chat_tiny import SPECIAL, bundled, make_tokenizer
from tokenizers import AddedToken

from posttrain.chat.render import MASKED, render_conversation, render_prompt
from posttrain.chat.templates import ChatTemplate
from posttrain.errors import ChatError

TINY = make_tokenizer(SPECIAL, ("<think>", "</think>"), eos_token="</s>", pad_token="<|pad|>")
OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
USER, ANSWER = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}
RESULT = {"role": "tool", "content": 'It says "no".'}


def chatml(content: str, keep: str = "true") -> ChatTemplate:
    """ChatML whose messages say an expression, those for which another one holds."""
    turn = f"<|im_start|>{{{{ message.role }}}}\n{{{{ {content} }}}}<|im_end|>\n"
    return ChatTemplate("own", f"{{% for message in messages if {keep} %}}{turn}{{% endfor %}}{PROMPT}")


@pytest.mark.parametrize(
    ("message", "where", "found"),
    [
        ({"role": "user", "content": None}, r"message 1 \(user\)", "null, not a text"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, r"message 1 \(user\)", "a list, not a text"),
        ({"role": "user", "content": 5}, r"message 1 \(user\)", "a int, not a text"),
        ({"role": ["user"], "content": "x"}, "message 1", "has no role"),
        ({"content": "x"}, "message 1", "has no role"),
        ({"role": "narrator", "content": "x"}, "message 1", "role 'narrator'"),
        ({**ANSWER, "tool_calls": ["f"]}, "message 1, tool call 1", "names no function"),
        ({**ANSWER, "tool_calls": [{"function": None}]}, "message 1, tool call 1", "names no function"),
        ({**ANSWER, "tool_calls": {"name": "f"}}, "message 1, tool_calls", "a dict, not a list"),
    ],
)
def test_what_is_no_message_is_refused_by_name(message: dict[str, Any], where: str, found: str) -> None:
    with pytest.raises(ChatError, match=f"^{where}: .*{found}"):
        render_prompt(TINY, bundled("qwen2.5"), [message, USER])


def test_a_tool_without_a_name_is_refused() -> None:
    with pytest.raises(ChatError, match=r"^tool 2: names no function"):
        render_prompt(TINY, bundled("qwen2.5"), [USER], [{"name": "f"}, {"type": "function", "function": {}}])


def test_calls_may_stand_without_content() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert '{"name": "f"' in render_conversation(TINY, bundled("qwen2.5"), [USER, call]).text


def test_a_tools_result_that_is_left_out_is_refused() -> None:
    talk = [USER, {"role": "assistant", "content": "Let me see."}, RESULT, ANSWER]
    with pytest.raises(ChatError, match=r"message 3 \(tool\): its content is left out"):
        render_conversation(TINY, chatml("message.content", "message.role != 'tool'"), talk)
    quoted = chatml("(message.content | tojson) if message.role == 'tool' else message.content")
    assert '"It says \\"no\\"."' in render_conversation(TINY, quoted, talk).text


def test_a_content_is_missed_though_another_message_says_the_same() -> None:
    talk = [USER, ANSWER, {"role": "system", "content": "One?"}, USER, ANSWER]
    kept = render_conversation(TINY, chatml("message.content"), talk)
    assert kept.text.count("One?") == 3
    with pytest.raises(ChatError, match=r"message \d \((system|user)\): its content is left out"):
        render_conversation(TINY, chatml("message.content", "message.role != 'system'"), talk)


def test_a_trained_answer_keeps_the_reasoning_inside_it() -> None:
    """As DeepSeek-R1-distill's own template, which writes every answer without it."""
    answer = {"role": "assistant", "content": "<think>\nBecause.\n</think>\n\nTwo."}
    bare = chatml("message.content.split('</think>')[-1].strip()")
    with pytest.raises(ChatError, match=r"message 2 \(assistant\): its content is left out"):
        render_conversation(TINY, bare, [USER, answer])
    assert "Because." not in TINY.decode(render_prompt(TINY, bare, [USER, answer, USER]))
    anew = chatml("message.content.replace('<think>\n', '<think>')")
    assert "<think>Because." in render_conversation(TINY, anew, [USER, answer]).text


def test_control_tokens_that_overlap_are_all_broken_up() -> None:
    tokenizer = make_tokenizer([*SPECIAL, "<a>", ">b<", "<c>"], eos_token="</s>")
    row = render_conversation(tokenizer, bundled("chatml"), [{"role": "user", "content": "<a>b<c>"}, ANSWER])
    own = {tokenizer.convert_tokens_to_ids(token) for token in (OPEN, CLOSE)}
    assert {
        token
        for token in row.input_ids
        if token in tokenizer.all_special_ids or token in tokenizer.added_tokens_decoder
    } == own
    assert tokenizer.decode(row.input_ids) == row.text


def test_an_end_of_turn_that_the_tokenizer_does_not_make_is_refused() -> None:
    """Flag single_word: after a letter it is plain text. Such an answer had no label at all."""
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>")
    apart = [AddedToken(text, single_word=True, normalized=False) for text in (OPEN, CLOSE)]
    tokenizer.backend_tokenizer.add_special_tokens(apart)
    end = tokenizer.convert_tokens_to_ids(CLOSE)
    spoken = render_conversation(tokenizer, bundled("chatml"), [USER, ANSWER, USER, ANSWER])
    assert [label for label in spoken.labels if label != MASKED].count(end) == 2
    with pytest.raises(ChatError, match="does not make the token"):
        render_conversation(tokenizer, bundled("chatml"), [USER, ANSWER, USER, {**ANSWER, "content": "two"}])
