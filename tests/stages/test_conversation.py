"""The chat side of a training stage, and the small files it leaves for later ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.artifact import Record, write_record
from posttrain.chat.render import render_conversation
from posttrain.chat.templates import load_template, template_digest
from posttrain.errors import ChatError
from posttrain.models.lineage import Lineage, Link
from posttrain.models.load import Adapter, add_adapter
from posttrain.stages.conversation import open_chat, save_chat, settle
from posttrain.stages.outputs import model_files
from tests.stages.stage_tiny import make_context
from tests.training.spine_tiny import END, make_model, save_base

CHAT = [
    {"role": "user", "content": "Zer da?"},
    {"role": "assistant", "content": "Herri bat."},
    {"role": "user", "content": "Eta hau?"},
    {"role": "assistant", "content": "Hiri bat."},
]


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


def test_marks_are_made_for_a_template_of_ones_own_and_what_is_saved_stays(run: Path) -> None:
    bare = load_template("chatml", run).inference + "{# mine #}"
    (run / "mine.jinja").write_text(bare)
    chat = open_chat(lineage(run), "./mine.jinja", make_context(run, "sft", "sft"))
    assert chat.template.facts.marks == "exact"
    assert chat.template.inference == bare
    assert chat.as_dict() == {
        "template": "mine.jinja",
        "digest": template_digest(bare),
        "end_of_turn": "<|im_end|>",
        "masks": "marks",
    }
    rendered = render_conversation(chat.tokenizer, chat.template, CHAT)
    assert rendered == render_conversation(chat.tokenizer, load_template(str(run / "mine.jinja"), run), CHAT)


def test_where_marks_cannot_be_proved_offsets_serve_and_one_note_says_why(run: Path) -> None:
    kept = "(message['content'] if loop.last else message['content'].split('</think>')[-1])"
    forgets = load_template("chatml", run).inference.replace("message['content']", kept)
    (run / "forgets.jinja").write_text(forgets)
    notes: list[str] = []
    events = replace(make_context(run, "sft", "sft"), events=lambda event, **fields: notes.append(fields["text"]))  # type: ignore[arg-type]
    chat = open_chat(lineage(run), "./forgets.jinja", events)
    assert chat.as_dict()["masks"] == "offsets"
    assert len(notes) == 1
    assert notes[0].startswith("forgets.jinja: answers are found by rendering, not by marks: ")


def test_a_template_that_begins_twice_is_refused(run: Path) -> None:
    (run / "twice.jinja").write_text("{{ bos_token }}{{ bos_token }}" + load_template("chatml", run).inference)
    config = json.loads((run / "base/tokenizer_config.json").read_text())
    (run / "base/tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|im_start|>"}))
    with pytest.raises(ChatError, match=r"begins a conversation with .* twice"):
        open_chat(lineage(run), "./twice.jinja", make_context(run, "sft", "sft"))


@pytest.mark.parametrize("kind", ["sft", "dpo", "merge"])
def test_the_template_of_a_stage_of_ours_is_settled(run: Path, kind: str) -> None:
    folder = run / "below"
    save_base(folder)
    (folder / "chat_template.jinja").write_text(load_template("chatml", run).inference)
    write_record(folder, Record("below", kind, 1, "f", {}))
    below = Lineage(Link(folder, "@below", None))
    context = make_context(run, "dpo", "dpo", model="below")
    assert open_chat(below, "chatml", context).template.name == "chatml"  # the same one may be named
    (run / "other.jinja").write_text(load_template("chatml", run).inference + " ")
    with pytest.raises(ChatError, match="is not the template below was trained with"):
        open_chat(below, "./other.jinja", context)


def test_a_record_hashes_the_model_and_not_the_logs(tmp_path: Path) -> None:
    kept = ["config.json", "data_order.npz", "metrics.jsonl", "model.safetensors", "snapshots/step-2/config.json"]
    left = ["job.json", "log.txt", "stage.json", "checkpoints/checkpoint-1/trainable.safetensors", "events.bin"]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert model_files(tmp_path) == sorted(kept)
