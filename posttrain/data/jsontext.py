"""JSON from strangers: bounded nesting, no NaN, no half surrogates, and errors that say what is wrong."""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 100
"""Deepest nesting of brackets that is read; real rows stay below ten."""

_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_BRACKET = re.compile(r"[\[\]{}]")


class BadJson(ValueError):
    """A text that is not JSON we read; the message says what was found."""


def parse_json(text: str) -> Any:
    """Parses one JSON value.

    Raises:
        BadJson: syntax, nesting beyond `MAX_DEPTH`, NaN or Infinity, or text that UTF-8 cannot hold.
    """
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise BadJson(f"brackets nested more than {MAX_DEPTH} deep")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = error.msg.removesuffix(" at")  # "Unterminated string starting at"
        raise BadJson(f"not valid JSON ({message} at line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise BadJson("brackets nested too deeply") from None
    except BadJson:
        raise
    except ValueError as error:  # Python refuses integers of more than 4300 digits
        raise BadJson(f"not usable JSON ({error})") from None
    if "\\u" in text:
        _refuse_half_surrogates(value)
    return value


def _depth(text: str) -> int:
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _refuse_constant(name: str) -> None:
    raise BadJson(f"{name} is not JSON")


def _refuse_half_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadJson("half of a surrogate pair (\\ud800 to \\udfff alone), which no UTF-8 text can hold") from None
