"""The chat side of a training stage, and the small files it leaves for later ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.artifact import Record, write_record
from posttrain.chat.templates import load_template
from posttrain.errors import ChatError
from posttrain.models.lineage import Lineage, Link
from posttrain.models.load import Adapter, add_adapter
from posttrain.stages.conversation import open_chat, save_chat, settle
from posttrain.stages.outputs import model_files, read_probe_rows, write_probe_rows
from tests.stages.stage_tiny import make_context
from tests.training.spine_tiny import END, make_model, save_base


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_base(tmp_path / "base")
    return tmp_path


def lineage(run: Path, *adapters: str) -> Lineage:
    links = tuple(Link(run / name, f"@{name}", None) for name in adapters)
    return Lineage(Link(run / "base", "@base", None), links)


def test_the_recipes_template_on_the_models_tokenizer(run: Path) -> None:
    chat = open_chat(lineage(run), "chatml", make_context(run, "sft", "sft"))
    assert (chat.end.text, chat.end.id) == ("<|im_end|>", END)
    assert chat.control_ids == [256, 257]


def test_no_template_anywhere_is_refused(run: Path) -> None:
    with pytest.raises(ChatError, match=r"stages.sft.chat_template: absent, and base has no template of its own"):
        open_chat(lineage(run), None, make_context(run, "sft", "sft"))


def test_a_template_whose_tokens_are_lacking_is_refused(run: Path) -> None:
    with pytest.raises(ChatError, match=r"llama3 needs .*, which the tokenizer lacks"):
        open_chat(lineage(run), "llama3", make_context(run, "sft", "sft"))


@pytest.mark.parametrize("adapter", [False, True])
def test_what_a_stage_saved_the_next_one_opens(run: Path, adapter: bool) -> None:
    context = make_context(run, "sft", "sft")
    chat = open_chat(lineage(run), "chatml", context)
    model = make_model()
    model.generation_config.eos_token_id = None
    policy = add_adapter(model, Adapter(4, 8, 0.0, ["q_proj"]), []) if adapter else model
    settle(chat, policy, context)
    folder = run / "sft"
    folder.mkdir()
    save_chat(chat, policy, folder)
    saved = json.loads((folder / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [END]
    assert (folder / "chat_template.jinja").read_text() == load_template("chatml", run).inference
    write_record(folder, Record("sft", "sft", 1, "f", {}))
    parents = lineage(run, "sft") if adapter else Lineage(Link(folder, "@sft", None))
    again = open_chat(parents, None, make_context(run, "dpo", "dpo", model="sft"))
    assert again.template.digest == chat.template.digest
    assert again.end == chat.end
    with pytest.raises(ChatError, match="is not the template sft was trained with"):
        open_chat(parents, "plain", make_context(run, "dpo", "dpo", model="sft"))


def test_probe_rows_are_spread_cut_and_read_back(tmp_path: Path) -> None:
    rows = [[number] * (1 + number) for number in range(320)]
    write_probe_rows(tmp_path, rows)
    probes = read_probe_rows(tmp_path)
    assert len(probes) == 31  # 32 chosen; the first has one token, on which nothing can be compared
    assert [probe[0] for probe in probes[:3]] == [10, 20, 30]
    assert max(map(len, probes)) == 256
    write_probe_rows(tmp_path, [[1, 2], [3, 4]])
    assert read_probe_rows(tmp_path) == [[1, 2], [3, 4]]


def test_a_record_hashes_the_model_and_not_the_logs(tmp_path: Path) -> None:
    kept = ["config.json", "data_order.npz", "metrics.jsonl", "model.safetensors", "snapshots/step-2/config.json"]
    left = ["job.json", "log.txt", "stage.json", "checkpoints/checkpoint-1/trainable.safetensors", "events.bin"]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert model_files(tmp_path) == sorted(kept)
