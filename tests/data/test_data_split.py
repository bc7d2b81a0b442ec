"""Splits: nothing on both sides, no prompt on both sides, the same for every order of the rows."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.rows import ChatRow, Origin, PairRow, RawRow, TextRow
from posttrain.data.select import SelectSpec, side_of, split_keys

KEYS = st.lists(st.sampled_from([f"prompt {n}" for n in range(12)]) | st.text(max_size=3), max_size=60)
HERE = Origin("f", 1)


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


def test_keys_by_row_tell_repeated_rows_apart() -> None:
    rows = [TextRow(text, HERE) for text in ("a", "b", "a")]
    assert len(set(split_keys(rows, "row"))) == 3
    assert set(split_keys(rows[:2], "row")) < set(split_keys(rows, "row"))
