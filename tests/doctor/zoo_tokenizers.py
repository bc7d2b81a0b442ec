"""Tiny tokenizers of the kinds that checkpoints come with, as the JSON of a `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

Spec = dict[str, Any]

TEXTS = [
    "What is the capital of Spain? The capital is Madrid, and many people live there.",
    "Zer da Euskadi? Herri bat da, eta bertan euskaraz hitz egiten da.",
    "¿Qué es Cataluña? Una comunidad autónoma. Que é Galicia? Unha terra con moita choiva.",
    "The user asks, the assistant answers, and the system says how to answer.",
] * 10
_WORDS = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PIECES = 120


def byte_level(special: Sequence[str]) -> Spec:
    """Byte-level BPE as in Qwen, Llama-3 and OLMo-2: 256 bytes, pieces, then the special tokens."""
    return json.loads(_byte_level(tuple(special)))


@lru_cache
def _byte_level(special: tuple[str, ...]) -> str:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + _PIECES, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return backend.to_str()


def sentencepiece(special: Sequence[str], byte_fallback: bool = True) -> Spec:
    """BPE in SentencePiece's manner, as in Llama-2, Mistral, Gemma and Salamandra: the special tokens come first.

    White space is `▁`, written before the first word of a text only; what has no piece is spelled in bytes.
    """
    return json.loads(_sentencepiece(tuple(special), byte_fallback))


@lru_cache
def _sentencepiece(special: tuple[str, ...], byte_fallback: bool) -> str:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    trainer = trainers.BpeTrainer(vocab_size=_PIECES + 80, special_tokens=list(special), show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    spec = json.loads(backend.to_str())
    if byte_fallback:
        pieces = [piece for piece in spec["model"]["vocab"] if piece not in special]
        byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        spec["model"]["vocab"] = {piece: id for id, piece in enumerate([*special, *byte_pieces, *pieces])}
        spec["model"] |= {"byte_fallback": True, "fuse_unk": True}
    return json.dumps(spec)


def token_id(spec: Spec, token: str) -> int:
    """Id of an added token or a piece; KeyError when there is none."""
    added = {entry["content"]: entry["id"] for entry in spec["added_tokens"]}
    return added[token] if token in added else spec["model"]["vocab"][token]


def token_count(spec: Spec) -> int:
    """How many rows the tokens need."""
    return 1 + max(*spec["model"]["vocab"].values(), *(entry["id"] for entry in spec["added_tokens"]))


def add_token(spec: Spec, token: str, **flags: bool) -> int:
    """Adds a special token after all others and returns its id."""
    new = token_count(spec)
    entry = {"id": new, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
    spec["added_tokens"].append(entry | {"normalized": False, "special": True} | flags)
    return new


def surround(spec: Spec, before: Sequence[str] = (), after: Sequence[str] = ()) -> None:
    """Makes the post-processor write special tokens around every text (BOS before it, as a rule)."""
    a, b = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    first = [{"SpecialToken": {"id": token, "type_id": 0}} for token in before]
    last = [{"SpecialToken": {"id": token, "type_id": 0}} for token in after]
    used = {token: {"id": token, "ids": [token_id(spec, token)], "tokens": [token]} for token in [*before, *after]}
    post = {"type": "TemplateProcessing", "single": [*first, a, *last], "pair": [*first, a, b, *last]}
    spec["post_processor"] = post | {"special_tokens": used}
