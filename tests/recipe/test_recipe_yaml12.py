"""YAML is read as 1.2, with the line of every key and every mistake."""

from __future__ import annotations

import math
import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from posttrain.errors import RecipeError
from posttrain.recipe.yaml12 import MAX_BYTES, decode, dump, parse, resolve


def read(text: str):
    document = parse(text, "r.yaml")
    assert document.problems == []
    return document.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-6", 5e-6),
        ("1e3", 1000.0),
        ("+1.5E+2", 150.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("-0", 0),
        ("010", 10),
        ("0o17", 15),
        ("0xfF", 255),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("Null", None),
        ("", None),
        # YAML 1.1 reads each of these as something else
        ("no", "no"),
        ("On", "On"),
        ("yes", "yes"),
        ("off", "off"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("-0x1", "-0x1"),
        ("1e", "1e"),
        ("nan", "nan"),
        ("nULL", "nULL"),
    ],
)
def test_plain_scalars_follow_the_core_schema(text, value):
    found = read(f"k: {text}")["k"]
    assert found == value
    assert type(found) is type(value)


def test_nan_and_quotes():
    assert math.isnan(read("k: .nan")["k"])
    assert read("""{a: "5", b: 'true', c: "~", "d": "a\\tb"}""") == {"a": "5", "b": "true", "c": "~", "d": "a\tb"}


def test_block_scalars_are_text():
    assert read("a: |\n  12\nb: >-\n  no\n  yes\n") == {"a": "12\n", "b": "no yes"}


def test_anchors_are_values_and_lines_are_those_of_the_keys():
    document = parse("a: &x\n  b: 1\nc:\n  - *x\n  -\n    d: {e: 2,\n      f: 3}\n", "r.yaml")
    assert document.value == {"a": {"b": 1}, "c": [{"b": 1}, {"d": {"e": 2, "f": 3}}]}
    assert document.lines == {
        ("a",): 1,
        ("a", "b"): 2,
        ("c",): 3,
        ("c", 0): 4,
        ("c", 1): 6,
        ("c", 1, "d"): 6,
        ("c", 1, "d", "e"): 6,
        ("c", 1, "d", "f"): 7,
    }


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        ("a: 1\nb: 2\n\na: 3\n", "r.yaml:4:1", "`a` stands twice, on line 1 and on line 4"),
        ("a: {b: 1, b: 2}", "r.yaml:1:11", "`b` stands twice, on line 1 and on line 1"),
        ("a: 1\n1: 2\n", "r.yaml:2:1", "a key is `1`, which is not text"),
        ("a: 1\n~: 2\n", "r.yaml:2:1", "a key is `~`"),
        ("a: 1\n[x, y]: 2\n", "r.yaml:2:1", "a key is a list or mapping"),
        ("a: 1\n? {b: 2}\n: 2\n", "r.yaml:2:3", "a key is a list or mapping"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "r.yaml:3:3", "merge key"),
        ("a: !!str 1\n", "r.yaml:1:4", "the tag `!!str`"),
        ("a: 1\nb: !!python/object:os.system x\n", "r.yaml:2:4", "the tag `!!python/object:os.system`"),
        ("a: !x [1]\n", "r.yaml:1:4", "the tag `!x`"),
    ],
)
def test_problems_that_leave_the_rest_readable(text, where, found):
    document = parse(text, "r.yaml")
    assert [problem.where for _, problem in document.problems] == [where]
    assert found in document.problems[0][1].found
    assert document.problems[0][1].todo
    assert "a" in document.value


@pytest.mark.parametrize(
    ("text", "where", "found", "todo"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "r.yaml:3:2", "line 2", "brackets"),
        ("a: 1\n\tb: 2\n", "r.yaml:2:1", "a tab", "spaces, not tabs"),
        ("model: @sft\n", "r.yaml:1:8", "cannot start any token", "starts with @ in quotes"),
        ("a: b: c\n", "r.yaml:1:5", "mapping values", "`: `"),
        ("a: {p: ${HOME}/x}\n", "r.yaml:1:9", "expected ',' or '}'", '"${NAME}"'),
        ("a: 'x\n", "r.yaml:2:1", "end of stream", "quotes"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2:1", "second document", "---"),
        ("a: *x\n", "r.yaml:1:4", "`*x` refers to no anchor", "quote"),
        ("a: &x [*x]\n", "r.yaml:1:8", "`*x` refers to no anchor", "finished"),
        ("a: " + "9" * 5000, "r.yaml:1:4", "too large a number", ""),
        ("a: 1e999\n", "r.yaml:1:4", "too large a number", ""),
        ("a: 1\nb: \x07\n", "r.yaml:2:4", "control character", "remove"),
        ("a: " + "[" * 100 + "]" * 100, "r.yaml:1:68", "nested deeper", ""),
    ],
)
def test_what_cannot_be_read_stops_at_line_and_column(text, where, found, todo):
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml")
    assert caught.value.where == where
    assert found in caught.value.found
    assert todo in caught.value.todo


def test_alias_bomb_is_stopped():
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(RecipeError, match="aliases written out"):
        parse("\n".join(rows), "r.yaml")


def test_nesting_bomb_does_not_recurse():
    with pytest.raises(RecipeError, match="nested deeper"):
        parse("[" * 100_000, "r.yaml")


@pytest.mark.parametrize(
    ("data", "where", "found"),
    [
        (b"a: 1\nb: \xff\n", "r.yaml:2", "0xff"),
        ("a: ñ\n".encode("latin-1"), "r.yaml:1", "not UTF-8"),
        ("a: 1".encode("utf-16"), "r.yaml:1", "not UTF-8"),
        (b"x" * (MAX_BYTES + 1), "r.yaml", "too many"),
    ],
)
def test_bytes_that_are_no_text(data, where, found):
    with pytest.raises(RecipeError) as caught:
        decode(data, "r.yaml")
    assert caught.value.where == where
    assert found in caught.value.found


def test_byte_order_mark_and_carriage_returns():
    document = parse(decode(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n", "r.yaml"), "r.yaml")
    assert document.value == {"a": 1, "b": 2}
    assert document.lines[("b",)] == 2


def test_without_libyaml_the_same_is_read(monkeypatch):
    text = "a: &x [5e-6, no, '1']\nb:\n  c: *x\n  d: {e: 0o17}\n"
    fast = parse(text, "r.yaml")
    monkeypatch.setattr("posttrain.recipe.yaml12._LOADER", yaml.BaseLoader)
    assert parse(text, "r.yaml") == fast


def test_empty_documents_are_none():
    assert [read(text) for text in ("", "# nothing\n", "---\n", "~")] == [None] * 4


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
texts = st.text() | st.from_regex(r"[-+]?[0-9.]{1,4}([eE][-+]?[0-9]{1,2})?", fullmatch=True)


@given(st.recursive(scalars | texts, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20))
def test_dump_reads_back_equal(value):
    assert read(dump(value)) == value


@given(st.integers(min_value=-(10**40), max_value=10**40) | st.floats(allow_nan=False, allow_infinity=False))
def test_python_numbers_read_back_as_themselves(number):
    found = resolve(repr(number))
    assert found == number
    assert type(found) is type(number)


NUMBER = re.compile(  # YAML 1.2.2, section 10.3.2, as it stands there
    r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
    r"|[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN)"
)


@given(st.text(alphabet="0123456789abcdefox+-._eE~in", max_size=6))
def test_a_plain_scalar_is_a_number_exactly_where_the_core_schema_says(text):
    try:
        number = isinstance(resolve(text), (int, float))
    except ValueError:  # 1e999
        number = True
    assert number == bool(NUMBER.fullmatch(text))
