"""A base that lacks a template's tokens: refused, mended, and trained in exactly its new rows, until it stops."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from posttrain.artifact import Artifact
from posttrain.doctor.fix import fix
from posttrain.errors import ChatError
from posttrain.models.new_tokens import NEW_TOKENS, read_new_tokens
from posttrain.pipeline.plan import plan
from posttrain.pipeline.preflight import preflight
from posttrain.pretraining.init import init_model
from posttrain.pretraining.tokenizer import train_tokenizer
from posttrain.recipe.load import load_recipe
from tests.in_process import run_in_process

ASKED = ["What is Spain?", "What is Basque?", "What is the euro?", "What is Latin?"]
ANSWERS = ["It is a country.", "It is a language.", "It is a currency.", "It is a script."]
SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
RECIPE = """
name: new-tokens
seed: 3
precision: fp32
runtime: {device: cpu}
stages:
  sft:
    kind: sft
    model: ./mended
    chat_template: chatml
    data: {sources: [{path: ./chats.jsonl}], max_length: 64}
    method: {lora: {r: 16, lora_alpha: 32}}
    trainer: {learning_rate: 2e-2, global_batch_size: 4, max_steps: 70, lr_scheduler_type: cosine}
  merged: {kind: merge, model: "@sft"}
"""


def make_base(folder: Path, tied: bool) -> Path:
    """A base as `pretrain` leaves one, of random weights, whose tokenizer has no chat tokens."""
    texts = [f"{question} {answer}\n" for question, answer in zip(ASKED, ANSWERS, strict=True)] * 20
    tokenizer = train_tokenizer(texts, 380, [], 64, folder)
    size = {**SIZE, "max_position_embeddings": 64, "initializer_range": 0.1, "tie_word_embeddings": tied}
    init_model(size, tokenizer, seed=5).save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, mended, and a run with an adapter on it and the merged model."""
    home = tmp_path_factory.mktemp("new_tokens")
    make_base(home / "base", tied=request.param)
    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]}
        for turns in zip(ASKED, ANSWERS, strict=True)
    ]
    (home / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "recipe.yaml").write_text(RECIPE)
    fix(home / "base", home / "mended", "chatml")
    run_in_process(load_recipe(home / "recipe.yaml", [], os.environ), home / "run")
    return home


def test_the_base_is_refused_and_the_remedy_mends_it(project: Path) -> None:
    loaded = load_recipe(project / "recipe.yaml", ["stages.sft.model=./base"], os.environ)
    with pytest.raises(ChatError, match=r"needs <\|im_start\|>, <\|im_end\|>") as refused:
        preflight(loaded, plan(loaded, project / "other"))
    assert "posttrain doctor BASE --template chatml --fix OUT" in refused.value.todo


def test_the_mended_copy_has_a_row_for_each_new_token(project: Path) -> None:
    base, mended = tensors(project / "base"), tensors(project / "mended")
    new = read_new_tokens(project / "mended")
    assert [token.token for token in new] == ["<|im_start|>", "<|im_end|>"]
    assert new[1].begins_as == ("<|endoftext|>",)
    assert base.keys() == mended.keys()
    ids = [token.id for token in new]
    config = json.loads((project / "mended" / "config.json").read_text())
    for name, values in base.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert len(mended[name]) == config["vocab_size"] >= max(*ids, len(values) - 1) + 1
            kept = [row for row in range(len(values)) if row not in ids]
            np.testing.assert_array_equal(mended[name][kept], values[kept])
            assert len(np.unique(mended[name][ids], axis=0)) == 2
        else:
            np.testing.assert_array_equal(mended[name], values)


def test_exactly_the_new_rows_are_trained(project: Path) -> None:
    ids = [token.id for token in read_new_tokens(project / "mended")]
    sft = Artifact.read(project / "run" / "sft")
    assert sft is not None
    assert sft.record.summary["metrics"]["token_rows"] == ids
    mended, merged = tensors(project / "mended"), tensors(project / "run" / "merged")
    assert merged.keys() == mended.keys()  # tied: no output matrix appears; untied: it stays
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & merged.keys():
        changed = np.flatnonzero((merged[name] != mended[name]).any(axis=1))
        assert changed.tolist() == ids
    tied = "lm_head.weight" not in mended
    assert json.loads((project / "run" / "merged" / "config.json").read_text())["tie_word_embeddings"] is tied


def test_trained_rows_are_no_longer_new(project: Path) -> None:
    assert (project / "mended" / NEW_TOKENS).is_file()
    for stage in ("sft", "merged"):
        assert read_new_tokens(project / "run" / stage) == ()


def test_the_merged_model_stops(project: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def says(folder: Path, question: str) -> list[int]:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()

    tokenizer = AutoTokenizer.from_pretrained(project / "mended")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for question in ASKED:
        *answer, last = says(project / "run" / "merged", question)
        assert last == end
        assert tokenizer.decode(answer) in ANSWERS
    assert end not in says(project / "mended", ASKED[0])


def test_mending_the_mended_changes_nothing(project: Path, tmp_path: Path) -> None:
    repair = fix(project / "mended", tmp_path / "again", "chatml")
    assert repair.changes == ()
    assert read_new_tokens(tmp_path / "again") == read_new_tokens(project / "mended")
    for path in (project / "mended").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
