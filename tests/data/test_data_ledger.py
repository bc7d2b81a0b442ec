"""The ledger balances exactly when every row and token is accounted for, and limits what may be dropped."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.ledger import Ledger, render_ledger
from posttrain.data.rows import Dropped, Origin
from posttrain.errors import DataError, StageError

TOKENS = st.integers(0, 5000)
FATES = st.one_of(
    st.tuples(st.just("train"), TOKENS, TOKENS, TOKENS),
    st.tuples(st.just("drop"), st.sampled_from(["too long", "empty answer"]), TOKENS),
    st.tuples(st.just("leave_out"), TOKENS),
    st.tuples(st.just("unread"), st.just("empty text")),
    st.tuples(st.just("split"), TOKENS, st.integers(2, 4)),
)
HISTORY = st.lists(st.tuples(st.sampled_from(["a", "b"]), FATES), max_size=40)


def told(history: list) -> Ledger:
    ledger = Ledger()
    for number, (source, (fate, *amounts)) in enumerate(history):
        if fate == "unread":
            ledger.read(source, 1, [Dropped(Origin(source, number), amounts[0])])
            continue
        if fate == "split":
            ledger.enter(source, rows=1, tokens=amounts[0] * amounts[1])
            ledger.split(source, amounts[1])
            for part in range(amounts[1]):
                if part:
                    ledger.train(source, amounts[0], 0)
                else:
                    ledger.drop(source, "too long", tokens=amounts[0])
            continue
        ledger.enter(source, rows=1, tokens=sum(n for n in amounts if isinstance(n, int)))
        if fate == "train":
            ledger.train(source, *amounts)
        elif fate == "drop":
            ledger.drop(source, amounts[0], tokens=amounts[1])
        else:
            ledger.leave_out(source, 1, amounts[0])
    return ledger


@settings(deadline=None)
@given(HISTORY)
def test_a_full_account_balances_and_totals_are_sums(history: list) -> None:
    ledger = told(history)
    ledger.balance()
    whole = ledger.as_dict()
    assert json.loads(json.dumps(whole)) == whole
    for unit, name in (("rows", "in"), ("rows", "trained"), ("tokens", "in"), ("tokens", "masked")):
        assert whole["total"][unit][name] == sum(source[unit][name] for source in whole["sources"].values())
    assert whole["total"]["rows"]["in"] == len(history)
    assert whole["total"]["rows_seen"] == sum(source["rows_seen"] for source in whole["sources"].values())
    assert all(len(line) < 400 for line in render_ledger(whole))


@pytest.mark.contract(number=11)
@settings(deadline=None)
@given(HISTORY, st.sampled_from(["row in", "token in", "row out", "token out", "part out", "between sources"]))
def test_whatever_is_missing_on_one_side_is_found(history: list, fault: str) -> None:
    ledger = told(history)
    if fault == "row in":
        ledger.enter("a", rows=1)
    elif fault == "token in":
        ledger.enter("a", tokens=1)
    elif fault == "row out":
        ledger.drop("a", "lost")
    elif fault == "part out":  # one of three rows of a conversation is forgotten
        ledger.enter("a", rows=1, tokens=6)
        ledger.split("a", 3)
        ledger.train("a", 3, 3, rows=2)
    elif fault == "token out":
        ledger.train("a", 1, 0, rows=0)
    else:  # the total would balance
        ledger.enter("a", rows=1)
        ledger.train("b", 0, 0)
    with pytest.raises(StageError, match="do not add up"):
        ledger.balance()


def test_figures_of_a_mixture() -> None:
    ledger = Ledger()
    ledger.read("a.jsonl", 4, [Dropped(Origin("a.jsonl", 3), "empty answer")])
    for _ in range(3):
        ledger.enter("a.jsonl", tokens=10)
        ledger.train("a.jsonl", supervised=4, masked=5, truncated=1)
    ledger.see("a.jsonl", 6)
    ledger.read("b.jsonl", 2, [])
    ledger.enter("b.jsonl", tokens=14)
    ledger.train("b.jsonl", supervised=7, masked=0)
    ledger.leave_out("b.jsonl", 1, tokens=5)
    ledger.drop("b.jsonl", "end of stream", rows=0, tokens=2)
    ledger.balance()
    whole = ledger.as_dict()
    assert whole["sources"]["a.jsonl"] == {
        "rows": {
            "in": 4,
            "split": 0,
            "made": 0,
            "trained": 3,
            "left_out": 0,
            "held_out": 0,
            "dropped": {"empty answer": 1},
        },
        "tokens": {"in": 30, "trained": 12, "masked": 15, "truncated": 3, "left_out": 0, "held_out": 0, "dropped": {}},
        "rows_seen": 6,
        "times": 2.0,
        "first_dropped": {"empty answer": ["a.jsonl:3"]},
    }
    assert whole["total"]["tokens"]["in"] == 44
    assert whole["total"]["rows_seen"] == 7
    lines = render_ledger(whole)
    assert [line.split()[0] for line in lines] == ["source", "a.jsonl", "b.jsonl", "total", "dropped", "dropped"]
    assert lines[3].split() == ["total", "6", "4", "1", "1", "1.75", "44", "19", "15", "3", "5", "2"]
    assert lines[4] == "dropped 1 rows: empty answer (first: a.jsonl:3)"
    assert lines[5] == "dropped 2 tokens: end of stream"


@pytest.mark.contract(number=11)
def test_max_dropped_says_how_many_why_and_where() -> None:
    ledger = Ledger()
    drops = [Dropped(Origin("f.jsonl", number), "too long") for number in range(1, 6)]
    ledger.read("f.jsonl", 100, [*drops, Dropped(Origin("f.jsonl", 9), "empty answer")])
    ledger.check_dropped(0.06)
    with pytest.raises(DataError) as error:
        ledger.check_dropped(0.05)
    assert error.value.exit_code == 2
    assert error.value.found == (
        "6 of 100 rows (6.0 %) were dropped: too long (5), empty answer (1); "
        "first rows: too long: f.jsonl:1, f.jsonl:2, f.jsonl:3; empty answer: f.jsonl:9"
    )
    Ledger().check_dropped(0.0)


def test_rows_made_by_splitting_are_stated_and_counted() -> None:
    ledger = Ledger()
    ledger.read("a.jsonl", 10, [])
    for made in (3, 2):
        ledger.split("a.jsonl", made)
    ledger.train("a.jsonl", 0, 0, rows=12)
    ledger.drop("a.jsonl", "too long")
    ledger.balance()
    assert ledger.as_dict()["total"]["rows"]["split"] == 2
    assert "split 2 conversations into 5 rows: the template rewrites history" in render_ledger(ledger.as_dict())
    ledger.check_dropped(1 / 13)
    with pytest.raises(DataError, match="1 of 13 rows"):
        ledger.check_dropped(0.07)
    whole = ledger.as_dict()
    for account in (whole["total"], *whole["sources"].values()):
        del account["rows"]["split"], account["rows"]["made"]  # as records of before have it
    assert len(render_ledger(whole)) == 3
