"""What a checkpoint's tokenizer and template do, measured: for people and for `--json`."""

from __future__ import annotations

from typing import Any

from posttrain.chat.encode import encoder_of
from posttrain.doctor.behaviour import default_system, history_kind, missing_tools
from posttrain.doctor.checkpoint import Checkpoint
from posttrain.doctor.probes import ANSWER, REASON, SYSTEM, USER, Probes

_THOUGHT = {**ANSWER, "reasoning_content": REASON}
_SPACED = {"role": "user", "content": "\n  Sentinelone\n  "}


def profile_of(checkpoint: Checkpoint, probes: Probes | None) -> dict[str, Any]:
    """Describes sizes and special tokens, and the template where there is one that renders.

    Returns:
        JSON values: `rows` and `tokens` (counts), `stop_tokens` (texts of what ends generation, None where nothing
        says it), `bos_token`, `eos_token`, `pad_token` (texts), `plain_begins_with_bos`, and `template` (None or
        name, family, digest, end_of_turn, begins_with_bos, system, default_system, tools, thinking, history, trims).
    """
    tokenizer = checkpoint.tokenizer
    profile: dict[str, Any] = {"rows": checkpoint.rows, "tokens": None, "stop_tokens": None, "template": None}
    if tokenizer is None:
        return profile
    size, stops, bos = len(tokenizer), checkpoint.stops, tokenizer.bos_token_id
    begins = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
    profile |= {
        "tokens": size,
        "stop_tokens": None if stops is None else [_spelled(tokenizer, token) for token in stops],
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "plain_begins_with_bos": begins,
    }
    if probes is not None:
        profile["template"] = _template(probes)
    return profile


def _template(probes: Probes) -> dict[str, Any]:
    template, end = probes.template, probes.end
    text, bos = probes.text([USER]) or "", probes.tokenizer.bos_token_id
    return {
        "name": template.name,
        "family": template.facts.family,
        "digest": template.digest,
        "end_of_turn": None if end is None else {"text": end.text, "id": end.id},
        "begins_with_bos": bos is not None and probes.ids(text)[:1] == [bos],
        "system": _system(probes),
        "default_system": default_system(probes) or None,
        "tools": not missing_tools(probes),
        "thinking": probes.has(REASON, [USER, _THOUGHT]),
        "history": "kept" if history_kind(probes) == "kept" else "rewritten",
        "trims": not probes.has(_SPACED["content"], [_SPACED]),
    }


def _system(probes: Probes) -> str:
    """How a system message is written: `own turn`, `in the user's turn`, `refused` or `dropped`."""
    text = probes.text([SYSTEM, USER], prompt=True)
    if text is None:
        return "refused"
    before, found, after = text.partition(SYSTEM["content"])
    if not found:
        return "dropped"
    between = after.partition(USER["content"])[0] if USER["content"] in after else before
    added = encoder_of(probes.tokenizer).added
    tagged = any(token in added for token in probes.ids(between)) or any(letter.isalpha() for letter in between)
    return "own turn" if tagged else "in the user's turn"


def _spelled(tokenizer: Any, token: int) -> str:
    text = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    return f"{text} ({token})" if text is not None else f"id {token}"
