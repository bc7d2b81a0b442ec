"""Defects of special tokens: pad, eos, end of turn, the tokens a template writes, and how text is encoded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from posttrain.chat.contract import control_tokens
from posttrain.chat.encode import encoder_of
from posttrain.chat.turns import EndOfTurn, end_of_turn, required_tokens_missing
from posttrain.doctor.catalogue import Finding, found
from posttrain.doctor.checkpoint import Checkpoint
from posttrain.doctor.probes import ANSWER, NEXT, SYSTEM, USER, Probes
from posttrain.errors import ChatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_UNICODE = "áéíóúüñ ¿¡ ç l·l € ﬁ ½ № A Ω 漢字 ٱلْعَرَبِيَّة 😀 🏴‍☠️ \t x\n\n  y"
_CONTROL = re.compile(r"<\|[\w.:-]+\|?>|<\w+\|>|<｜[^｜<>]+｜>|<(?:start|end)_of_\w+>|\[/?[A-Z][A-Z_]+\]")
_TAGS = frozenset(["<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "[INST]", "[/INST]"])
_CONFIG = "tokenizer_config.json"


def pad(checkpoint: Checkpoint, end: EndOfTurn | None) -> Iterator[Finding]:
    """Finds a pad token that is absent, ends answers, or is what unknown characters become.

    A stop token that ends no answer (Qwen's `<|endoftext|>`) may pad: masking it hides nothing that is trained.

    Args:
        end: what ends an answer; None where there is no template, and any stop token counts.
    """
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    where, own = f"{_CONFIG}, pad_token", tokenizer.pad_token_id
    if own is None:
        yield found(
            "pad-missing", where, "the tokenizer has none", "name a token that nothing writes; --fix chooses one"
        )
        return
    stops = [tokenizer.eos_token_id] if checkpoint.stops is None else checkpoint.stops
    if own == end.id if end else own in stops:
        cause = f"{tokenizer.pad_token!r} ({own}) also ends generation: what masks padding masks it too"
        yield found("pad-is-eos", where, cause, "name another token; --fix chooses one that nothing writes")
    elif own == tokenizer.unk_token_id and own in encoder_of(tokenizer).encode(_UNICODE)[0]:
        cause = f"{tokenizer.pad_token!r} ({own}) is what characters without a token become"
        yield found("unk-is-pad", where, cause, "name another token; --fix chooses one")


def eos(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Finds a tokenizer without eos token."""
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    if not tokenizer.eos_token:  # transformers takes an empty text for one
        known = [str(tokenizer.convert_ids_to_tokens(token)) for token in checkpoint.stops or []]
        hint = f": config and generation config say {', '.join(known)}" if known else ""
        remedy = f"set it to {known[0]!r}; --fix does" if known else "name the token that ends texts"
        yield found("eos-missing", f"{_CONFIG}, eos_token", f"the tokenizer has none{hint}", remedy)


def template_tokens(probes: Probes) -> Iterator[Finding]:
    """Finds tokens that the template writes and the tokenizer splits into pieces."""
    missing = missing_tokens(probes)
    if missing:
        shown = ", ".join(missing)
        yield found(
            "template-tokens-missing",
            f"template {probes.template.name}",
            f"writes {shown}; the tokenizer has no such token" + ("s" if len(missing) > 1 else ""),
            "choose a template by the tokens there are, or let --fix give it these",
        )


def missing_tokens(probes: Probes) -> list[str]:
    """Lists the control texts that a template writes and the tokenizer does not have as one token each.

    Role tags may be plain text (Zephyr, Tulu, Mistral v1) where the end of turn is a token.
    """
    if probes.bundled:
        missing = required_tokens_missing(probes.tokenizer, probes.template)
        return [text for text in missing if text != "eos_token"]  # eos-missing says that
    texts = [probes.text([USER, ANSWER, NEXT], prompt=True), probes.text([SYSTEM, USER, ANSWER])]
    written = dict.fromkeys(text for rendered in texts for text in _CONTROL.findall(rendered or ""))
    known = set(encoder_of(probes.tokenizer).added.values())
    missing = [text for text in written if text not in known]
    plain_tags = probes.end is not None and not known & _TAGS
    return [text for text in missing if not (plain_tags and text in _TAGS)]


def end_of_answers(checkpoint: Checkpoint, probes: Probes) -> Iterator[Finding]:
    """Finds an end of turn that is no single token, or that does not stop generation."""
    try:
        end = end_of_turn(probes.tokenizer, probes.template)
    except ChatError as error:
        if "only when something follows" in error.found and not probes.bundled:
            cause = error.found
        elif probes.bundled:
            return  # its facts file says so
        else:
            cause = f"closes an answer with {probes.ending!r}, in which there is no token of the tokenizer's own"
        remedy = "choose a template that ends turns with a token, for instance eos_token; --fix does"
        yield found("end-of-turn-not-one-token", f"template {probes.template.name}", cause, remedy)
        return
    if checkpoint.stops is not None and end.id not in checkpoint.stops:
        file = "config.json" if checkpoint.generation is None else "generation_config.json"
        yield found(
            "end-of-turn-not-eos",
            f"{file}, eos_token_id",
            f"{checkpoint.stops} lacks {end.text!r} ({end.id}), which ends an answer: generation goes on after it",
            f"set it to {[end.id, *checkpoint.stops]}; --fix does",
        )


def flags(probes: Probes) -> Iterator[Finding]:
    """Finds tokens of the template that swallow white space beside them, or match text that is not theirs."""
    backend = probes.tokenizer.backend_tokenizer
    written = {token for _, token in control_tokens(probes.tokenizer, probes.template)}
    eats, matches = [], []
    for token, entry in backend.get_added_tokens_decoder().items():
        if token not in written:
            continue
        if entry.lstrip or entry.rstrip:
            eats.append(entry.content)
        elif entry.normalized and backend.normalizer is not None:
            text, loud = entry.content, entry.content.upper()
            normal = backend.normalizer.normalize_str
            if normal(text) != text or (loud != text and normal(loud) == normal(text)):
                matches.append(text)
    remedy = "leave it as the model was trained with it; expect the tokens of such texts to differ"
    if eats:
        cause = f"{', '.join(map(repr, eats))} swallow white space beside them (lstrip, rstrip)"
        yield found("token-flags-eat-text", "tokenizer.json, added_tokens", cause, remedy)
    elif matches:
        cause = f"{', '.join(map(repr, matches))} match normalised text, not their own spelling"
        yield found("token-flags-eat-text", "tokenizer.json, added_tokens", cause, remedy)


def text(tokenizer: PreTrainedTokenizerFast) -> Iterator[Finding]:
    """Finds texts that are others when encoded and decoded."""
    encoder = encoder_of(tokenizer)

    def back(text: str) -> str:
        return encoder.decode(encoder.encode(text)[0])

    words = [word for word in _UNICODE.split() if back(word).strip() != word]
    if words:
        cause = f"{', '.join(words)} do not survive: {words[0]!r} comes back as {back(words[0])!r}"
    elif back(_UNICODE).removeprefix(" ") != _UNICODE:
        cause = f"white space does not survive: {_UNICODE[-10:]!r} comes back as {back(_UNICODE)[-10:]!r}"
    else:
        return
    yield found("tokenizer-changes-text", "tokenizer", cause, "bring your data into the form that survives")


def prefix_space(probes: Probes) -> Iterator[Finding]:
    """Finds a space that nobody wrote after a special token."""
    encoder = encoder_of(probes.tokenizer)
    for token, _ in control_tokens(probes.tokenizer, probes.template)[:1]:
        first, *rest = encoder.encode(f"{token}a")[0]
        piece = str(probes.tokenizer.convert_ids_to_tokens(rest[0])) if rest else ""
        if encoder.added.get(first) == token and piece[:1] in ("▁", "Ġ"):
            cause = f"{token + 'a'!r} becomes {token!r} and {piece!r}, with a space"
            yield found("prefix-space", "tokenizer.json", cause, "leave it as the model was trained with it")
