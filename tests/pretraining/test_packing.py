"""Packing and rows: no token lost, none twice, none that sees another document's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.pretraining.packing import cut_step, pack_best_fit, stack
from posttrain.pretraining.rows import IGNORE, Row, make_row
from tests.training.spine_tiny import wrap

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def document(number: int, length: int, masked: int = 0) -> Row:
    ids = np.arange(length) + 100 * (number + 1)
    labels = ids.copy()
    labels[:masked] = IGNORE
    return make_row(ids, labels)


@given(LENGTHS, st.integers(50, 80))
def test_best_fit_puts_every_document_in_exactly_one_row(lengths: list[int], capacity: int) -> None:
    rows = pack_best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    used = [sum(lengths[index] for index in row) for row in rows]
    assert max(used) <= capacity
    assert sum(sorted(used)[:2]) > capacity or len(rows) == 1  # two rows that fit one would be waste
    assert rows == pack_best_fit(lengths, capacity)


def test_best_fit_finds_the_fullest_row() -> None:
    assert pack_best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert pack_best_fit([], 10) == []


def test_a_document_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="a document of 11 tokens does not fit a row of 10"):
        pack_best_fit([3, 11], 10)


@given(LENGTHS, st.integers(1, 80), st.integers(1, 300), st.none() | st.integers(1, 5))
def test_pieces_of_a_step_respect_every_limit(lengths: list[int], row: int, tokens: int, documents: int | None) -> None:
    pieces = cut_step(lengths, row, tokens, documents)
    assert sorted(index for piece in pieces for packed in piece for index in packed) == list(range(len(lengths)))
    widest = []
    for piece in pieces:
        widths = [sum(lengths[index] for index in packed) for packed in piece]
        assert max(widths) <= max(row, *lengths)
        assert len(piece) == 1 or len(piece) * max(widths) <= tokens  # padding included
        assert documents is None or sum(map(len, piece)) <= documents
        widest.append(max(widths))
    assert widest == sorted(widest, reverse=True)  # a lack of memory shows in the first piece


def test_the_first_token_of_a_row_is_never_predicted() -> None:
    row = make_row([7, 8, 9], [7, IGNORE, 9])
    assert row.labels.tolist() == [IGNORE, IGNORE, 9]
    assert row.supervised == 1
    assert {array.dtype for array in (row.ids, row.labels, row.positions)} == {np.dtype(np.int32)}


def test_make_row_leaves_its_arguments_alone() -> None:
    ids = np.array([1, 2, 3], dtype=np.int32)
    assert make_row(ids, ids).labels.tolist() == [IGNORE, 2, 3]
    assert ids.tolist() == [1, 2, 3]


@given(LENGTHS, st.integers(1, 30))
def test_wrapping_keeps_every_token_in_order(lengths: list[int], length: int) -> None:
    documents = [document(number, size, masked=min(size, 2)) for number, size in enumerate(lengths)]
    rows, members = wrap(documents, length)
    assert np.array_equal(np.concatenate([row.ids for row in rows]), np.concatenate([d.ids for d in documents]))
    assert all(len(row) == length for row in rows[:-1])
    assert len(rows[-1]) <= length
    for row, held in zip(rows, members, strict=True):
        owners = row.ids // 100 - 1
        assert held == sorted(set(owners.tolist()))
        starts = np.flatnonzero(row.positions == 0)
        assert owners[starts].tolist() == held  # positions restart with each document, and nowhere else
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            assert row.positions[start:end].tolist() == list(range(end - start))
        assert (row.labels[starts] == IGNORE).all()  # nothing stands before them
        inner = row.positions > 0
        masked = row.ids % 100 < 2
        assert np.array_equal(row.labels[inner], np.where(masked, IGNORE, row.ids)[inner])


@given(st.lists(LENGTHS, min_size=1, max_size=4))
def test_stacked_rows_hold_their_documents_and_an_isolated_tail(packed: list[list[int]]) -> None:
    rows = [[document(number, size) for number, size in enumerate(lengths)] for lengths in packed]
    batch = stack(rows, pad_id=3)
    width = max(map(sum, packed))
    for number, (row, lengths) in enumerate(zip(rows, packed, strict=True)):
        ids, labels, positions = (batch[name][number] for name in ("input_ids", "labels", "position_ids"))
        used = sum(lengths)
        assert np.array_equal(ids[:used], np.concatenate([d.ids for d in row]))
        assert np.array_equal(labels[:used], np.concatenate([d.labels for d in row]))
        assert np.array_equal(positions[:used], np.concatenate([np.arange(size) for size in lengths]))
        assert (ids[used:] == 3).all()
        assert (labels[used:] == IGNORE).all()
        assert positions[used:].tolist() == list(range(width - used))
    assert "attention_mask" not in batch  # it would switch the isolation of documents off
