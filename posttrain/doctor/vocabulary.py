"""Which template a vocabulary fits, which of its tokens are free, and what a new token's row begins as."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from posttrain.chat.encode import encoder_of
from posttrain.chat.jinja import Message, render_text
from posttrain.chat.templates import ChatTemplate, load_template
from posttrain.chat.turns import end_of_turn, required_tokens_missing
from posttrain.doctor.rows import NewRow
from posttrain.errors import ChatError
from posttrain.recipe.bundled import list_bundled

PREFERRED = ("chatml", "llama3", "gemma3", "mistral-v3", "tulu", "zephyr", "plain")
"""Which of several templates that fit equally well is suggested: the plainest of its family."""
_SALAMANDRA = {"<s>": 1, "</s>": 2, "<|im_start|>": 4, "<|im_end|>": 5}
_SPARE = re.compile(r"reserved|unused|placeholder|extra_id|extra_token|control_\d|dummy", re.IGNORECASE)
_NO_WORDS = frozenset({"im", "id"})
_PROBE: list[Message] = [
    {"role": "system", "content": "One"},
    {"role": "user", "content": "Two"},
    {"role": "assistant", "content": "Three"},
    {"role": "user", "content": "Four"},
]


def suggest_template(tokenizer: PreTrainedTokenizerFast, config: dict[str, Any]) -> str:
    """Names the bundled template for a base model: the one that uses most of the tokens its vocabulary has.

    Only templates whose tokens are all there, that keep history and write no date and no text of their own
    are suggested; where several use equally many tokens, PREFERRED decides. Salamandra's vocabulary is known
    by its ids.

    Args:
        config: `config.json`; its `model_type` decides between templates of one vocabulary.

    Returns:
        `plain` where nothing fits, not even that: the tokenizer has no eos_token, which is a defect of its own.
    """
    fitting = [template for template in _plain_templates() if _fits(tokenizer, template)]
    if not fitting:
        return "plain"
    names = [template.name for template in fitting]
    ids = tokenizer.convert_tokens_to_ids(list(_SALAMANDRA))
    if "salamandra" in names and config.get("model_type") == "llama" and ids == list(_SALAMANDRA.values()):
        return "salamandra"
    return min(fitting, key=lambda template: (-_tokens_used(template), _preference(template.name))).name


def _plain_templates() -> list[ChatTemplate]:
    found = [load_template(name, Path()) for name in list_bundled("chat_templates")]
    return [template for template in found if _is_plain(template)]


def _is_plain(template: ChatTemplate) -> bool:
    facts = template.facts
    return facts.marks == "exact" and facts.date in ("none", "unknown") and not facts.default_system


def _tokens_used(template: ChatTemplate) -> int:
    return len([token for token in template.facts.required_tokens if token not in ("bos_token", "eos_token")])


def _preference(name: str) -> tuple[int, str]:
    return (PREFERRED.index(name) if name in PREFERRED else len(PREFERRED), name)


def _fits(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> bool:
    if required_tokens_missing(tokenizer, template):
        return False
    try:
        end_of_turn(tokenizer, template)
    except ChatError:
        return False
    return True


def _rendered(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> str:
    try:
        return render_text(tokenizer, template, _PROBE, add_generation_prompt=True)
    except ChatError:  # some families refuse a system message
        return render_text(tokenizer, template, _PROBE[1:], add_generation_prompt=True)


def spare_tokens(tokenizer: PreTrainedTokenizerFast, template: ChatTemplate) -> list[str]:
    """Lists reserved tokens that nothing uses, by id: they can be renamed, and their rows are there already."""
    roles = {text for text in tokenizer.special_tokens_map.values() if isinstance(text, str)}
    rendered = _rendered(tokenizer, template)
    added = sorted(encoder_of(tokenizer).added.items())
    return [text for _, text in added if _SPARE.search(text) and text not in roles and text not in rendered]


def new_row(tokenizer: PreTrainedTokenizerFast, token: str, ends: Sequence[int], rows: int) -> NewRow:
    """Says what the row of a new token begins as: what its name means.

    The token that ends a turn begins as the old end-of-text token; any other as the mean of the pieces of
    its words (`<start_of_turn>`: start, of, turn; `<|assistant|>`: assistant).

    Args:
        ends: where the token ends a turn, ids that ended texts until now, the best first; else empty.
        rows: rows there were before: only these have values to begin from.
    """
    own = tokenizer.convert_tokens_to_ids(token)
    for end in ends:
        if end != own and 0 <= end < rows:
            return NewRow(token, own, (end,))
    words = [word.lower() for word in re.findall(r"[^\W\d_]+", token)]
    text = " ".join(word for word in words if word not in _NO_WORDS)
    spelled = [tokenizer.backend_tokenizer.encode(start + text, add_special_tokens=False).ids for start in ("", " ")]
    pieces = min(spelled, key=len) if text else []  # most words have a piece of their own only after a space
    added = encoder_of(tokenizer).added
    known = [piece for piece in dict.fromkeys(pieces) if piece < rows and piece not in added and piece != own]
    return NewRow(token, own, tuple(known))


def add_token(spec: dict[str, Any], token: str) -> int:
    """Adds a special token to a parsed `tokenizer.json` and returns the id that the tokenizers library gives it."""
    number = max(len(spec["model"]["vocab"]), 1 + max((entry["id"] for entry in spec["added_tokens"]), default=-1))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec["added_tokens"].append({"id": number, "content": token, **flags})
    return number


def rename_token(spec: dict[str, Any], old: str, new: str) -> int:
    """Renames an added token in a parsed `tokenizer.json`, in its vocabulary as well, and returns its id."""
    entry = next(entry for entry in spec["added_tokens"] if entry["content"] == old)
    entry |= {"content": new, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = spec["model"]["vocab"]
    if isinstance(vocabulary, dict) and old in vocabulary:
        spec["model"]["vocab"] = {new if text == old else text: number for text, number in vocabulary.items()}
    elif isinstance(vocabulary, list):  # Unigram: pieces with their scores, numbered as they stand
        spec["model"]["vocab"] = [[new if piece == old else piece, score] for piece, score in vocabulary]
    return int(entry["id"])
