"""The view of rows token by token: nothing lost, nothing hidden, nothing executed."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from posttrain.report.token_view import (
    PARTIAL,
    ShownPart,
    ShownRow,
    ShownStage,
    ShownToken,
    show_tokens,
    token_page,
    token_text,
    visible,
)

CONTROL = {0: "<|im_start|>", 1: "<|im_end|>"}


def byte_tokenizer() -> Tokenizer:
    """Every byte a token, so that most characters are several."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=list(CONTROL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([], trainer)
    return backend


def spm_tokenizer() -> Tokenizer:
    """Pieces with ▁, whose decoder drops the first space."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=60,
        special_tokens=[*CONTROL.values(), *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=["▁", *"abcde"],
        show_progress=False,
    )
    backend.train_from_iterator(["a b c d e abc"], trainer)
    return backend


BYTES, SPM = byte_tokenizer(), spm_tokenizer()


def tokens_of(backend: Tokenizer, text: str) -> tuple[ShownToken, ...]:
    ids = backend.encode(text, add_special_tokens=False).ids
    return show_tokens(ids, [True] * len(ids), lambda some: backend.decode(some, skip_special_tokens=False), CONTROL)


def stage(*tokens: ShownToken, truncated: int = 0) -> ShownStage:
    return ShownStage("sft", "a note", (ShownRow("rows.jsonl:7", (ShownPart("", tokens),), truncated),))


def plain_tokens(text: str, trained: str) -> tuple[ShownToken, ...]:
    """One token per character; `trained` has a 1 for each that is."""
    return tuple(ShownToken(ord(char), char, mark == "1", False) for char, mark in zip(text, trained, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters=PARTIAL), max_size=12))
def test_the_texts_of_the_tokens_are_the_text(text):
    assert "".join(token.text for token in tokens_of(BYTES, text)).replace(PARTIAL, "") == text


def test_a_character_of_several_tokens_is_shown_by_the_last():
    assert [token.text for token in tokens_of(BYTES, "a😀é")] == ["a", PARTIAL, PARTIAL, PARTIAL, "😀", PARTIAL, "é"]


def test_spaces_that_a_decoder_drops_alone_are_shown():
    ids = [SPM.token_to_id(piece) for piece in ("<|im_start|>", "a", "▁", "▁b")]
    if None in ids:
        ids = SPM.encode("<|im_start|>a b b", add_special_tokens=False).ids
    shown = show_tokens(ids, [False] * len(ids), lambda some: SPM.decode(some, skip_special_tokens=False), CONTROL)
    assert shown[0] == ShownToken(0, "<|im_start|>", False, True)
    assert "".join(token.text for token in shown[1:]).count(" ") >= 2


def test_ids_that_are_no_text_at_all_do_not_stop_it():
    broken = [BYTES.token_to_id("ÿ")] * 20
    shown = show_tokens(broken, [True] * 20, lambda some: BYTES.decode(some), CONTROL)
    assert len(shown) == 20
    assert set("".join(token.text for token in shown)) == {PARTIAL}


def test_every_sign():
    assert visible(" a\tb\r\n") == "␣a⇥b␍↵\n"
    assert visible("col·lecció") == "col·lecció"
    assert visible("") == "∅"
    assert visible("\u0301") == "◌\u0301"
    assert visible("\u200b\u202e\u00a0\u2028") == "‹U+200B›‹U+202E›‹U+00A0›‹U+2028›"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_nothing_in_a_row_can_steer_a_terminal(text):
    lines = token_text([stage(*plain_tokens(text, "1" * len(text)))], colour=False)
    assert not set(lines) & {chr(code) for code in (*range(10), *range(11, 32), *range(127, 160), 0x202E, 0x2066)}


def test_without_colour_brackets_hold_what_is_trained():
    tokens = (*plain_tokens("Q: A", "0001"), ShownToken(1, "<|im_end|>", True, True), *plain_tokens("\n", "0"))
    assert token_text([stage(*tokens)], colour=False).splitlines()[2:] == [
        "sft: a note",
        "",
        "sft, row 1 · rows.jsonl:7 · 6 tokens: 2 trained, 4 masked",
        "Q│:│␣⟦A│«<|im_end|>»⟧↵",
        "",
    ]


def test_in_colour_trained_tokens_are_green_and_masked_ones_dim():
    tokens = (*plain_tokens("QA", "01"), ShownToken(1, "<|im_end|>", True, True))
    last = token_text([stage(*tokens)], colour=True).splitlines()[-1]
    assert last == ("\x1b[2mQ\x1b[0m\x1b[2m│\x1b[0m\x1b[32mA\x1b[0m\x1b[2m│\x1b[0m\x1b[32m\x1b[1m«<|im_end|>»\x1b[0m")
    assert re.sub(r"\x1b\[\d+m", "", last) == "Q│A│«<|im_end|>»"


def test_what_was_cut_and_the_parts_of_a_pair_are_named():
    prompt, answer = plain_tokens("Q", "0"), plain_tokens("AB", "11")
    row = ShownRow("p.jsonl:1", (ShownPart("prompt", prompt), ShownPart("chosen", answer)), truncated=5)
    lines = token_text([ShownStage("dpo", "a note", (row,))], colour=False)
    assert "3 tokens: 2 trained, 1 masked; 5 more were cut off at max_length\nprompt:\nQ\nchosen:\n⟦A│B⟧" in lines


class Page(HTMLParser):
    """Collects tags, and the class, title and text of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.tokens: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        if tag == "span" and "title" in found:
            self.inside = True
            self.tokens.append([found["class"], found["title"], ""])

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "span"

    def handle_data(self, data):
        if self.inside:
            self.tokens[-1][2] += data


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("<>&\"'/ \nscriptonload=!--ñ\u202e"), max_size=30))
def test_the_page_is_escaped_and_whole(text):
    tokens = (ShownToken(7, text, True, False), ShownToken(1, "<|im_end|>", False, True))
    page = Page()
    page.feed(token_page(f"recipe {text}", [ShownStage(text, text, stage(*tokens).rows)]))
    assert page.tags == {"html", "head", "meta", "title", "style", "body", "p", "div", "span", "i", *("h1", "h2", "h3")}
    (kind, about, shown), end = page.tokens
    assert (kind, shown) == ("t", visible(text))
    assert about == f"id 7: {visible(text).strip()} (trained)"
    assert end == ["m c", "id 1: <|im_end|> (masked)", "<|im_end|>"]


@pytest.mark.parametrize("word", ["<script", "http", "url(", "@import"])
def test_the_page_needs_nothing_else(word):
    assert word not in token_page("t", [stage(*plain_tokens("ab", "01"))]).replace("http-equiv", "")
