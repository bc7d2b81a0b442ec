"""Where the tokens of a padded batch stand in packed rows, plain or with the prefix of each pair stored once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from posttrain.pretraining.packing import pack_best_fit
from posttrain.pretraining.rows import IGNORE

SHARED = 0
"""Branch number of tokens that every sequence of their document goes through."""


@dataclass(frozen=True)
class Layout:
    """Packed rows, and the way back. R rows of W tokens; S sequences of at most L tokens; all int64."""

    ids: np.ndarray
    """[R, W]; 0 in the tail of a row."""
    labels: np.ndarray
    """[R, W]; -100 where nothing is scored."""
    positions: np.ndarray
    """[R, W]; a branch goes on where the shared part ends, the tail of a row starts anew."""
    documents: np.ndarray
    """[R, W]; tokens of one document see each other as far as their branches allow; -1 in the tail."""
    branches: np.ndarray
    """[R, W]; `SHARED`, or the number of the sequence (from 1) within its document."""
    sources: np.ndarray
    """[S, L - 1]; index into per-token outputs [R, W - 1], flattened; -1 where a sequence has no label."""


@dataclass(frozen=True)
class _Document:
    """Sequences that begin with the same `shared` tokens, stored once."""

    shared: int
    sequences: list[int]
    tokens: int


def common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    """Number of leading ids that two arrays have in common."""
    length = min(len(one), len(other))
    differ = one[:length] != other[:length]
    return int(differ.argmax()) if differ.any() else length


def lay_out(
    ids: np.ndarray, labels: np.ndarray, lengths: list[int], row_tokens: int, share: bool = False, multiple: int = 1
) -> Layout:
    """Packs the sequences of a right-padded batch.

    With `share`, sequences i and i + S/2 are a pair: all but the last of their common leading tokens are
    stored once, and each branch begins with its own copy of that last one, because that is where the
    predictions part: [shared][last, rest of one][last, rest of the other].

    Args:
        ids, labels: [S, L]; the label of a token is the token itself, or -100.
        lengths: real tokens of each sequence, at least 1.
        row_tokens: capacity of a row; raised to the longest document.
        multiple: rows are filled up to a multiple of it.
    """
    documents = _pairs(ids, lengths) if share else [_Document(0, [i], length) for i, length in enumerate(lengths)]
    sizes = [document.tokens for document in documents]
    rows = pack_best_fit(sizes, max(row_tokens, *sizes))
    width = max(2, max(sum(sizes[index] for index in row) for row in rows))
    width = -(-width // multiple) * multiple
    shape = (len(rows), width)
    made = Layout(
        ids=np.zeros(shape, dtype=np.int64),
        labels=np.full(shape, IGNORE, dtype=np.int64),
        positions=np.zeros(shape, dtype=np.int64),
        documents=np.full(shape, -1, dtype=np.int64),
        branches=np.zeros(shape, dtype=np.int64),
        sources=np.full((len(lengths), ids.shape[1] - 1), -1, dtype=np.int64),
    )
    for number, row in enumerate(rows):
        at = 0
        for index in row:
            _place(made, number, at, index, documents[index], ids, labels, lengths)
            at += sizes[index]
        made.positions[number, at:] = np.arange(width - at)
    return made


def _pairs(ids: np.ndarray, lengths: list[int]) -> list[_Document]:
    """One document for each pair that shares tokens, two for one that does not."""
    half, documents = len(lengths) // 2, []
    for one in range(half):
        other = one + half
        first, second = lengths[one], lengths[other]
        shared = common_prefix(ids[one, :first], ids[other, :second]) - 1
        if shared > 0:
            documents.append(_Document(shared, [one, other], first + second - shared))
        else:
            documents += [_Document(0, [one], first), _Document(0, [other], second)]
    return documents


def _place(
    made: Layout, row: int, at: int, number: int, document: _Document, ids: np.ndarray, labels: np.ndarray,
    lengths: list[int],
) -> None:  # fmt: skip
    """Writes one document into a row from column `at` on, and where its sequences find their outputs."""
    shared, first = document.shared, document.sequences[0]
    made.documents[row, at : at + document.tokens] = number
    made.ids[row, at : at + shared] = ids[first, :shared]
    made.positions[row, at : at + shared] = np.arange(shared)
    start = at + shared
    for branch, sequence in enumerate(document.sequences, start=1):
        length = lengths[sequence]
        end = start + length - shared
        made.ids[row, start:end] = ids[sequence, shared:length]
        made.positions[row, start:end] = np.arange(shared, length)
        made.branches[row, start:end] = branch if shared else SHARED
        made.labels[row, start + 1 : end] = labels[sequence, shared + 1 : length]
        before = np.arange(length - 1)  # the token before each predicted one
        column = np.where(before < shared, at + before, start + before - shared)
        scored = labels[sequence, 1:length] != IGNORE
        made.sources[sequence, : length - 1][scored] = (row * (made.ids.shape[1] - 1) + column)[scored]
        start = end
    if shared:  # its last token predicts the one that the first branch begins with, which both have
        known = labels[document.sequences, 1 : shared + 1]
        made.labels[row, at + 1 : at + shared + 1] = known.max(axis=0)
