"""Real data sets, counted: every row read, and every dropped one for a reason that was looked at."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.pairs import LONGER, NO_CHOSEN, OTHER_PROMPT
from posttrain.data.read import SourceSpec, read_source
from posttrain.data.select import SelectSpec
from posttrain.errors import DataError

HH = "hh-rlhf/harmless-base_test.jsonl.gz"
DEMOS = "llamafactory-demos"


@pytest.mark.parametrize(
    ("name", "want", "shape", "rows"),
    [
        (f"{DEMOS}/alpaca_en_demo.json", "chat", "alpaca", 999),
        (f"{DEMOS}/identity.json", "chat", "alpaca", 91),
        (f"{DEMOS}/dpo_en_demo.json", "pair", "preference", 300),
        (f"{DEMOS}/glaive_toolcall_en_demo.json", "chat", "sharegpt", 300),
        (f"{DEMOS}/kto_en_demo.json", "chat", "messages", 300),
        (f"{DEMOS}/c4_demo.jsonl", "text", "text", 300),
        ("mt-bench/question.jsonl", "raw", "raw", 80),
        ("ifeval-prompts/en_input_data.jsonl", "raw", "raw", 541),
        ("ifeval-prompts/es_input_data.jsonl", "raw", "raw", 115),
    ],
)
def test_every_row_is_read(shared_dir: Path, name: str, want: Any, shape: str, rows: int) -> None:
    source = read_source(SourceSpec(shared_dir / "data" / name), want)
    assert (source.shape, source.rows_in, len(source.rows), source.dropped) == (shape, rows, rows, [])


def test_hh_rlhf(shared_dir: Path) -> None:
    started = time.process_time()
    source = read_source(SourceSpec(shared_dir / "data" / HH), "pair")
    assert time.process_time() - started < 1.0
    assert (source.shape, source.rows_in, len(source.rows)) == ("transcript_pair", 2312, 2303)
    # Four rejected answers follow another prompt; one (row 1951) holds a further turn after its answer.
    assert Counter(drop.reason for drop in source.dropped) == {NO_CHOSEN: 4, OTHER_PROMPT: 4, LONGER: 1}
    assert [drop.origin.row for drop in source.dropped] == [87, 517, 926, 1104, 1255, 1689, 1951, 1953, 2037]
    assert all(row.prompt[0]["role"] == "user" and len(row.chosen) == len(row.rejected) == 1 for row in source.rows)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_hh_rlhf_splits_into_1500_and_the_rest(shared_dir: Path, seed: int) -> None:
    train, heldout = (
        read_source(SourceSpec(shared_dir / "data" / HH, select=SelectSpec(1500, side, seed=seed)), "pair")
        for side in ("train", "heldout")
    )
    assert (train.rows_in, heldout.rows_in) == (1500, 812)
    assert not {str(row.prompt) for row in train.rows} & {str(row.prompt) for row in heldout.rows}
    assert len(train.dropped) + len(heldout.dropped) == 9


def test_tool_calls_of_glaive(shared_dir: Path) -> None:
    source = read_source(SourceSpec(shared_dir / "data" / DEMOS / "glaive_toolcall_en_demo.json"), "chat")
    calls = [message for row in source.rows for message in row.messages if message.get("tool_calls")]
    assert len(calls) == 211
    assert all(isinstance(call["tool_calls"][0]["function"]["arguments"], dict) for call in calls)
    assert sum(row.tools is None for row in source.rows) == 109


def test_alpaca_makes_texts(shared_dir: Path) -> None:
    spec = SourceSpec(shared_dir / "data" / DEMOS / "alpaca_en_demo.json", text_format="{instruction}\n{output}")
    source = read_source(spec, "text")
    assert len(source.rows) == 999
    assert source.rows[0].text.startswith("Describe a process of making crepes.\nMaking crepes is")


@pytest.mark.parametrize(
    ("name", "want", "found"),
    [
        (f"{DEMOS}/v1_sft_demo.jsonl", "chat", r"v1_sft_demo.jsonl:1: .messages\[0\].content. is a list of content"),
        (f"{DEMOS}/v1_dpo_demo.jsonl", "pair", "`chosen_messages`, `rejected_messages`"),
        (f"{DEMOS}/dpo_en_demo.json", "chat", "several shapes"),
        (DEMOS, "chat", "several kinds"),
        ("mt-bench/question.jsonl", "chat", "no known row shape"),
    ],
)
def test_what_is_not_read_is_refused(shared_dir: Path, name: str, want: Any, found: str) -> None:
    with pytest.raises(DataError, match=found):
        read_source(SourceSpec(shared_dir / "data" / name), want)
