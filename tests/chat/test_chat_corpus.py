"""Generated conversations: the same every time, and a good spread in few."""

from __future__ import annotations

import json
import re

import pytest

from posttrain.chat.corpus import Conversation, conversations

MANY = conversations(300, 0)


def roles(conversation: Conversation) -> str:
    """Roles by their first letters; a capital where tools are called."""
    return "".join(
        message["role"][0].upper() if message.get("tool_calls") else message["role"][0]
        for message in conversation.messages
    )


def test_same_arguments_give_the_same_conversations():
    assert conversations(300, 0) == MANY
    assert conversations(40, 0) == MANY[:40]
    assert conversations(40, 1) != MANY[:40]
    assert roles(MANY[0]) == "ua"
    assert json.loads(json.dumps([conversation.messages for conversation in MANY])) == [c.messages for c in MANY]


def test_fifty_hold_every_kind():
    first = MANY[:50]
    assert {"ua", "uaua", "sua", "uA", "uAta", "uAtta", "uua", "uaa", "a", "uasua", "ss", "u", "uauauauaua"} <= {
        roles(conversation) for conversation in first
    }
    messages = [message for conversation in first for message in conversation.messages]
    contents = [message["content"] for message in messages]
    assert any("reasoning_content" in message and message.get("tool_calls") for message in messages)
    assert any(len(message.get("tool_calls", [])) == 2 for message in messages)
    assert any("<think>" in content for content in contents)
    assert any(
        not content and not message.get("tool_calls") for message, content in zip(messages, contents, strict=True)
    )
    assert any(content.strip() and content != content.strip() for content in contents)
    everything = "\n".join(contents)
    for part in ("Euskadi", "l·l", "Galicia", "مصر", "東京", "😀", "\u00a0", "e\u0301", "{% for", "\n    if"):
        assert part in everything or part in json.dumps(MANY[50:100][0].messages, ensure_ascii=False), part


@pytest.mark.parametrize(
    ("option", "seen"),
    [
        ("system", lambda c: "s" in roles(c)),
        ("tools", lambda c: c.tools or "t" in roles(c) or "A" in roles(c)),
        ("thinking", lambda c: any("reasoning_content" in m or "<think>" in m["content"] for m in c.messages)),
        ("odd", lambda c: re.search("uu|aa|[ua]s|ss|^s?a", roles(c).lower())),
        ("empty", lambda c: any(not m["content"].strip() and not m.get("tool_calls") for m in c.messages)),
        ("edges", lambda c: any(m["content"] != m["content"].strip() for m in c.messages)),
    ],
)
def test_what_is_left_out_is_not_there(option, seen):
    assert any(map(seen, MANY))
    assert not any(map(seen, conversations(300, 0, **{option: False})))


def test_contents_differ_within_a_conversation():
    for conversation in MANY:
        contents = [message["content"] for message in conversation.messages if message["content"].strip()]
        marks = [re.findall(r"n\d+[bdfg]\.", content)[-1] for content in contents]
        assert len(set(marks)) == len(marks)


def test_calls_are_answered_by_their_results():
    for conversation in MANY:
        calls = [call for message in conversation.messages for call in message.get("tool_calls", [])]
        results = [message for message in conversation.messages if message["role"] == "tool"]
        assert all(len(call["id"]) == 9 and isinstance(call["function"]["arguments"], dict) for call in calls)
        answered = {call["id"]: call["function"]["name"] for call in calls}
        assert all(answered[result["tool_call_id"]] == result["name"] for result in results)
        assert conversation.tools is not None or not calls


def test_no_control_token_stands_in_a_text():
    everything = json.dumps([[c.messages, c.tools] for c in MANY], ensure_ascii=False)
    assert not re.search(r"<\||\|>|<s>|</s>|\[/?INST|<start_of|<end_of|<eos>|<bos>", everything)
