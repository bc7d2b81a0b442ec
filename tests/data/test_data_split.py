"""Splits: nothing on both sides, no prompt on both sides, the same for every order of the rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.groups import seeded_digest, take_groups
from posttrain.data.rows import ChatRow, Origin, PairRow, RawRow, TextRow
from posttrain.data.select import SelectSpec, choose_rows, key_of

KEYS = st.lists(st.sampled_from([f"prompt {n}" for n in range(12)]) | st.text(max_size=3), max_size=60)
HERE = Origin("f", 1)


def side_of(keys: list[str], spec: SelectSpec) -> list[int]:
    """Indices of the rows with these prompts that are on the wanted side."""
    rows = [RawRow({"prompt": key}, HERE) for key in keys]
    return [int(index) for index in choose_rows(lambda: rows, spec).nonzero()[0]]


def split_keys(rows: Sequence[Any], by: Any) -> list[str]:
    return [key_of(row, by) for row in rows]


@settings(deadline=None)
@given(keys=KEYS, rows=st.integers(1, 70), seed=st.integers(0, 3))
def test_sides_are_a_partition_that_never_splits_a_prompt(keys: list[str], rows: int, seed: int) -> None:
    train = side_of(keys, SelectSpec(rows, "train", seed=seed))
    heldout = side_of(keys, SelectSpec(rows, "heldout", seed=seed))
    assert sorted(train + heldout) == list(range(len(keys)))
    assert train == sorted(train)
    assert not {keys[index] for index in train} & {keys[index] for index in heldout}
    assert len(train) <= rows
    if len(set(keys)) == len(keys):
        assert len(train) == min(rows, len(keys))
    fits = rows - len(train)
    assert all(keys.count(keys[index]) > fits for index in heldout)  # every group that fits was taken


@settings(deadline=None)
@given(keys=KEYS, rows=st.integers(1, 70), order=st.randoms(use_true_random=False))
def test_sides_do_not_depend_on_the_order_of_rows(keys: list[str], rows: int, order: random.Random) -> None:
    spec = SelectSpec(rows, "train")
    shuffled = order.sample(keys, len(keys))
    assert sorted(keys[i] for i in side_of(keys, spec)) == sorted(shuffled[i] for i in side_of(shuffled, spec))


def test_the_seed_matters_and_the_split_is_pinned() -> None:
    keys = [f"prompt {n}" for n in range(10)]
    assert side_of(keys, SelectSpec(3, "train", seed=0)) == [0, 7, 8]  # the three least SHA-256 of "0\0prompt n"
    assert len({tuple(side_of(keys, SelectSpec(3, "train", seed=seed))) for seed in range(20)}) > 10


def test_keys_by_prompt_are_what_was_asked() -> None:
    user, system = {"role": "user", "content": "q"}, {"role": "system", "content": "s"}
    a, b = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
    chats = [ChatRow([user, a], None, HERE), ChatRow([system, user, b], None, HERE), RawRow({"prompt": "q"}, HERE)]
    assert split_keys(chats, "prompt") == ["q"] * 3
    pairs = [PairRow([user], [a], [b], None, HERE), PairRow([user], [b], [a], None, HERE)]
    assert len(set(split_keys(pairs, "prompt"))) == 1
    assert len(set(split_keys([pairs[0], PairRow([system, user], [a], [b], None, HERE)], "prompt"))) == 2
    raw = [RawRow({"turns": ["q"]}, HERE), RawRow({"turns": ["p"]}, HERE), TextRow("t", HERE)]
    assert len(set(split_keys(raw, "prompt"))) == 3


@settings(deadline=None)
@given(
    st.lists(st.sampled_from("abcdef"), min_size=1, max_size=30), st.integers(1, 30), st.sampled_from(["row", "prompt"])
)
def test_a_split_by_row_tells_repeated_rows_apart(texts: list[str], rows: int, by: Any) -> None:
    train = choose_rows(lambda: [TextRow(text, HERE) for text in texts], SelectSpec(rows, "train", by=by))
    if by == "row":
        assert train.sum() == min(rows, len(texts))
    keys = [f"{text}\0{texts[:number].count(text)}" if by == "row" else text for number, text in enumerate(texts)]
    assert train.nonzero()[0].tolist() == side_of(keys, SelectSpec(rows, "train"))  # what a key has always been


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 400), max_size=400),
    st.integers(0, 12),
    st.integers(0, 3),
)
def test_few_of_many_are_found_as_all_would_be_sorted(keys: list[int], room: int, seed: int) -> None:
    digests = [seeded_digest(seed, b"%d" % key) for key in keys]
    taken, left = set(), room
    for digest in sorted(set(digests)):
        if digests.count(digest) <= left:
            taken.add(digest)
            left -= digests.count(digest)
    assert take_groups(b"".join(digests), room).tolist() == [digest in taken for digest in digests]
