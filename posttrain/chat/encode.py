"""Text to token ids, such that a prompt's ids begin every row that begins with the prompt.

Every tokenizer is encoded through one private copy of its backend. The copy differs in three ways, none
of which changes the ids of ordinary text: offsets are not trimmed (no post-processor), a BREAK inside a
text is dropped after added tokens have been looked for and before anything else, and a CUT separates
what stands on its two sides as a special token would, and is dropped from the ids.

So a control token's text becomes ordinary text by writing BREAKs into it, and is then tokenised as any
other punctuation.

Nothing before a control token can depend on what follows it, nor the other way round. So a text is
encoded piece by piece, each from one control token up to the next: time is linear in the text, boundaries
are looked for in one piece, and what templates write again and again is encoded once.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from posttrain.errors import ChatError

BREAK, CUT = "\ufdd0", "\ufdd1"  # Unicode noncharacters: no text may contain them
_NO_CHARACTER = f"[{BREAK}{CUT}\ud800-\udfff]"
_SHORT, _MANY = 128, 4096
"""Characters of a piece that is remembered, and how many are."""


@dataclass(frozen=True)
class Encoded:
    """Ids of a text, and where its boundaries fell."""

    ids: list[int]
    starts: list[int]
    """First character of each piece, in the text with its BREAKs: the beginning, and every control token."""
    places: list[int]
    """Index of each piece's first token."""
    firsts: list[int]
    """For each boundary, the index of the first token after it."""
    straddled: int
    """Boundaries that no token boundary met; the text was cut there."""


@dataclass
class Encoder:
    """The private copy of one tokenizer's backend, and what is remembered about it."""

    backend: Tokenizer
    next_id: int
    """Id that the next token to be added to the original gets: CUT has it here."""
    next_token: str | None
    """What the original had there when it was copied: nothing."""
    added: dict[int, str]
    """Control tokens: the added tokens, but for white space and single characters."""
    special: frozenset[int]
    control: re.Pattern[str]
    """Finds a control token's text (longest first)."""
    forbidden: re.Pattern[str]
    """Finds a control token's text (longest first), or what is no character."""
    apart: bool
    """Whether every control token is found wherever its text stands, and takes no white space before it."""
    remembered: dict[Any, Any] = field(default_factory=dict)
    """Small facts that other modules derive from the tokenizer, each computed once."""
    _pieces: dict[str, list[int]] = field(default_factory=dict)
    _expected: dict[str, list[int]] = field(default_factory=dict)
    """Pieces of the texts that are about to be encoded."""

    def expect(self, texts: Sequence[tuple[str, Sequence[int]]]) -> None:
        """Encodes the pieces of texts, given with their boundaries, together; `encode_at` finds them.

        Ids are the same without it. On several cores it is much faster, on one somewhat.
        """
        wanted: dict[str, None] = {}
        for text, boundaries in texts if self.apart else ():
            starts = self._starts(text)
            wanted |= dict.fromkeys(text[begin:stop] for begin, stop in pairwise([*starts, len(text)]))
            for boundary in boundaries:
                begin = starts[max(bisect_left(starts, boundary) - 1, 0)]
                wanted[text[begin:boundary]] = None
        pieces = [piece for piece in wanted if piece not in self._pieces and BREAK not in piece]
        found = self.backend.encode_batch_fast(pieces, add_special_tokens=False)
        self._expected = {piece: encoding.ids for piece, encoding in zip(pieces, found, strict=True)}

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
        kept, starts, passed = [], [], 0
        for token, (start, _) in zip(ids, offsets, strict=True):
            if token == self.next_id:
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
        ids, starts, places = self._by_pieces(text) if self.apart else self._whole(text)
        firsts = [self._first(text, ids, starts, places, boundary) for boundary in boundaries]
        bad = [boundary for boundary, first in zip(boundaries, firsts, strict=True) if first is None]
        if bad:
            whole, (ids, every) = ids, self.encode(text, bad)
            if self.decode(ids) != self.decode(whole):
                answer = text[bad[0] :].replace(BREAK, "")[:20]
                raise ChatError(
                    "tokenizer",
                    f"joins the prompt to the answer {answer!r}, and cutting there would add a space",
                    "choose a template whose generation prompt ends with a control token",
                )
            starts, places = self._control(ids, every)
            cut = {boundary: bisect_left(every, boundary) for boundary in bad}
            firsts = [cut.get(boundary, self._first(text, ids, starts, places, boundary)) for boundary in boundaries]
        return Encoded(ids, starts, places, [first for first in firsts if first is not None], len(bad))

    def decode(self, ids: list[int]) -> str:
        """Decodes ids, control tokens included."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def _by_pieces(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Ids of a text, and where its pieces start in the text and in the ids."""
        starts = self._starts(text)
        ids: list[int] = []
        places = []
        for begin, stop in pairwise([*starts, len(text)]):
            places.append(len(ids))
            ids += self._piece(text[begin:stop])
        return ids, starts, places

    def _starts(self, text: str) -> list[int]:
        starts = [match.start() for match in self.control.finditer(text)]
        return starts if starts and starts[0] == 0 else [0, *starts]

    def _whole(self, text: str) -> tuple[list[int], list[int], list[int]]:
        ids, every = self.encode(text)
        return ids, *self._control(ids, every)

    def _control(self, ids: list[int], starts: list[int]) -> tuple[list[int], list[int]]:
        """Of all first characters those of the first token and of control tokens, and where these stand."""
        places = [place for place, token in enumerate(ids) if place == 0 or token in self.added]
        return [starts[place] for place in places], places

    def _first(self, text: str, ids: list[int], starts: list[int], places: list[int], boundary: int) -> int | None:
        """Index of the first token after a boundary, or None where the ids before depend on what follows."""
        piece = max(bisect_left(starts, boundary) - 1, 0)
        begin, place = (starts[piece], places[piece]) if piece else (0, 0)
        expected = self._piece(text[begin:boundary])
        end = place + len(expected)
        return end if ids[place:end] == expected else None

    def _piece(self, text: str) -> list[int]:
        """Ids of a text; not to be changed."""
        known = self._pieces.get(text) or self._expected.get(text)
        if known is None:
            known = self.encode(text)[0] if BREAK in text else self.backend.encode(text, add_special_tokens=False).ids
            if len(text) <= _SHORT:
                if len(self._pieces) >= _MANY:
                    self._pieces.clear()
                self._pieces[text] = known
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
    encoder, original = _ENCODERS.get(tokenizer), tokenizer.backend_tokenizer
    if encoder is None or original.id_to_token(encoder.next_id) != encoder.next_token:
        encoder = _ENCODERS[tokenizer] = _copy(original)
    return encoder


