"""The rows of a training stage: every row and token in the ledger, and in the steps that train."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.data.rows import PairRow, TextRow
from posttrain.errors import DataError
from posttrain.models.lineage import Lineage, Link
from posttrain.pretraining.rows import IGNORE
from posttrain.recipe.schema import Data
from posttrain.stages import dpo, pretrain, sft, text_rows
from posttrain.stages.context import Context
from posttrain.stages.conversation import Chat, open_chat
from posttrain.stages.prepare import Prepared, prepare
from posttrain.stages.schedule import schedule_rows, schedule_wrapped
from posttrain.training.dpo import dpo_step
from posttrain.training.pairs import Pair
from posttrain.training.sft import sft_step
from tests.stages.stage_tiny import chats, make_context, preferences, write_lines
from tests.training.spine_tiny import PAD, make_tokenizer, save_base


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_base(folder / "base")
    write_lines(folder / "chats.jsonl", chats(21))
    write_lines(folder / "more.jsonl", chats(5))
    write_lines(folder / "pairs.jsonl", preferences(17))
    write_lines(folder / "texts.jsonl", [{"text": "kaixo mundua " * (1 + number % 5)} for number in range(15)])
    return folder


def chat_of(context: Context) -> Chat:
    return open_chat(Lineage(Link(context.run_dir / "base", "base", None)), "chatml", context)


def data_of(*sources: Any, **more: Any) -> Data:
    listed = [source if isinstance(source, dict) else {"path": f"./{source}"} for source in sources]
    return Data.model_validate({"sources": listed, "max_length": 512, **more})


def prepared_for(kind: str, run: Path, data: Data) -> Prepared[Any]:
    context = make_context(run, "stage", kind)
    if kind == "pretrain":
        return prepare(data, context, pretrain.conversion(make_tokenizer(), data))
    module = sft if kind == "sft" else dpo
    return prepare(data, context, module.conversion(chat_of(context), data))


def prompt_of(row: Any) -> bytes:
    """What no row in training may share with one that is held out."""
    return (row.prompt if isinstance(row, Pair) else row.ids[: int(np.argmax(row.labels != IGNORE))]).tobytes()


def total(prepared: Prepared[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    prepared.ledger.balance()
    account = prepared.ledger.as_dict()["total"]
    return account["rows"], account["tokens"]


def trained(steps: list[Any]) -> tuple[int, int]:
    """Tokens with loss, and tokens read, as the model gets them; padding left out."""
    labels = [piece.tensors["labels"] for step in steps for piece in step.pieces]
    return sum(int((each != IGNORE).sum()) for each in labels), sum(step.tokens for step in steps)


@pytest.mark.parametrize(("max_length", "long_rows"), [(512, "drop"), (38, "truncate"), (50, "drop")])
def test_sft_trains_what_its_ledger_says(run: Path, max_length: int, long_rows: str) -> None:
    data = data_of("chats.jsonl", "more.jsonl", max_length=max_length, long_rows=long_rows, max_dropped=1.0)
    prepared = prepared_for("sft", run, data)
    rows, tokens = total(prepared)
    schedule = schedule_rows(prepared, {"global_batch_size": 4, "num_train_epochs": 1}, seed=1)
    steps = [sft_step(schedule.rows_of(step), PAD, 256, 512, None) for step in range(schedule.steps)]
    assert trained(steps) == (tokens["trained"], tokens["trained"] + tokens["masked"])
    assert sum(step.supervised for step in steps) == tokens["trained"]
    assert sum(step.rows for step in steps) == rows["trained"]
    assert rows["in"] == 26
    assert bool(tokens["truncated"]) == (long_rows == "truncate")
    if max_length < 512:
        assert set(rows["dropped"]) <= {"longer than max_length", "no trained token within max_length"}
        assert rows["dropped"]


@pytest.mark.parametrize("max_length", [512, 30])
def test_dpo_trains_what_its_ledger_says(run: Path, max_length: int) -> None:
    prepared = prepared_for("dpo", run, data_of("pairs.jsonl", max_length=max_length, max_dropped=1.0))
    rows, tokens = total(prepared)
    schedule = schedule_rows(prepared, {"global_batch_size": 4, "num_train_epochs": 1}, seed=1)
    steps = []
    for number in range(schedule.steps):
        pairs = schedule.rows_of(number)
        steps.append(dpo_step(pairs, torch.zeros(len(pairs), 2), PAD, 128, None, ["sigmoid"]))
    masks = [piece.tensors["completion_mask"] for step in steps for piece in step.pieces]
    assert sum(int(mask.sum()) for mask in masks) == tokens["trained"]
    prompts = sum(len(pair.prompt) for number in range(schedule.steps) for pair in schedule.rows_of(number))
    assert tokens["masked"] == prompts  # a pair's prompt is counted once
    assert sum(step.rows for step in steps) == rows["trained"]
    assert bool(tokens["truncated"]) == (max_length == 30)


def test_wrapped_texts_train_what_their_ledger_says(run: Path) -> None:
    for length in (8, 32, 4096):
        prepared = prepared_for("pretrain", run, data_of("texts.jsonl", max_length=length))
        schedule = schedule_wrapped(prepared, {"global_batch_size": 2, "num_train_epochs": 1}, 1, length)
        rows, tokens = total(prepared)
        steps = [sft_step(schedule.rows_of(step), PAD, length, 4096, None) for step in range(schedule.steps)]
        assert trained(steps) == (tokens["trained"], tokens["in"])
        assert tokens["trained"] + tokens["masked"] == tokens["in"]
        assert rows["trained"] == rows["in"] == 15


def test_a_weight_leaves_rows_aside_and_repeats_rows(run: Path) -> None:
    half = {"path": "./chats.jsonl", "weight": 0.5}
    double = {"path": "./more.jsonl", "weight": 2.0}
    prepared = prepared_for("sft", run, data_of(half, double))
    rows, tokens = total(prepared)
    assert (rows["in"], rows["trained"], rows["left_out"]) == (26, 11 + 5, 10)
    assert tokens["left_out"] > 0
    sources = prepared.ledger.as_dict()["sources"]
    assert [sources[name]["rows_seen"] for name in ("chats.jsonl", "more.jsonl")] == [11, 10]
    order = schedule_rows(prepared, {"global_batch_size": 4, "num_train_epochs": 1}, 1).order
    seen = Counter(map(tuple, order.items.tolist()))
    assert Counter(seen.values()) == {1: 11, 2: 5}


def test_the_order_of_rows_does_not_depend_on_how_steps_are_cut(run: Path) -> None:
    orders, held = [], []
    for runtime in ({}, {"micro_batch_tokens": 64}, {"micro_batch_size": 1}):
        context = make_context(run, "stage", "sft", runtime=runtime)
        chat = chat_of(context)
        data = data_of("chats.jsonl")
        prepared = prepare(data, context, sft.conversion(chat, data))
        schedule = schedule_rows(prepared, context.trainer, context.seed)
        limit = context.runtime.micro_batch_tokens or 4096
        step = sft_step(schedule.rows_of(0), PAD, min(256, limit), limit, context.runtime.micro_batch_size)
        orders.append(schedule.order.items.tolist())
        held.append(sorted(int(token) for piece in step.pieces for token in piece.tensors["labels"].flatten()))
        held[-1] = [token for token in held[-1] if token != IGNORE]
    assert orders[0] == orders[1] == orders[2]
    assert held[0] == held[1] == held[2]


def test_max_steps_decides_over_epochs(run: Path) -> None:
    prepared = prepared_for("sft", run, data_of("chats.jsonl"))
    for steps in (1, 5, 6, 13):
        schedule = schedule_rows(prepared, {"global_batch_size": 4, "max_steps": steps}, 1)
        assert schedule.steps == steps
        assert all(len(schedule.rows_of(step)) == 4 for step in range(steps))


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.3])
def test_wrapped_steps_are_as_many_as_were_asked(run: Path, tmp_path: Path, weight: float) -> None:
    # Long texts first in one epoch, short ones in the next: epochs of a broken weight differ in length.
    texts = [{"text": "a" * (400 if number % 2 else 3)} for number in range(6)]
    write_lines(tmp_path / "texts.jsonl", texts)
    source = {"path": str(tmp_path / "texts.jsonl"), "weight": weight}
    prepared = prepared_for("pretrain", run, data_of(source, max_length=16))
    for steps in (1, 7, 40, 111):
        schedule = schedule_wrapped(prepared, {"global_batch_size": 2, "max_steps": steps}, 1, 16)
        assert schedule.steps == steps
        assert all(len(row) == 16 for step in range(steps) for row in schedule.rows_of(step))


def test_the_log_of_a_wrapped_run_names_the_documents_of_each_step(run: Path) -> None:
    prepared = prepared_for("pretrain", run, data_of("texts.jsonl", max_length=16))
    schedule = schedule_wrapped(prepared, {"global_batch_size": 3, "num_train_epochs": 2}, 1, 16)
    read = np.concatenate([row.ids for step in range(schedule.steps) for row in schedule.rows_of(step)])
    assert len(read) == 2 * sum(map(len, prepared.rows[0]))
    for step in range(schedule.steps):
        named = prepared.at(schedule.order.of_step(step))
        ids = np.concatenate([row.ids for row in schedule.rows_of(step)])
        text = "".join(make_tokenizer().convert_ids_to_tokens(np.concatenate([row.ids for row in named])))
        assert "".join(make_tokenizer().convert_ids_to_tokens(ids)) in text


def test_too_many_dropped_rows_fail_and_are_named(run: Path) -> None:
    with pytest.raises(DataError, match=r"rows \(\d+\.\d %\) were dropped: longer than max_length .*chats.jsonl:\d+"):
        prepared_for("sft", run, data_of("chats.jsonl", max_length=60, long_rows="drop", max_dropped=0.1))
    with pytest.raises(DataError, match="no row can be trained on"):
        prepared_for("sft", run, data_of("chats.jsonl", max_length=8, max_dropped=1.0))


def test_pairs_that_become_the_same_are_dropped_with_the_reason(run: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "chosen": "the same beginning, one end", "rejected": "the same beginning, another"},
        {"prompt": "a long prompt " * 9, "chosen": "a", "rejected": "b"},
        {"prompt": "Q", "chosen": "yes", "rejected": "no"},
        {"prompt": "Q", "chosen": "x", "rejected": "x"},
    ]
    source = {"path": str(write_lines(tmp_path / "pairs.jsonl", rows))}
    prepared = prepared_for("dpo", run, data_of(source, max_length=38, max_dropped=1.0))
    counted, _ = total(prepared)
    assert counted["trained"] == 1
    reasons = dict(counted["dropped"])
    assert reasons.pop("both answers are the same once cut") == 1
    assert reasons.pop("the prompt fills max_length") == 1
    assert list(reasons.values()) == [1]  # the data room's word for chosen == rejected
    first = prepared.ledger.as_dict()["total"]["first_dropped"]
    assert first["both answers are the same once cut"][0].endswith("pairs.jsonl:1")
    with pytest.raises(DataError, match="the same once cut"):
        prepared_for("dpo", run, data_of(source, max_length=38))


def test_a_source_too_small_for_its_weight_is_no_silent_end(run: Path, tmp_path: Path) -> None:
    one = {"path": str(write_lines(tmp_path / "one.jsonl", chats(1))), "weight": 0.3}
    with pytest.raises(DataError, match="no row is left of an epoch at these weights"):
        prepared_for("sft", run, data_of(one))
    prepared = prepared_for("sft", run, data_of("chats.jsonl"))
    with pytest.raises(DataError, match="num_train_epochs leaves no row"):
        schedule_rows(prepared, {"global_batch_size": 4, "num_train_epochs": 0.01}, 1)


def test_sources_of_one_name_are_told_apart(run: Path) -> None:
    prepared = prepared_for("sft", run, data_of("chats.jsonl", "chats.jsonl", "more.jsonl"))
    assert prepared.names == ["chats.jsonl#1", "chats.jsonl#2", "more.jsonl"]


def test_documents_end_with_the_end_of_sequence_and_spell_no_control_token() -> None:
    tokenizer = make_tokenizer()
    rows: list[TextRow | PairRow] = [TextRow("ab", None), TextRow("<|im_end|>", None)]  # type: ignore[arg-type]
    results = list(text_rows.tokenise(rows, tokenizer, None, True))
    end = tokenizer.eos_token_id
    assert [result.ids[-1] for result in results] == [end, end]
    assert results[1].ids.count(end) == 1  # the text that spells it stays text
    assert tokenizer("<|im_end|>")["input_ids"] == [end]  # the tokenizer is left as it was
    (short,) = text_rows.tokenise([TextRow("a" * 30, None)], tokenizer, 8, True)  # type: ignore[arg-type]
    assert (len(short.ids), short.truncated) == (8, 23)


@pytest.mark.contract(number=11)
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_rows_held_out_are_counted_and_in_no_step(run: Path, kind: str) -> None:
    rows = [{**row, "prompt": f"Question {n}"} for n, row in enumerate(preferences(130))]
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    talk = [{"messages": [{**said[0], "content": f"Question {n}"}, said[1]]} for n in range(130)]
    write_lines(run / f"many-{kind}.jsonl", talk if kind == "sft" else rows)
    first = "chats.jsonl" if kind == "sft" else "pairs.jsonl"
    prepared = prepared_for(kind, run, data_of(first, f"many-{kind}.jsonl", held_out=7))
    counted, tokens = total(prepared)
    assert counted["held_out"] == len(prepared.held_out) == 7
    assert tokens["held_out"] > 0
    assert counted["trained"] == counted["in"] - 7 == sum(map(len, prepared.rows))
    prompts = {prompt_of(row) for row in prepared.held_out}
    schedule = schedule_rows(prepared, {"global_batch_size": 4, "num_train_epochs": 2}, seed=1)
    trained = [row for step in range(schedule.steps) for row in schedule.rows_of(step)]
    assert not prompts & {prompt_of(row) for row in trained}
    assert [len(place) for place in prepared.places] == [len(source) for source in prepared.rows]
    assert [len(index) for index in prepared.usable] == [len(source) for source in prepared.rows]
    where = prepared.places[1][:, 1].tolist()
    decode = make_tokenizer().decode
    shown = [decode(row.ids if kind == "sft" else row.prompt) for row in prepared.rows[1]]
    assert all(f"Question {at - 1}<" in text for at, text in zip(where, shown, strict=True))
    again = prepared_for(kind, run, data_of(first, f"many-{kind}.jsonl", held_out=7))
    assert prompts == {prompt_of(row) for row in again.held_out}
    default = prepared_for(kind, run, data_of(f"many-{kind}.jsonl"))
    assert (len(default.held_out), len(prepared_for(kind, run, data_of(first)).held_out)) == (1, 0)


def test_holding_out_everything_is_refused(run: Path) -> None:
    with pytest.raises(DataError, match="held_out: 21 leaves none of 21 rows"):
        prepared_for("sft", run, data_of("chats.jsonl", held_out=21))
