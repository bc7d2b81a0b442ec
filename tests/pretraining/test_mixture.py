"""The mixture and the order of its rows: exact counts, seeds, and the log that is looked up later."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.pretraining.mixture import Share, epoch_rows
from posttrain.pretraining.order import Order, draw_items, plan_steps, rows_of_step, save_order

SHARES = st.lists(
    st.one_of(
        st.builds(Share, st.integers(0, 30), weight=st.floats(0.05, 4)),
        st.builds(Share, st.integers(0, 30), rows=st.integers(1, 70)),
    ),
    min_size=1,
    max_size=4,
)


def counts(items: np.ndarray) -> Counter[tuple[int, int]]:
    return Counter(map(tuple, items.tolist()))


@given(SHARES, st.integers(0, 2**31), st.integers(0, 5))
def test_an_epoch_holds_exactly_what_the_shares_want(shares: list[Share], seed: int, epoch: int) -> None:
    seen = counts(epoch_rows(shares, seed, epoch))
    for number, share in enumerate(shares):
        times = [seen[number, row] for row in range(share.available)]
        assert sum(times) == (share.wanted if share.available else 0)
        assert not times or max(times) - min(times) <= 1  # no row is favoured
    assert sum(seen.values()) == sum(share.wanted for share in shares if share.available)


@given(st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 3))
def test_half_of_a_source_is_all_of_it_in_two_epochs(available: int, seed: int, first: int) -> None:
    shares = [Share(7), Share(available, weight=0.5)]
    both = np.concatenate([epoch_rows(shares, seed, 2 * first + number) for number in range(2)])
    seen = {row for source, row in both.tolist() if source == 1}
    assert seen == set(range(available))


def test_english_is_halved_and_basque_doubled() -> None:
    english, basque, catalan = Share(1000, weight=0.5), Share(100, weight=2.0), Share(300, rows=450)
    items = epoch_rows([english, basque, catalan], seed=3, epoch=0)
    assert Counter(items[:, 0].tolist()) == {0: 500, 1: 200, 2: 450}


def test_a_source_of_one_row_at_half_its_weight_is_kept() -> None:
    assert Share(1, weight=0.5).wanted == 1


def test_the_draw_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    shares = [Share(20, weight=1.5), Share(9)]
    first = epoch_rows(shares, 1, 0)
    np.random.seed(5)  # the global stream has no part in it
    assert np.array_equal(first, epoch_rows(shares, 1, 0))
    assert not np.array_equal(first, epoch_rows(shares, 2, 0))
    assert not np.array_equal(first, epoch_rows(shares, 1, 1))
    assert epoch_rows([Share(5)], 1, 0).tolist() == [[0, 3], [0, 4], [0, 0], [0, 1], [0, 2]]  # golden: for good


def test_one_source_is_drawn_alike_whatever_stands_beside_it() -> None:
    alone = epoch_rows([Share(40, weight=0.3)], 1, 0)
    beside = epoch_rows([Share(40, weight=0.3), Share(17)], 1, 0)
    assert counts(alone) == counts(beside[beside[:, 0] == 0])


@given(SHARES, st.floats(0.1, 3))
def test_a_part_of_an_epoch_is_its_beginning(shares: list[Share], epochs: float) -> None:
    whole, part = draw_items(shares, 1, 3), draw_items(shares, 1, epochs)
    assert len(part) == round(len(whole) / 3 * epochs)
    assert np.array_equal(part, whole[: len(part)])


@given(st.integers(0, 100), st.integers(1, 20), st.integers(-1, 30))
def test_steps_hold_every_row_once_in_order(rows: int, batch: int, most: int) -> None:
    offsets = plan_steps(rows, batch, most)
    sizes = np.diff(offsets)
    assert offsets[0] == 0
    assert (sizes > 0).all()
    assert (sizes[:-1] == batch).all()
    steps = -(-rows // batch)
    assert len(sizes) == (min(steps, most) if most > 0 else steps)
    assert offsets[-1] == min(rows, len(sizes) * batch)


def test_the_rows_of_a_step_can_be_looked_up_afterwards(tmp_path: Path) -> None:
    items = draw_items([Share(6), Share(4, weight=2.0)], 1, 1)
    order = Order(items, plan_steps(len(items), 4, -1))
    names, files = ["a.jsonl", "owner/name"], ["/data/a.jsonl", "owner/name@1"]
    places = [np.array([[0, line] for line in (1, 2, 4, 5, 6, 9)]), np.array([[1, row] for row in (3, 5, 7, 8)])]
    save_order(tmp_path, order, names, files, places)
    assert [path.name for path in tmp_path.iterdir()] == ["data_order.npz"]
    for step in range(order.steps):
        found = [(names[source], places[source][row]) for source, row in order.of_step(step).tolist()]
        wanted = [(name, files[file], line) for name, (file, line) in found]
        assert rows_of_step(tmp_path, step + 1) == wanted  # metrics count steps from 1
    for step in (0, order.steps + 1):
        with pytest.raises(IndexError, match=f"step {step}"):
            rows_of_step(tmp_path, step)
