"""Tokenised rows: what every training stage feeds on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Row:
    """One row of tokens.

    Shapes: all [T]; `ids`, `labels` and `positions` are int32. A label of -100 carries no loss; the
    label of a token is the token itself (the model shifts). Positions restart at 0 where a new
    document begins, which is what keeps documents of one packed row apart.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """Number of tokens that carry loss."""
        return int((self.labels != IGNORE).sum())


def make_row(ids: Iterable[int], labels: Iterable[int]) -> Row:
    """Builds the row of one document; its first token is never predicted, so it carries no loss."""
    ids_T = np.asarray(ids, dtype=np.int32)
    labels_T = np.array(labels, dtype=np.int32)
    labels_T[:1] = IGNORE
    return Row(ids_T, labels_T, np.arange(len(ids_T), dtype=np.int32))


def wrap(documents: list[Row], length: int) -> tuple[list[Row], list[list[int]]]:
    """Cuts one long stream of documents into rows of `length` tokens; only the last may be shorter.

    A document that is cut goes on in the next row at position 0, so rows can be read in any order.

    Returns:
        The rows, and for each row the indices of the documents it holds.
    """
    ids = np.concatenate([document.ids for document in documents])
    labels = np.concatenate([document.labels for document in documents])
    owners = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    rows, members = [], []
    for start in range(0, len(ids), length):
        part = slice(start, start + length)
        owner_T = owners[part]
        new_document = np.flatnonzero(np.diff(owner_T, prepend=-1))
        positions = np.arange(len(owner_T)) - np.repeat(new_document, np.diff(new_document, append=len(owner_T)))
        labels_T = np.where(positions == 0, IGNORE, labels[part]).astype(np.int32)
        rows.append(Row(ids[part], labels_T, positions.astype(np.int32)))
        members.append([int(owner) for owner in owner_T[new_document]])
    return rows, members
