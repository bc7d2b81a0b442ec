"""Defects of how texts and conversations begin and end: BOS and EOS that are absent, doubled or appended."""

from __future__ import annotations

from collections.abc import Iterator

from posttrain.doctor.catalogue import Finding, found
from posttrain.doctor.checkpoint import Checkpoint
from posttrain.doctor.probes import USER, Probes

_NEED_BOS = ("llama", "llama4_text", "mistral", "mixtral", "ministral")
_GEMMA = "gemma"
_CONFIG = "tokenizer_config.json"


def plain_texts(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Finds what the tokenizer does to a plain text against what its files say."""
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    begins, ids = _plain_begins(checkpoint), tokenizer("x")["input_ids"]
    flag = checkpoint.tokenizer_config.get("add_bos_token")
    if isinstance(flag, bool) and flag != begins and checkpoint.tokenizer_head:
        does = "begin" if begins else "do not begin"
        yield found(
            "bos-flag-lies",
            f"{_CONFIG}, add_bos_token",
            f"says {str(flag).lower()}, but texts {does} with BOS: transformers 5 goes by tokenizer.json",
            f"set it to {str(begins).lower()}; --fix does",
        )
    if tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id]:
        cause = f"every text ends with {tokenizer.eos_token!r}, prompts too"
        remedy = "take it out of the post-processor; --fix does"
        yield found("eos-appended", "tokenizer.json, post_processor", cause, remedy)


def conversations(checkpoint: Checkpoint, probes: Probes) -> Iterator[Finding]:
    """Finds conversations that begin with two BOS, or with none where one is needed."""
    text = probes.text([USER]) or ""
    bos, ids = probes.tokenizer.bos_token_id, probes.ids(text)
    where = f"template {probes.template.name}"
    writes = bos is not None and ids[:1] == [bos]
    if writes and ids[:2] == [bos, bos]:
        remedy = "remove one of them from the template; --fix does"
        yield found("bos-doubled", where, f"a conversation begins with {probes.bos!r} twice", remedy)
    if writes:
        return
    family = str(checkpoint.config.get("model_type", ""))
    plain = _plain_begins(checkpoint)
    todo = "begin the template with {{ bos_token }}; --fix does"
    if family.startswith(_GEMMA):
        cause = f"{family} models need BOS, and the template does not write it"
        yield found("bos-missing", where, cause, todo)
    elif plain:
        cause = f"plain texts begin with {probes.bos!r}, a conversation does not"
        yield found("bos-not-in-template", where, cause, f"{todo}, unless the model was trained without")
    elif family in _NEED_BOS and bos is not None and bos != probes.tokenizer.eos_token_id:
        cause = f"{family} models begin with {probes.bos!r}; neither the tokenizer nor the template writes it"
        yield found("bos-missing", where, cause, f"{todo}, unless the model was trained without")


def _plain_begins(checkpoint: Checkpoint) -> bool:
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
