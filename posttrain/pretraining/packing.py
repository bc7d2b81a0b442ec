"""Packing: documents side by side in one row, none of which sees another."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

from posttrain.pretraining.rows import IGNORE, Row


def pack_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: each document goes into the fullest row that still holds it.

    Within 11/9 of the optimum plus one row (Johnson 1973); ties and order are deterministic.

    Args:
        lengths: tokens of each document, each at most `capacity`.

    Returns:
        Rows of document indices; every index stands in exactly one row.

    Raises:
        ValueError: a document is longer than a row.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a document of {max(lengths)} tokens does not fit a row of {capacity}")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted: the first that fits is the fullest
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            rows.append([index])
            insort(room, (capacity - lengths[index], len(rows) - 1))
        else:
            free, row = room.pop(place)
            rows[row].append(index)
            insort(room, (free - lengths[index], row))
    return rows


def cut_step(
    lengths: list[int], row_tokens: int, tokens: int, documents: int | None = None, one_row: bool = False
) -> list[list[list[int]]]:
    """Cuts the documents of one optimizer step into pieces that each fit one forward pass.

    Args:
        lengths: tokens of each document (a pair counts as both its sequences).
        row_tokens: capacity of a packed row; raised to the longest document.
        tokens: most tokens of a piece, padding included; one row may exceed it where it has to.
        documents: most documents of a piece.
        one_row: never two rows in a piece.

    Returns:
        Pieces -> packed rows -> document indices. Longest rows first, so that a lack of memory shows
        in the first piece.
    """
    packed = pack_best_fit(lengths, max(row_tokens, *lengths))
    rows = [
        row[start : start + (documents or len(row))]
        for row in packed
        for start in range(0, len(row), documents or len(row))
    ]
    widths = {row[0]: sum(lengths[index] for index in row) for row in rows}
    pieces: list[list[list[int]]] = []
    for row in sorted(rows, key=lambda row: (-widths[row[0]], row[0])):
        piece = pieces[-1] if pieces else []
        wide = (len(piece) + 1) * widths[piece[0][0]] if piece else 0  # the first row of a piece is its longest
        many = sum(map(len, piece)) + len(row)
        if piece and not one_row and wide <= tokens and (documents is None or many <= documents):
            piece.append(row)
        else:
            pieces.append([row])
    return pieces


def stack(rows: list[list[Row]], pad_id: int) -> dict[str, np.ndarray]:
    """Lays packed rows under one another.

    The padded tail is a document of its own (positions from 0, no labels), so no attention mask is
    needed; one must not be given, since it would switch the isolation of documents off.

    Returns:
        `input_ids`, `labels`, `position_ids`: [B, L] int64.
    """
    length = max(sum(map(len, row)) for row in rows)
    batch = {
        "input_ids": np.full((len(rows), length), pad_id, dtype=np.int64),
        "labels": np.full((len(rows), length), IGNORE, dtype=np.int64),
        "position_ids": np.zeros((len(rows), length), dtype=np.int64),
    }
    for number, row in enumerate(rows):
        at = 0
        for document in row:
            end = at + len(document)
            batch["input_ids"][number, at:end] = document.ids
            batch["labels"][number, at:end] = document.labels
            batch["position_ids"][number, at:end] = document.positions
            at = end
        batch["position_ids"][number, at:] = np.arange(length - at)
    return batch
