"""The row store: what was written is what is read, and nothing that is not whole is read at all."""

from __future__ import annotations

import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.pretraining.rows import IGNORE, Row, Stream, make_row
from posttrain.pretraining.store import BlockMaker, Joined, Store, StoredRows, StoreWriter, open_store, stored_row
from tests.training.spine_tiny import wrap

ROW = st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=12), st.integers(0, 4))


def runs_of(labels: list[bool]) -> list[int]:
    """Cuts between tokens with and without loss."""
    edges = [False, *labels, False]
    return [place for place, (a, b) in enumerate(pairwise(edges)) if a != b]


def write(folder: Path, rows: list[tuple[list[int], list[bool]]], size: int = 3) -> Store:
    writer = StoreWriter(folder)
    for begin in range(0, len(rows), size):
        block = BlockMaker()
        for number, (ids, loss) in enumerate(rows[begin : begin + size], begin):
            cuts = runs_of(loss)
            last = ids[cuts[-1] - 1] if cuts else -1
            block.add(ids, cuts, (sum(loss), number, last), (number % 2, number + 1), (1 + number % 2, 2))
        writer.write(block.build())
    return writer.finish({"what": "rows"})


def some_rows(count: int, seed: int = 0) -> list[tuple[list[int], list[bool]]]:
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = draw.integers(0, 50, draw.integers(1, 30)).tolist()
        rows.append((ids, [bool(bit) and place > 0 for place, bit in enumerate(draw.integers(0, 2, len(ids)))]))
    return rows


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(ROW, min_size=1, max_size=12), seed=st.integers(0, 9), size=st.integers(1, 5))
def test_rows_come_back_as_they_were(
    rows: list[Any], seed: int, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw = np.random.default_rng(seed)
    given_rows = [(ids, [bool(draw.integers(2)) and place > 0 for place in range(len(ids))]) for ids, _ in rows]
    folder = tmp_path_factory.mktemp("store") / "s"
    write(folder, given_rows, size)
    store = open_store(folder)
    assert store is not None
    assert store.about == {"what": "rows"}
    back = StoredRows(store, np.arange(len(store)), stored_row)
    for (ids, loss), row in zip(given_rows, back, strict=True):
        expected = make_row(ids, [token if trained else IGNORE for token, trained in zip(ids, loss, strict=True)])
        for name in ("ids", "labels", "positions"):
            found = getattr(row, name)
            assert found.dtype == np.int32
            assert found.tolist() == getattr(expected, name).tolist()
    assert store.lengths.tolist() == [len(ids) for ids, _ in given_rows]
    where = [(row, at) for row, (ids, _) in enumerate(given_rows) for at in range(len(ids))]
    rows_at, positions = np.array(where).T
    expected_loss = [given_rows[row][1][at] for row, at in where]
    assert store.loss_at(rows_at, positions).tolist() == expected_loss


def test_columns_prompts_and_ids_seen(tmp_path: Path) -> None:
    rows = [row for row in some_rows(40) if any(row[1])]
    store = write(tmp_path / "s", rows)
    assert store.columns["counts"][:, 0].tolist() == [sum(loss) for _, loss in rows]
    last = [[token for token, trained in zip(ids, loss, strict=True) if trained][-1] for ids, loss in rows]
    assert store.columns["counts"][:, 2].tolist() == last
    expected = [np.array(ids[: loss.index(True)], dtype=np.int32).tobytes() for ids, loss in rows]
    assert list(store.prompts()) == expected
    counted = Counter(token for ids, _ in rows for token in ids)
    assert dict(enumerate(store.occurrences(50).tolist())) == {token: counted[token] for token in range(50)}


def test_rows_made_of_one_conversation_have_the_prompt_of_the_first(tmp_path: Path) -> None:
    writer, block = StoreWriter(tmp_path / "s"), BlockMaker()
    for ids, place in (([1, 2, 3], 1), ([1, 2, 3, 4, 5], 1), ([7, 8, 9], 2)):
        block.add(ids, [len(ids) - 1, len(ids)], (1, 0, ids[-1]), (0, place))
    writer.write(block.build())
    first, other = np.array([1, 2], dtype=np.int32).tobytes(), np.array([7, 8], dtype=np.int32).tobytes()
    assert list(writer.finish({}).prompts()) == [first, first, other]


def test_sequences(tmp_path: Path) -> None:
    store = write(tmp_path / "s", some_rows(9))
    rows = StoredRows(store, np.array([4, 0, 8]), lambda ids, _: ids.tolist())
    joined = Joined([rows, StoredRows(store, np.empty(0, dtype=np.int64), rows.make), rows[1:]])  # type: ignore[list-item]
    assert list(joined) == [*rows, *list(rows)[1:]]
    assert joined[-1] == rows[2] == joined[2]
    assert [len(row) for row in rows] == rows.lengths.tolist()
    assert joined[1:4] == list(joined)[1:4]
    for beyond in (5, -6):
        with pytest.raises(IndexError):
            joined[beyond]


def test_a_store_that_is_not_whole_is_none(tmp_path: Path) -> None:
    write(tmp_path / "s", some_rows(20))
    assert open_store(tmp_path / "s") is not None
    assert open_store(tmp_path / "absent") is None

    def damaged(name: str, cut: int) -> None:
        shutil.rmtree(tmp_path / "d", ignore_errors=True)
        shutil.copytree(tmp_path / "s", tmp_path / "d")
        path = tmp_path / "d" / name
        path.write_bytes(path.read_bytes()[:-cut])
        assert open_store(tmp_path / "d") is None

    for name in ("ids", "cuts", "ends", "counts", "places", "parts"):
        damaged(f"{name}.bin", 1)
    damaged("store.json", 5)
    (tmp_path / "d" / "store.json").unlink()
    assert open_store(tmp_path / "d") is None
    shutil.rmtree(tmp_path / "d")
    shutil.copytree(tmp_path / "s", tmp_path / "d")
    head = (tmp_path / "d" / "store.json").read_text()
    (tmp_path / "d" / "store.json").write_text(head.replace('"format": 1', '"format": 2'))
    assert open_store(tmp_path / "d") is None


def test_nothing_stands_under_the_name_before_it_is_finished(tmp_path: Path) -> None:
    writer, block = StoreWriter(tmp_path / "s"), BlockMaker()
    block.add([1, 2], [1, 2], (1, 0, 2), (0, 1))
    writer.write(block.build())
    assert not (tmp_path / "s").exists()
    writer.close()
    write(tmp_path / "s", some_rows(4))  # what was left half-written is no obstacle
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def wrapped_in_memory(documents: list[Row], length: int) -> list[Row]:
    """The whole stream at once: what cutting on demand must equal to the bit."""
    ids = np.concatenate([document.ids for document in documents])
    labels = np.concatenate([document.labels for document in documents])
    owners = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    rows = []
    for start in range(0, len(ids), length):
        owner_T = owners[start : start + length]
        new = np.flatnonzero(np.diff(owner_T, prepend=-1))
        positions = np.arange(len(owner_T)) - np.repeat(new, np.diff(new, append=len(owner_T)))
        part = np.where(positions == 0, IGNORE, labels[start : start + length]).astype(np.int32)
        rows.append(Row(ids[start : start + length], part, positions.astype(np.int32)))
    return rows


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), length=st.integers(1, 30))
def test_rows_cut_on_demand_are_those_of_the_whole_stream(sizes: list[int], length: int) -> None:
    draw = np.random.default_rng(1)
    documents = []
    for size in sizes:
        ids = draw.integers(0, 99, size)
        documents.append(make_row(ids, np.where(draw.integers(0, 2, size), ids, IGNORE)))
    stream = Stream(np.cumsum(sizes), length)
    expected = wrapped_in_memory(documents, length)
    assert len(stream) == len(expected)
    for number in reversed(range(len(stream))):
        row = stream.row(number, documents.__getitem__)
        for name in ("ids", "labels", "positions"):
            assert getattr(row, name).dtype == getattr(expected[number], name).dtype
            assert getattr(row, name).tolist() == getattr(expected[number], name).tolist()
    _, members = wrap(documents, length)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    assert members == [sorted(set(owners[a : a + length].tolist())) for a in range(0, len(owners), length)]
