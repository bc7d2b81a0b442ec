"""Defects of single rows: tokens of the template that nobody trained."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from posttrain.chat.contract import control_tokens
from posttrain.doctor.catalogue import Finding, found
from posttrain.doctor.checkpoint import Checkpoint, TensorPlace, read_rows
from posttrain.doctor.probes import Probes

ZERO, SMALL, MEAN = 1e-16, 0.2, 0.99
"""Largest entry of a row of zeros; share of the usual length that is too short; cosine to the mean row that is
too near (rows that `resize_token_embeddings` makes are the mean and a trifle)."""
_SAMPLE, _SEED = 512, 7


def token_rows(checkpoint: Checkpoint, probes: Probes) -> Iterator[Finding]:
    """Finds rows of the template's tokens that look untrained, in the embedding and in an output matrix of its own.

    Of the output matrix only what ends an answer is judged by its looks: tokens that are never predicted
    may have any row there, but none of zeros, which would win over what was trained down.
    """
    written = control_tokens(probes.tokenizer, probes.template)
    end = probes.end
    bad: dict[str, str] = {}
    for place in (checkpoint.embedding(), None if checkpoint.tied else checkpoint.head()):
        if place is None or not place.readable:
            continue
        judged = [(text, token) for text, token in written if token < place.shape[0]]
        looks = None if place == checkpoint.embedding() else {end.id if end else -1}
        for text, why in untrained(place, judged, looks, _in_use(checkpoint, place)).items():
            bad.setdefault(text, f"{why} in {place.name}")
    if bad:
        shown = "; ".join(f"{text!r} {why}" for text, why in bad.items())
        remedy = "train these rows (method trainable_tokens: auto); --fix gives them values to begin with"
        yield found("token-row-untrained", ", ".join(bad), shown, remedy)


def untrained(place: TensorPlace, tokens: list[tuple[str, int]], looks: set[int] | None, in_use: int) -> dict[str, str]:
    """Returns token -> why its row looks untrained.

    Args:
        place: the matrix [rows, width].
        tokens: (text, id) of what is judged.
        looks: ids that are judged by length and direction too; None = all. Zeros are told of any.
        in_use: rows that belong to tokens.
    """
    if not tokens:
        return {}
    own = {token for _, token in tokens}
    others = [token for token in range(in_use) if token not in own]
    sample = read_rows(place, sorted(random.Random(_SEED).sample(others, min(_SAMPLE, len(others)))))
    sample = sample[np.abs(sample).max(axis=1, initial=0) > ZERO]
    rows = read_rows(place, [token for _, token in tokens])
    usual = float(np.median(np.linalg.norm(sample, axis=1))) if len(sample) else 0.0
    mean = sample.mean(axis=0) if len(sample) else np.zeros(rows.shape[1], np.float32)
    usual_cosine = float(np.median(_cosines(sample, mean))) if len(sample) else 1.0
    found: dict[str, str] = {}
    for (text, token), row, cosine in zip(tokens, rows, _cosines(rows, mean), strict=True):
        length = float(np.linalg.norm(row))
        if np.abs(row).max() <= ZERO:
            found[text] = "is zeros"
        elif not np.isfinite(row).all():
            found[text] = "is not finite"
        elif looks is not None and token not in looks:
            continue
        elif length < SMALL * usual:
            found[text] = f"has length {length:.2g}, others {usual:.2g}"
        elif cosine > MEAN and usual_cosine < 0.9:
            found[text] = f"is the mean row (cosine {cosine:.3f})"
        else:
            twin = next(
                (t for (t, i), other in zip(tokens, rows, strict=True) if i != token and (row == other).all()), None
            )
            if twin is not None:
                found[text] = f"equals the row of {twin!r}"
    return found


def _cosines(rows: np.ndarray, mean: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(mean)
    return (rows @ mean) / np.maximum(lengths, 1e-30)


def _in_use(checkpoint: Checkpoint, place: TensorPlace) -> int:
    return min(place.shape[0], 1 + max(checkpoint.vocabulary.values(), default=-1))
