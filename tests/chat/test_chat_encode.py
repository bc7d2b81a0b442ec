"""Encoding piece by piece gives the ids of the whole, for every kind of tokenizer."""

from __future__ import annotations

import pytest
from chat_tiny import LLAMA3, SPECIAL, make_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.chat.encode import break_up, encoder_of
from posttrain.chat.tokenizer import load_any_tokenizer

WORDS = [
    "Madrid",
    " Zer da",
    "\n",
    "\n\n",
    "  ",
    "é",
    "e\u0301",
    "😀",
    "漢",
    "<|",
    "|>",
    "\t",
    "a b",
    "</",
    "1234",
    "\u00a0",
    " x\n ",
]


def spm_like(scheme: str) -> PreTrainedTokenizerFast:
    """Pieces with a prefix space, written by the normalizer or by the pre-tokenizer."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "a", "Ma", "M", "▁▁", "e", "▁Ma"]
    vocabulary = {text: number for number, text in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "▁"), ("M", "a"), ("▁", "Ma")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    if scheme == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def flagged(**flags) -> PreTrainedTokenizerFast:
    """As phi-3 and others: role tokens that eat white space on one side."""
    made = make_tokenizer(SPECIAL, eos_token="</s>")
    made.add_tokens([AddedToken("<|user|>", normalized=False, special=True, **flags)])
    made.add_tokens([AddedToken("  ", normalized=True), AddedToken("\t", normalized=False)])
    return made


TOKENIZERS = {
    "bytes": make_tokenizer([*SPECIAL, *LLAMA3], ("<think>",), bos_token="<s>", eos_token="</s>"),
    "gpt2 words": make_tokenizer(SPECIAL, words=None, eos_token="</s>"),
    "eats after": flagged(rstrip=True),
    "eats before": flagged(lstrip=True),
    "whole words": flagged(single_word=True),
    **{scheme: spm_like(scheme) for scheme in ("first", "always", "normalizer")},
}
for scheme in ("first", "always", "normalizer"):
    TOKENIZERS[scheme].add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})


def check(tokenizer: PreTrainedTokenizerFast, parts: list[str]) -> None:
    encoder = encoder_of(tokenizer)
    text = "".join(parts)
    whole = encoder.encode(text)[0]
    encoded = encoder.encode_at(text, [])
    assert encoded.ids == whole
    assert [encoded.ids[place] for place in encoded.places[1:]] == [t for t in whole[1:] if t in encoder.added]
    safe = break_up(text, encoder.forbidden)
    assert encoder.encode_at(safe, []).ids == encoder.encode(safe)[0]
    assert not [token for token in encoder.encode_at(safe, []).ids if token in encoder.added]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_make_the_whole(name):
    tokenizer = TOKENIZERS[name]
    parts = st.lists(st.sampled_from([*WORDS, *encoder_of(tokenizer).added.values()]), max_size=12)

    @settings(max_examples=120, deadline=None)
    @given(parts)
    def pieces(texts):
        check(tokenizer, texts)

    pieces()
    assert encoder_of(tokenizer).apart == (name not in ("eats before", "whole words"))


@pytest.mark.parametrize("folder", ["mistral03", "olmo2", "phi-2", "phi-3-mini", "qwen2"])
def test_pieces_make_the_whole_of_real_tokenizers(shared_dir, folder):
    tokenizer = load_any_tokenizer(shared_dir / "tokenizers" / folder)
    parts = st.lists(st.sampled_from([*WORDS, *list(encoder_of(tokenizer).added.values())[:40]]), max_size=10)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(parts)
    def pieces(texts):
        check(tokenizer, texts)

    pieces()


def test_hundreds_of_control_tokens_are_found_like_few():
    tokenizer = make_tokenizer(SPECIAL, eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|reserved_{n}|>" for n in range(300)]})
    pattern = encoder_of(tokenizer).forbidden
    assert pattern.search("plain <| text") is None
    assert [match[0] for match in pattern.finditer("a<|reserved_29|>b<s>\ufdd0<|reserved_2|>")] == [
        "<|reserved_29|>", "<s>", "\ufdd0", "<|reserved_2|>",
    ]  # fmt: skip


def test_texts_that_are_expected_are_encoded_the_same():
    encoder = encoder_of(make_tokenizer([*SPECIAL, *LLAMA3], ("<think>",), bos_token="<s>", eos_token="</s>"))
    texts = [f"<s>a{number}<|im_start|>b\nMadrid " + "x" * number * 40 + "</s>" for number in range(8)]
    boundaries = [[text.index("Madrid")] for text in texts]
    alone = [encoder.encode_at(text, at) for text, at in zip(texts, boundaries, strict=True)]
    encoder._pieces.clear()
    encoder.expect(list(zip(texts, boundaries, strict=True)))
    assert encoder._expected
    assert [encoder.encode_at(text, at) for text, at in zip(texts, boundaries, strict=True)] == alone
    encoder.expect([])
    assert not encoder._expected


def test_what_is_remembered_stays_small():
    encoder = encoder_of(TOKENIZERS["bytes"])
    for number in range(5000):
        encoder.encode_at(f"row {number}", [])
    assert len(encoder._pieces) <= 4096
