"""`history: split` and `system: fold` in a stage: every row and token accounted for, and found again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import ChatError
from posttrain.models.lineage import Lineage, Link
from posttrain.pretraining.order import rows_of_step, save_order
from posttrain.pretraining.rows import IGNORE
from posttrain.recipe.schema import Data, Sft
from posttrain.stages import dpo, sft
from posttrain.stages.conversation import Chat, open_chat
from posttrain.stages.prepare import Prepared, prepare
from posttrain.stages.schedule import schedule_rows
from tests.stages.stage_tiny import make_context, write_lines
from tests.training.spine_tiny import END, save_base

FORGETS = """\
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}{{- raise_exception('no system here') -}}{%- endif -%}
    {%- set said = message['content'] if loop.last else message['content'].split('</think>')[-1] -%}
    {{- '<|im_start|>' + message['role'] + '\\n' + said + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""A template that keeps what was thought in the last answer alone, and refuses system messages."""


def turns(*answers: str) -> dict[str, Any]:
    pairs = [({"role": "user", "content": f"Q{n}"}, {"role": "assistant", "content": a}) for n, a in enumerate(answers)]
    return {"messages": [message for pair in pairs for message in pair]}


ROWS = [
    turns("one"),
    turns("<think>a</think>one", "<think>b</think>two", "three"),
    turns("one", "two"),
    turns("<think>" + "long " * 30 + "</think>one", "two"),
]
PAIR = {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q"}]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_base(folder / "base")
    (folder / "forgets.jinja").write_text(FORGETS)
    write_lines(folder / "chats.jsonl", ROWS)
    spoken = [[{"role": "assistant", "content": text}] for text in ("yes", "no")]
    write_lines(folder / "pairs.jsonl", [{**PAIR, "chosen": spoken[0], "rejected": spoken[1]}])
    write_lines(folder / "kind.jsonl", [{"messages": [*PAIR["prompt"], *spoken[0]]}])
    return folder


def chat_of(run: Path) -> Chat:
    context = make_context(run, "stage", "sft")
    return open_chat(Lineage(Link(run / "base", "base", None)), "./forgets.jinja", context)


def data_of(path: str, **more: Any) -> Data:
    return Data.model_validate({"sources": [{"path": f"./{path}"}], "max_length": 512, **more})


def prepared_for(run: Path, data: Data, kind: str = "sft") -> Prepared[Any]:
    chat, module = chat_of(run), {"sft": sft, "dpo": dpo}[kind]
    return prepare(data, make_context(run, "stage", kind), module.conversion(chat, data))


def test_without_the_option_the_row_is_named_and_the_option_too(run: Path) -> None:
    with pytest.raises(ChatError, match=r"chats.jsonl:2: .*rewrites history(.|\n)*data\.history: split"):
        prepared_for(run, data_of("chats.jsonl"))


@pytest.mark.contract(number=11)
def test_conversations_that_need_it_become_one_row_per_answer(run: Path) -> None:
    prepared = prepared_for(run, data_of("chats.jsonl", history="split"))
    prepared.ledger.balance()
    total = prepared.ledger.as_dict()["total"]
    expected = {"in": 4, "split": 2, "made": 5, "trained": 7, "left_out": 0, "dropped": {}}
    assert {key: total["rows"][key] for key in expected} == expected
    assert total["tokens"]["in"] == sum(map(len, prepared.rows[0]))
    assert total["tokens"]["trained"] == sum(row.supervised for row in prepared.rows[0])
    assert prepared.places[0][:, 1].tolist() == [1, 2, 2, 2, 3, 4, 4]
    assert all(int(row.labels[row.labels != IGNORE][-1]) == END for row in prepared.rows[0])
    ends = [int((row.labels == END).sum()) for row in prepared.rows[0]]
    assert ends == [1, 1, 1, 1, 2, 1, 1]  # the third conversation stayed whole


def test_a_made_row_that_is_too_long_is_dropped_and_the_rest_is_not(run: Path) -> None:
    data = data_of("chats.jsonl", history="split", max_length=100, long_rows="drop", max_dropped=0.15)
    prepared = prepared_for(run, data)
    total = prepared.ledger.as_dict()["total"]
    assert (total["rows"]["made"], total["rows"]["trained"]) == (5, 6)
    assert total["rows"]["dropped"] == {"longer than max_length": 1}  # of 7 rows, not of 4 conversations
    first = total["first_dropped"]["longer than max_length"]
    assert [place.rpartition(":")[2] for place in first] == ["4"]


def test_steps_and_their_log_know_the_rows_that_were_made(run: Path, tmp_path: Path) -> None:
    prepared = prepared_for(run, data_of("chats.jsonl", history="split"))
    orders = [schedule_rows(prepared, {"global_batch_size": 2, "num_train_epochs": 1}, 1).order for _ in range(2)]
    assert orders[0].items.tolist() == orders[1].items.tolist()
    save_order(tmp_path, orders[0], prepared.names, prepared.files, prepared.places)
    found = Counter(row for step in range(orders[0].steps) for _, _, row in rows_of_step(tmp_path, step + 1))
    assert found == {1: 1, 2: 3, 3: 1, 4: 2}


def test_system_text_is_folded_alike_for_conversations_and_pairs(run: Path) -> None:
    with pytest.raises(ChatError, match=r"kind.jsonl:1: .*takes no system message(.|\n)*data\.system: fold"):
        prepared_for(run, data_of("kind.jsonl"))
    with pytest.raises(ChatError, match=r"pairs.jsonl:1: .*takes no system message"):
        prepared_for(run, data_of("pairs.jsonl"), "dpo")
    row = prepared_for(run, data_of("kind.jsonl", system="fold")).rows[0][0]
    pair = prepared_for(run, data_of("pairs.jsonl", system="fold"), "dpo").rows[0][0]
    tokenizer = chat_of(run).tokenizer
    assert tokenizer.decode(row.ids).startswith("<|im_start|>user\nBe kind.\n\nQ<|im_end|>")
    ids = [*pair.prompt.tolist(), *pair.chosen.tolist()]
    assert row.ids.tolist()[: len(ids)] == ids


def test_a_whole_stage_trains_made_rows_and_states_them(run: Path) -> None:
    context = make_context(run, "split", "sft", {"max_steps": 2, "logging_steps": 1})
    data = data_of("chats.jsonl", history="split")
    given = {"kind": "sft", "model": "@base", "chat_template": "./forgets.jinja", "method": {"lora": {"r": 2}}}
    config = Sft.model_validate({**given, "data": data.model_dump(exclude_none=True)})
    summary = sft.run(config, context)
    assert summary.ledger is not None
    assert summary.ledger["total"]["rows"]["made"] == 5
    assert summary.metrics["rows_that_stop"] == 1.0
    assert summary.metrics["chat"]["masks"] == "offsets"
    assert (context.folder / "chat_template.jinja").read_text() == FORGETS
    assert len(rows_of_step(context.folder, 1)) == 4
