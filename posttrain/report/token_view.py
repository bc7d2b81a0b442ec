"""Rows as a model learns them, token by token: as text for a terminal or a log, and as one HTML page.

White space and what cannot be seen have signs, so that nothing in the data can hide, or steer a terminal.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

PARTIAL = "\ufffd"
"""Stands for a token that is only a part of a character; the token that ends the character shows it."""
_LONGEST_CHARACTER = 6  # tokens; what is no character by then never becomes one
_SIGNS = {**{chr(code): chr(0x2400 + code) for code in range(32)}, " ": "␣", "\n": "↵\n", "\t": "⇥", "\x7f": "␡"}
_UNSEEN = ("Cc", "Cf", "Cs", "Cn", "Zs", "Zl", "Zp")
_GREEN, _DIM, _BOLD, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[1m", "\x1b[0m"
_LEGEND = (
    "│ between tokens",
    "«» control token",
    "␣ ↵ ⇥ white space",
    "‹U+…› unseen character",
    f"{PARTIAL} part of a character",
)


@dataclass(frozen=True)
class ShownToken:
    """One token of a row."""

    id: int
    text: str
    """What it adds to the decoded text; PARTIAL where it ends inside a character."""
    trained: bool
    control: bool


@dataclass(frozen=True)
class ShownPart:
    """Tokens that belong together: a whole conversation, or the prompt or one answer of a pair."""

    name: str
    """Empty where the row has one part only."""
    tokens: tuple[ShownToken, ...]


@dataclass(frozen=True)
class ShownRow:
    """One row that a stage trains on."""

    place: str
    """`file:row`, as errors name it."""
    parts: tuple[ShownPart, ...]
    truncated: int
    """Tokens that were cut off at max_length."""

    @property
    def counts(self) -> str:
        """Its tokens, trained, masked and cut off."""
        tokens = [token for part in self.parts for token in part.tokens]
        trained = sum(token.trained for token in tokens)
        cut = f"; {self.truncated} more were cut off at max_length" if self.truncated else ""
        return f"{len(tokens)} tokens: {trained} trained, {len(tokens) - trained} masked{cut}"


@dataclass(frozen=True)
class ShownStage:
    """The first rows of one stage."""

    stage: str
    note: str
    """What is shown, or why nothing can be."""
    rows: tuple[ShownRow, ...] = ()


def show_tokens(
    ids: Sequence[int], trained: Iterable[bool], decode: Callable[[list[int]], str], control: Mapping[int, str]
) -> tuple[ShownToken, ...]:
    """Pairs ids with the text that each adds to the decoded whole.

    Args:
        trained: per token, whether it carries loss.
        decode: ids -> text, control tokens included.
        control: id -> text of the control tokens.
    """
    ids, shown = list(ids), []
    anchor = begin = 0  # of what is decoded together, for decoders look at neighbours; of the present character
    for at, (token, learnt) in enumerate(zip(ids, trained, strict=True)):
        before, whole = decode(ids[anchor:at]).rstrip(PARTIAL), decode(ids[anchor : at + 1])
        text = whole.removeprefix(before) if whole.startswith(before) else decode([token])
        if token in control:
            text = control[token]
        elif text.endswith(PARTIAL) and at - begin < _LONGEST_CHARACTER:
            text = PARTIAL
        shown.append(ShownToken(token, text, learnt, token in control))
        if text != PARTIAL:
            anchor, begin = begin, at + 1
    return tuple(shown)


def visible(text: str) -> str:
    """Writes signs for white space and for characters that cannot be seen; a newline keeps its line break."""
    if not text:
        return "∅"
    signs = [
        _SIGNS.get(char) or (f"‹U+{ord(char):04X}›" if unicodedata.category(char) in _UNSEEN else char) for char in text
    ]
    return ("◌" if unicodedata.combining(text[0]) else "") + "".join(signs)


def token_text(stages: Sequence[ShownStage], colour: bool) -> str:
    """Returns the rows as lines: in colour trained tokens are green and masked ones dim, else ⟦⟧ hold the trained."""
    trained = f"{_GREEN}green: trained{_PLAIN}, {_DIM}dim: masked{_PLAIN}" if colour else "⟦⟧ trained, the rest masked"
    lines = [" · ".join([trained, *_LEGEND])]
    for stage in stages:
        lines += ["", f"{stage.stage}: {stage.note}"]
        for number, row in enumerate(stage.rows, start=1):
            lines += ["", f"{stage.stage}, row {number} · {row.place} · {row.counts}"]
            for part in row.parts:
                lines += [f"{part.name}:"] if part.name else []
                lines += [_coloured(part.tokens) if colour else _bracketed(part.tokens)]
    return "\n".join(lines) + "\n"


def _bracketed(tokens: Sequence[ShownToken]) -> str:
    runs = [(trained, list(run)) for trained, run in groupby(tokens, key=lambda token: token.trained)]
    spelled = ["│".join(map(_marked, run)) for _, run in runs]
    return "".join(f"⟦{text}⟧" if trained else text for (trained, _), text in zip(runs, spelled, strict=True))


def _coloured(tokens: Sequence[ShownToken]) -> str:
    style = {True: _GREEN, False: _DIM}
    spelled = [f"{style[one.trained]}{_BOLD * one.control}{_marked(one)}{_PLAIN}" for one in tokens]
    return f"{_DIM}│{_PLAIN}".join(spelled)


def _marked(token: ShownToken) -> str:
    return f"«{visible(token.text)}»" if token.control else visible(token.text)


def token_page(title: str, stages: Sequence[ShownStage]) -> str:
    """Returns the rows as one HTML page that needs nothing else: no script, no font, no network."""
    body = [f"<h1>{escape(title)}</h1>", _HTML_LEGEND]
    for stage in stages:
        body += [f"<h2>{escape(stage.stage)}</h2>", f"<p>{escape(stage.note)}</p>"]
        for number, row in enumerate(stage.rows, start=1):
            body += [f"<h3>row {number} · {escape(row.place)}</h3>", f"<p>{escape(row.counts)}</p>"]
            for part in row.parts:
                body += [f"<h4>{escape(part.name)}</h4>"] if part.name else []
                body += [f'<div class="row">{"".join(map(_html_token, part.tokens))}</div>']
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body))


def _html_token(token: ShownToken) -> str:
    kinds = f"{'t' if token.trained else 'm'}{' c' if token.control else ''}"
    text = visible(token.text)
    about = f"id {token.id}: {text.strip()} ({'trained' if token.trained else 'masked'})"
    shown = re.sub(r"[␣⇥↵\u2400-\u241f␡∅]|‹U\+[0-9A-F]+›", r"<i>\g<0></i>", escape(text))
    return f'<span class="{kinds}" title="{escape(about)}">{shown}</span>'


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
.row, .legend { font: .9rem/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
span { unicode-bidi: isolate; padding: .15em 0; border-radius: .2em; border-right: 1px solid #8886; }
.t { background: #2a92; color: light-dark(#064, #8e9); }
.t:nth-child(even) { background: #2a95; }
.m { color: #888; }
.m:nth-child(even) { background: #8882; }
.c { font-weight: bold; outline: 1px solid; outline-offset: -1px; padding-inline: .2em; }
i { font-style: normal; opacity: .45; }
"""
_HTML_LEGEND = (
    '<p class="legend"><span class="t">trained</span><span class="t">next token</span> '
    '<span class="m">masked</span><span class="m">next token</span> '
    '<span class="t c">control token</span><span class="m c">control token</span> '
    f"<i>␣ ↵ ⇥</i> white space, <i>‹U+…›</i> unseen character, {PARTIAL} part of a character. "
    "Point at a token to see its id.</p>"
)
