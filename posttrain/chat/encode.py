"""Text to token ids, such that a prompt's ids begin every row that begins with the prompt.

Every tokenizer is encoded through one private copy of its backend. The copy differs in three ways, none
of which changes the ids of ordinary text: offsets are not trimmed (no post-processor), a BREAK inside a
text is dropped after added tokens have been looked for and before anything else, and a CUT separates
what stands on its two sides as a special token would, and is dropped from the ids.

So a control token's text becomes ordinary text by writing BREAKs into it, and is then tokenised as any
other punctuation.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from posttrain.errors import ChatError

BREAK, CUT = "\ufdd0", "\ufdd1"  # Unicode noncharacters: no text may contain them
_NO_CHARACTER = f"[{BREAK}{CUT}\ud800-\udfff]"
_SHORT, _MANY = 64, 4096


@dataclass(frozen=True)
class Encoded:
    """Ids of a text, and where its boundaries fell."""

    ids: list[int]
    starts: list[int]
    """First character of each token, in the text with its BREAKs."""
    firsts: list[int]
    """For each boundary, the index of the first token after it."""
    straddled: int
    """Boundaries that no token boundary met; the text was cut there."""


@dataclass
class Encoder:
    """The private copy of one tokenizer's backend, and what is remembered about it."""

    backend: Tokenizer
    size: int
    """Vocabulary size of the original when it was copied."""
    added: dict[int, str]
    """Control tokens: the added tokens, but for white space and single characters."""
    special: frozenset[int]
    forbidden: re.Pattern[str]
    """Finds a control token's text (longest first), or what is no character."""
    remembered: dict[Any, Any] = field(default_factory=dict)
    """Small facts that other modules derive from the tokenizer, each computed once."""
    _prefixes: dict[str, list[int]] = field(default_factory=dict)

    def encode(self, text: str, cuts: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """Returns ids and first characters of a text, tokenised apart on the two sides of each cut.

        Raises:
            ChatError: the tokenizer makes a control token even from a text with BREAKs in it.
        """
        whole = text
        for cut in reversed(cuts):
            whole = f"{whole[:cut]}{CUT}{whole[cut:]}"
        encoding = self.backend.encode(whole, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        if BREAK in whole:
            self._refuse_forged(whole, ids, offsets)
        if not cuts:
            return ids, [start for start, _ in offsets]
        cut_id, kept, starts, passed = self.backend.token_to_id(CUT), [], [], 0
        for token, (start, _) in zip(ids, offsets, strict=True):
            if token == cut_id:
                passed += 1
            else:
                kept.append(token)
                starts.append(start - passed)
        return kept, starts

    def encode_at(self, text: str, boundaries: Sequence[int]) -> Encoded:
        """Encodes a text so that its ids up to each boundary are those of the text up to there.

        Args:
            text: text with BREAKs.
            boundaries: ascending character positions, a control token between each two.

        Raises:
            ChatError: tokens straddle a boundary and cutting there would change the text.
        """
        ids, starts = self.encode(text)
        firsts = [self._first(text, ids, starts, boundary) for boundary in boundaries]
        bad = [boundary for boundary, first in zip(boundaries, firsts, strict=True) if first is None]
        if bad:
            whole, (ids, starts) = ids, self.encode(text, bad)
            if self.decode(ids) != self.decode(whole):
                answer = text[bad[0] :].replace(BREAK, "")[:20]
                raise ChatError(
                    "tokenizer",
                    f"joins the prompt to the answer {answer!r}, and cutting there would add a space",
                    "choose a template whose generation prompt ends with a control token",
                )
            cut = {boundary: bisect_left(starts, boundary) for boundary in bad}
            firsts = [cut.get(boundary, self._first(text, ids, starts, boundary)) for boundary in boundaries]
        return Encoded(ids, starts, [first for first in firsts if first is not None], len(bad))

    def decode(self, ids: list[int]) -> str:
        """Decodes ids, control tokens included."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def _first(self, text: str, ids: list[int], starts: list[int], boundary: int) -> int | None:
        """Index of the first token after a boundary, or None where the ids before depend on what follows.

        Nothing before the last control token can depend on it, so only the stretch since then is encoded.
        """
        last = bisect_left(starts, boundary) - 1
        while last > 0 and ids[last] not in self.added:
            last -= 1
        last = max(last, 0)
        begin = starts[last] if last else 0
        expected = self._prefix(text[begin:boundary])
        end = last + len(expected)
        return end if ids[last:end] == expected else None

    def _prefix(self, text: str) -> list[int]:
        known = self._prefixes.get(text)
        if known is None:
            known, _ = self.encode(text)
            if len(text) <= _SHORT and len(self._prefixes) < _MANY:
                self._prefixes[text] = known
        return known

    def _refuse_forged(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> None:
        for token, (start, end) in zip(ids, offsets, strict=True):
            if token in self.added and BREAK in text[start:end]:
                raise ChatError(
                    "tokenizer",
                    f"makes the control token {self.added[token]!r} from plain text",
                    "remove this text from the row: the tokenizer cannot write it otherwise",
                )


_ENCODERS: WeakKeyDictionary[PreTrainedTokenizerFast, Encoder] = WeakKeyDictionary()


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    """Returns the tokenizer's encoder, copied once and again whenever tokens were added to it."""
    encoder = _ENCODERS.get(tokenizer)
    size = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=True)
    if encoder is None or encoder.size != size:
        encoder = _ENCODERS[tokenizer] = _copy(tokenizer.backend_tokenizer, size)
    return encoder


def _copy(original: Tokenizer, size: int) -> Encoder:
    spec = json.loads(original.to_str())
    spec |= {"truncation": None, "padding": None, "post_processor": None}
    drop = {"type": "Replace", "pattern": {"String": BREAK}, "content": ""}
    own = spec["normalizer"]
    spec["normalizer"] = drop if own is None else {"type": "Sequence", "normalizers": [drop, own]}
    control = [token for token in spec["added_tokens"] if len(token["content"].strip()) > 1]
    for token in control:
        token["normalized"] = False  # looked for in the text itself, so before BREAKs are dropped
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.add_special_tokens([AddedToken(CUT, special=True, normalized=False)])
    return Encoder(
        backend=backend,
        size=size,
        added={token["id"]: token["content"] for token in control},
        special=frozenset(token["id"] for token in control if token["special"]),
        forbidden=pattern_of([token["content"] for token in control]),
    )


def pattern_of(texts: list[str]) -> re.Pattern[str]:
    """Compiles what finds any of these control texts, the longest first, or what is no character at all."""
    return re.compile("|".join([*map(re.escape, sorted(texts, key=len, reverse=True)), _NO_CHARACTER]))


def break_up(text: str, pattern: re.Pattern[str]) -> str:
    """Writes BREAKs into every control token's text, so that it is encoded as the plain text it is.

    Raises:
        ChatError: the text contains a lone surrogate, or a noncharacter that is kept for this.
    """

    def broken(match: re.Match[str]) -> str:
        if len(match[0]) == 1:
            raise ChatError("text", f"contains U+{ord(match[0]):04X}, which is no character", "remove it")
        return BREAK.join(match[0])

    return pattern.sub(broken, text)
