"""Defects of sizes: tokens against embedding rows, lengths, tied matrices."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from posttrain.doctor.catalogue import Finding, found
from posttrain.doctor.checkpoint import Checkpoint, listed, read_rows

_LONGEST, _SHORTEST = 10**9, 1024
_COMPARED = 512
"""Rows of two matrices that are compared; spread evenly."""
_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


def sizes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Finds tied matrices that differ and lengths that are none; nothing in a folder without a model."""
    if checkpoint.has_model:
        yield from _tied(checkpoint)
        yield from _max_length(checkpoint)


def rows(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Finds ids >= rows. What the settings name is one defect, what only the vocabulary holds the other."""
    rows = checkpoint.rows
    if rows is None or not checkpoint.has_model:
        return
    named = _named_ids(checkpoint)
    outside = {token: text for text, token in checkpoint.vocabulary.items() if token >= rows}
    if outside.keys() - named.keys():
        most = max(outside)
        yield found(
            "rows-fewer-than-tokens",
            f"embedding, {rows} rows",
            f"{len(outside)} tokens have no row, the last is {outside[most]!r} ({most})",
            f"add rows up to {most + 1} and train those of tokens in use; --fix adds them",
        )
        named = {token: where for token, where in named.items() if token not in outside}
    for token, where in named.items():
        if not 0 <= token < rows:
            remedy = "name a token that has a row, as --fix does"
            yield found("id-out-of-range", where, f"id {token}, but the embedding has rows 0 to {rows - 1}", remedy)
            return


def _named_ids(checkpoint: Checkpoint) -> dict[int, str]:
    """Ids that settings give to special tokens, and the first place that names each."""
    named: dict[int, str] = {}
    for file, settings in (("generation_config.json", checkpoint.generation), ("config.json", checkpoint.text_config)):
        for name in _NAMES:
            for token in listed((settings or {}).get(name)):
                named.setdefault(token, f"{file}, {name}")
    tokenizer = checkpoint.tokenizer
    if tokenizer is not None:
        for name, text in tokenizer.special_tokens_map.items():
            if isinstance(text, str) and text in checkpoint.vocabulary:
                named.setdefault(checkpoint.vocabulary[text], f"tokenizer, {name} {text!r}")
    return named


def _tied(checkpoint: Checkpoint) -> Iterator[Finding]:
    embedding, head = checkpoint.embedding(), checkpoint.head()
    if not checkpoint.tied or embedding is None or head is None or not (embedding.readable and head.readable):
        return
    remedy = "set tie_word_embeddings to false, as --fix does, or remove the stale matrix"
    if embedding.shape != head.shape:
        cause = f"{embedding.name} is {list(embedding.shape)}, {head.name} {list(head.shape)}"
        yield found("tied-weights-differ", "config.json, tie_word_embeddings", cause, remedy)
        return
    ids = np.unique(np.linspace(0, embedding.shape[0] - 1, _COMPARED).astype(int)).tolist()
    one, other = read_rows(embedding, ids), read_rows(head, ids)
    differ = int((one != other).any(axis=1).sum())
    if differ:
        cause = f"true, but {differ} of {len(ids)} compared rows of {embedding.name} and {head.name} differ"
        yield found("tied-weights-differ", "config.json, tie_word_embeddings", cause, remedy)


def _max_length(checkpoint: Checkpoint) -> Iterator[Finding]:
    positions = checkpoint.text_config.get("max_position_embeddings")
    if checkpoint.tokenizer is None or not isinstance(positions, int):
        return
    length = checkpoint.tokenizer.model_max_length
    if length > _LONGEST or length < min(positions, _SHORTEST):
        said = "not set" if length > _LONGEST else str(length)
        yield found(
            "max-length-unset",
            "tokenizer_config.json, model_max_length",
            f"{said}, while the model has {positions} positions",
            f"set it to {positions}; --fix does",
        )
