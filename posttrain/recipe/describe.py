"""How values and suggestions read in an error message."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from posttrain.recipe.yaml12 import resolve

_LONGEST = 60
_SAME = (("gpu", "cuda"), ("bf16", "bfloat16"), ("fp16", "float16", "half"), ("fp32", "float32", "float"))
"""Words for one thing: nearer in meaning than in spelling (`gpu` is not `cpu`)."""


def describe(value: Any) -> str:
    """A value as an error shows it, with what it is: `'5e-6' is text`, `3 is a number`."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a mapping"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}"
    shown = repr(value)
    shown = shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 1]}…"
    return f"the text {shown}" if isinstance(value, str) else f"the number {shown}"


def nearest(word: str, allowed: Sequence[str]) -> str:
    """What to write instead: the nearest allowed word where one is near, and else all of them."""
    lower = {name.lower(): name for name in allowed}
    same = next((lower[name] for group in _SAME if word.lower() in group for name in group if name in lower), None)
    if same:
        return f"did you mean {same}?"
    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=0.6)
    if near:
        return f"did you mean {lower[near[0]]}?"
    return f"allowed: {', '.join(allowed)}" if allowed else "remove it"


def nearest_word(word: str, allowed: Sequence[str]) -> str | None:
    """The nearest allowed word, or None where none is near."""
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    return near[0] if near else None


def number_in(text: str) -> int | float | None:
    """The number that a text spells (`5e-6`, `1_000`, `1,000`), or None."""
    try:
        value = resolve(text.strip().replace("_", "").replace(",", ""))
    except ValueError:
        return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