def _copy(original: Tokenizer) -> Encoder:
    head, model = original.to_str().split(',"model":', 1)  # the model, by far the largest part, comes last
    spec = json.loads(head + "}")
    spec |= {"truncation": None, "padding": None, "post_processor": None}
    drop = {"type": "Replace", "pattern": {"String": BREAK}, "content": ""}
    own = spec["normalizer"]
    spec["normalizer"] = drop if own is None else {"type": "Sequence", "normalizers": [drop, own]}
    control = [token for token in spec["added_tokens"] if len(token["content"].strip()) > 1]
    for token in control:
        token["normalized"] = False  # looked for in the text itself, so before BREAKs are dropped
    backend = Tokenizer.from_str(f'{json.dumps(spec)[:-1]},"model":{model}')
    backend.add_special_tokens([AddedToken(CUT, special=True, normalized=False)])
    next_id = backend.token_to_id(CUT) or 0
    return Encoder(
        backend=backend,
        next_id=next_id,
        next_token=original.id_to_token(next_id),
        added={token["id"]: token["content"] for token in control},
        special=frozenset(token["id"] for token in control if token["special"]),
        control=re.compile(_longest_first([token["content"] for token in control])),
        forbidden=pattern_of([token["content"] for token in control]),
        apart=not any(
            token["lstrip"] or token["single_word"] or token["content"] != token["content"].strip() for token in control
        ),
    )


def pattern_of(texts: list[str]) -> re.Pattern[str]:
    """Compiles what finds any of these control texts, the longest first, or what is no character at all.

    A look ahead at the first character keeps hundreds of texts from being tried at every place.
    """
    firsts = "".join(map(re.escape, sorted({text[0] for text in texts})))
    return re.compile(f"(?=[{firsts}{_NO_CHARACTER[1:-1]}])(?:(?:{_longest_first(texts)})|{_NO_CHARACTER})")


def _longest_first(texts: list[str]) -> str:
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"


def break_up(text: str, pattern: re.Pattern[str]) -> str:
    """Writes BREAKs into every control token's text, so that it is encoded as the plain text it is.

    Raises:
        ChatError: the text contains a lone surrogate, or a noncharacter that is kept for this.
    """
    breaks: set[int] = set()
    match = pattern.search(text)
    while match is not None:
        if len(match[0]) == 1:
            raise ChatError("text", f"contains U+{ord(match[0]):04X}, which is no character", "remove it")
        breaks.update(range(match.start() + 1, match.end()))
        match = pattern.search(text, match.start() + 1)  # another token may begin inside this one
    if not breaks:
        return text
    return "".join([BREAK + character if at in breaks else character for at, character in enumerate(text)])
