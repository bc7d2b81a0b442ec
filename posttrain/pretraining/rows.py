"""Tokenised rows: what every training stage feeds on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


@dataclass(frozen=True)
class Stream:
    """Documents laid end to end and cut into rows of one length; only the last may be shorter.

    A document that is cut goes on in the next row at position 0, so rows can be read in any order.
    """

    ends: np.ndarray
    """[documents] int64: where each ends in the stream; none is empty."""
    length: int

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.length) if len(self.ends) else 0

    def documents(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last document [rows] of which each row holds a part."""
        last = np.minimum((rows + 1) * self.length, self.ends[-1]) - 1
        return (
            np.searchsorted(self.ends, rows * self.length, side="right"),
            np.searchsorted(self.ends, last, side="right"),
        )

    def row(self, number: int, document: Callable[[int], Row]) -> Row:
        """Cuts one row; `document` gives the documents of the stream by their place."""
        begin = number * self.length
        first, last = (int(found[0]) for found in self.documents(np.array([number])))
        parts = []
        for place in range(first, last + 1):
            whole = document(place)
            start = int(self.ends[place]) - len(whole)
            part = slice(max(begin - start, 0), begin + self.length - start)
            parts.append((whole.ids[part], whole.labels[part]))
        ids, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
        positions = np.concatenate([np.arange(len(part), dtype=np.int32) for part, _ in parts])
        return Row(ids, np.where(positions == 0, IGNORE, labels).astype(np.int32), positions)
