"""Rows held out for certificates: how many, which, and never one whose prompt is trained on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.data.held_out import choose_held_out, held_out_count


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, 0), (99, 0), (100, 1), (250, 2), (1599, 15), (1600, 16), (10**6, 16)]
)
def test_by_default_16_and_at_most_one_in_a_hundred(rows: int, expected: int) -> None:
    assert held_out_count(None, rows) == expected


def test_as_many_as_asked() -> None:
    assert (held_out_count(0, 10**6), held_out_count(40, 50)) == (0, 40)


PROMPTS = st.lists(st.binary(max_size=2), max_size=60)


@given(PROMPTS, st.integers(0, 20), st.integers(0, 3))
def test_a_prompt_is_on_one_side(prompts: list[bytes], count: int, seed: int) -> None:
    held = choose_held_out(prompts, count, seed)
    assert len(held) <= count
    assert not {prompts[i] for i in held} & {p for i, p in enumerate(prompts) if i not in held}
    if len(set(prompts)) == len(prompts):
        assert len(held) == min(count, len(prompts))


@given(st.permutations([b"%d" % number for number in range(30)]), st.integers(0, 3))
def test_which_ones_does_not_depend_on_the_order_of_rows(prompts: list[bytes], seed: int) -> None:
    straight = sorted(prompts)
    expected = {straight[i] for i in choose_held_out(straight, 5, seed)}
    assert {prompts[i] for i in choose_held_out(prompts, 5, seed)} == expected


def test_the_seed_decides() -> None:
    prompts = [b"%d" % number for number in range(1000)]
    assert choose_held_out(prompts, 16, 1) == choose_held_out(prompts, 16, 1)
    assert choose_held_out(prompts, 16, 1) != choose_held_out(prompts, 16, 2)
