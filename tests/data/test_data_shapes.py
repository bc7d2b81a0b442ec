"""Each shape becomes our rows; detection is unambiguous; unusable content is told from broken rows."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data import pairs, shapes
from posttrain.data.rows import Origin, PairRow
from posttrain.data.shapes import check_format, convert, detect_shape, format_text
from posttrain.errors import DataError

HERE = Origin("f.jsonl", 7)
U, A, S = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("system", "s")))
B = {"role": "assistant", "content": "b"}
DIALOGUE = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"


def detected(*rows: dict[str, Any], want: Any = "chat") -> str:
    return detect_shape([(Origin("f", number), row) for number, row in enumerate(rows, 1)], want)


@pytest.mark.parametrize(
    ("row", "want", "shape"),
    [
        ({"text": "t", "url": "u"}, "text", "text"),
        ({"messages": [U, A], "prompt": "q", "prompt_id": "1"}, "chat", "messages"),
        ({"prompt": "q", "completion": "a"}, "chat", "prompt_completion"),
        ({"instruction": "q", "input": "", "output": "a", "messages": None}, "chat", "alpaca"),
        ({"conversations": [], "tools": "[]"}, "chat", "sharegpt"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "messages": [U, A]}, "pair", "preference"),
        ({"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"}, "pair", "transcript_pair"),
    ],
)
def test_detection(row: dict[str, Any], want: str, shape: str) -> None:
    assert detected(row, want=want) == shape


@pytest.mark.parametrize(
    ("row", "want", "found"),
    [
        ({"messages": [U], "text": "t"}, "chat", "say which one is meant: `shape: messages`"),
        ({"messages": [U], "instruction": "q", "output": "a"}, "chat", "`shape: messages` or `shape: alpaca`"),
        ({"messages": [U], "text": "t"}, "text", "`shape: text`"),
        ({"conversations": [], "chosen": "a", "rejected": "b"}, "chat", r"\(sharegpt, preference\)"),
        ({"instruction": "q", "output": "a"}, "text", "text_format"),
        ({"instruction": "q", "output": "a"}, "pair", "no known row shape"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "chat", "rows of shape preference"),
        ({"question": "q", "answer": "a"}, "chat", "among the columns `answer`, `question`"),
        ({}, "text", "columns none"),
    ],
)
def test_detection_refusals(row: dict[str, Any], want: str, found: str) -> None:
    with pytest.raises(DataError, match=found):
        detected(row, want=want)


def test_rows_of_two_shapes_are_ambiguous() -> None:
    with pytest.raises(DataError, match="several shapes"):
        detected({"messages": [U, A]}, {"instruction": "q", "output": "a"})


@pytest.mark.parametrize(
    ("shape", "row", "messages"),
    [
        ("messages", {"messages": [{**S, "x": 1}, U, A]}, [S, U, A]),
        ("messages", {"messages": [U, A], "system": "s"}, [S, U, A]),
        ("messages", {"messages": [U, A], "system": " "}, [U, A]),
        ("messages", {"messages": [U, {**A, "weight": 1}, U, {**A, "train": True, "name": None}]}, [U, A, U, A]),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, [U, A]),
        ("prompt_completion", {"prompt": [S, U], "completion": [A]}, [S, U, A]),
        ("alpaca", {"instruction": "q", "input": "", "output": "a", "system": "s"}, [S, U, A]),
        ("alpaca", {"instruction": "q", "input": "x", "output": "a"}, [{**U, "content": "q\nx"}, A]),
        ("alpaca", {"instruction": "q", "input": None, "output": "b", "history": [["q", "a"]]}, [U, A, U, B]),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [U, A]),
        ("sharegpt", {"conversations": [{"role": "user", "content": "q"}, A]}, [U, A]),
    ],
)
def test_conversations(shape: str, row: dict[str, Any], messages: list[dict]) -> None:
    converted, reason = convert(shape, row, HERE)
    assert reason is None
    assert converted.messages == messages
    assert converted.tools is None
    assert converted.origin is HERE


def test_tool_calls_of_sharegpt_and_openai_become_the_same() -> None:
    bare = {"name": "area", "description": "d", "parameters": {}}
    call = {"type": "function", "function": {"name": "area", "arguments": {"r": 4}}}
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "area", "arguments": {"r": 4}}'},
            {"from": "observation", "value": '{"area": 50}'},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "area", "description": "d", "parameters": {}}]',
    }
    spelled = {"type": "function", "function": {"name": "area", "arguments": '{"r": 4}'}}
    openai = {
        "messages": [
            U,
            {"role": "assistant", "content": None, "tool_calls": [spelled]},
            {"role": "tool", "content": '{"area": 50}'},
            A,
        ],
        "tools": [{"type": "function", "function": bare}],
    }
    one, _ = convert("sharegpt", sharegpt, HERE)
    two, _ = convert("messages", openai, HERE)
    assert one == two
    assert one.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert one.messages[2]["role"] == "tool"
    assert one.tools == [{"type": "function", "function": bare}]


PAIR = ([U], [A], [B])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR),
        ({"prompt": [U], "chosen": [A], "rejected": [B]}, PAIR),
        ({"prompt": "q", "system": "s", "chosen": "a", "rejected": "b"}, ([S, U], [A], [B])),
        ({"prompt": "q", "chosen": [U, A], "rejected": [U, B], "messages": [U, A]}, PAIR),
        ({"prompt": "q", "chosen": [U, A, U, A], "rejected": [U, A, U, B]}, ([U, A, U], [A], [B])),
        (
            {
                "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            ([S, U], [A], [B]),
        ),
    ],
)
def test_preferences(row: dict[str, Any], expected: tuple) -> None:
    assert convert("preference", row, HERE) == (PairRow(*expected, None, HERE), None)


def test_transcripts_are_split_at_their_last_answer() -> None:
    row, reason = convert("transcript_pair", {"chosen": DIALOGUE + " a ", "rejected": DIALOGUE + "  b"}, HERE)
    asked = [{**U, "content": "one"}, {**A, "content": "two"}, {**U, "content": "three"}]
    assert (row, reason) == (PairRow(asked, [A], [B], None, HERE), None)


@pytest.mark.parametrize(
    ("shape", "row", "reason"),
    [
        ("text", {"text": " \n"}, shapes.EMPTY_TEXT),
        ("messages", {"messages": []}, shapes.NO_ANSWER),
        ("messages", {"messages": [U]}, shapes.NO_ANSWER),
        ("messages", {"messages": [S, A]}, shapes.EMPTY_PROMPT),
        ("messages", {"messages": [U, {**A, "content": " "}]}, shapes.EMPTY_ANSWER),
        ("alpaca", {"instruction": "", "output": "a"}, shapes.EMPTY_PROMPT),
        ("alpaca", {"instruction": "q", "output": ""}, shapes.EMPTY_ANSWER),
        ("prompt_completion", {"prompt": "q", "completion": "\t"}, shapes.EMPTY_ANSWER),
        ("preference", {"prompt": "q", "chosen": "", "rejected": "b"}, pairs.NO_CHOSEN),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": []}, pairs.NO_REJECTED),
        ("preference", {"prompt": "", "chosen": "a", "rejected": "b"}, pairs.NO_PROMPT),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, pairs.EQUAL),
        ("preference", {"prompt": "q", "chosen": [U, A], "rejected": [S, U, B]}, pairs.OTHER_PROMPT),
        ("transcript_pair", {"chosen": DIALOGUE + " ", "rejected": DIALOGUE + " b"}, pairs.NO_CHOSEN),
        ("transcript_pair", {"chosen": DIALOGUE + " a", "rejected": DIALOGUE}, pairs.NO_REJECTED),
        ("transcript_pair", {"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " a"}, pairs.EQUAL),
        (
            "transcript_pair",
            {"chosen": DIALOGUE + " a", "rejected": "\n\nHuman: x\n\nAssistant: y"},
            pairs.OTHER_PROMPT,
        ),
        ("transcript_pair", {"chosen": "\n\nHuman: x", "rejected": DIALOGUE + " b"}, pairs.NO_CHOSEN),
        (
            "transcript_pair",
            {"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b\n\nAssistant: c"},
            pairs.LONGER,
        ),
        (
            "transcript_pair",
            {"chosen": DIALOGUE + " a\n\nHuman: c\n\nAssistant: d", "rejected": DIALOGUE + " b"},
            pairs.OTHER_PROMPT,
        ),
    ],
)
def test_unusable_content_is_a_reason_and_not_an_error(shape: str, row: dict[str, Any], reason: str) -> None:
    assert convert(shape, row, HERE)[1] == reason


@pytest.mark.parametrize(
    ("shape", "row", "found"),
    [
        ("text", {"text": None}, "`text` is null, not a string"),
        ("text", {"body": "x"}, "no column `text`"),
        ("alpaca", {"instruction": "q"}, "no column `output`"),
        ("alpaca", {"instruction": "q", "output": ["a"]}, "`output` is a list"),
        ("alpaca", {"instruction": "q", "output": "a", "history": [["q"]]}, r"`history\[0\]`"),
        ("messages", {"messages": "hello"}, "`messages` is a string, not a list"),
        ("messages", {"messages": ["hello"]}, r"`messages\[0\]` is a string"),
        (
            "messages",
            {"messages": [U, {"role": "robot", "content": "a"}]},
            r"`messages\[1\]` has the unknown role 'rob",
        ),
        ("messages", {"messages": [{"content": "a"}]}, "has no role"),
        ("messages", {"messages": [U, {"role": "assistant"}]}, r"`messages\[1\].content` is null"),
        ("messages", {"messages": [U, {**A, "content": [{"type": "text", "text": "a"}]}]}, "content blocks"),
        ("messages", {"messages": [U, {**A, "weight": 0}]}, "weight` is 0"),
        ("messages", {"messages": [S, U, A], "system": "s"}, "begin with a system turn"),
        ("messages", {"messages": [U, A], "tools": "[{"}, "`tools` is not valid JSON"),
        ("messages", {"messages": [U, A], "tools": [{"x": 1}]}, r"`tools\[0\]` has no name"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f(x)"}]}, "not valid JSON"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "[1]"}]}, "without a name"),
        ("preference", {"chosen": "a", "rejected": "b"}, "no `prompt`"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": 3}, "`rejected` is a number"),
        ("preference", {"prompt": "q", "chosen": DIALOGUE, "rejected": "b"}, "whole transcript"),
        ("transcript_pair", {"chosen": "hello", "rejected": DIALOGUE}, "not a transcript"),
    ],
)
def test_rows_broken_in_kind_name_file_row_and_field(shape: str, row: dict[str, Any], found: str) -> None:
    with pytest.raises(DataError, match=found) as error:
        convert(shape, row, HERE)
    assert error.value.where == "f.jsonl:7"
    assert error.value.todo


def test_text_format() -> None:
    row = {"instruction": "q", "out put": "a {b}", "n": 3, "input": None}
    assert format_text("{instruction}: {out put}{input} {n} {{}}", row, HERE)[0].text == "q: a {b} 3 {}"
    with pytest.raises(DataError, match=r"f\.jsonl:7: no column 'output'"):
        format_text("{output}", row, HERE)


@pytest.mark.parametrize("pattern", ["{a.__class__}", "{a[0]}", "{a!r}", "{a:>9}", "{}", "{0}", "no field", "{a", "}"])
def test_text_format_names_columns_and_nothing_else(pattern: str) -> None:
    with pytest.raises(DataError, match="text_format"):
        check_format(pattern, "sources[0]")
