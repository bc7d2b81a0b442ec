"""Checkpoints with odd files: what is found in them, what `--fix` makes of them, and what it says when it cannot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from zoo import EMBEDDING, Specimen, llama3, qwen, read_tensors

from posttrain.chat.render import render_prompt
from posttrain.chat.templates import load_template, read_folder_template
from posttrain.chat.tokenizer import load_tokenizer
from posttrain.doctor import fix as fixing
from posttrain.doctor.diagnose import diagnose
from posttrain.doctor.fix import fix
from posttrain.errors import CheckpointError, UserError

CONFIG = "tokenizer_config.json"


def written(specimen: Specimen, folder: Path) -> Path:
    """The specimen as a folder."""
    specimen.write(folder)
    return folder


def ids(folder: Path) -> list[str]:
    """What is found in a folder, notes left out."""
    return [finding.id for finding in diagnose(folder).findings if finding.severity != "note"]


@pytest.mark.parametrize("template", ["gemma3", "llama3", "mistral-v3"])
def test_a_template_that_begins_with_bos_brings_one(tmp_path: Path, template: str) -> None:
    """Qwen has none; a token called `bos_token` was added to it, twice."""
    repair = fix(written(qwen(), tmp_path / "qwen"), tmp_path / "out", template)
    assert [finding.id for finding in repair.left if finding.severity != "note"] == []
    tokenizer = load_tokenizer(tmp_path / "out")
    assert tokenizer.bos_token == "<|begin_of_text|>"
    assert "bos_token" not in tokenizer.get_vocab()
    bundled = load_template(template, tmp_path)
    assert render_prompt(tokenizer, bundled, [{"role": "user", "content": "x"}])[0] == tokenizer.bos_token_id
    listing = json.loads((tmp_path / "out" / "posttrain_tokens.json").read_text())
    assert tokenizer.bos_token_id in {entry["id"] for entry in listing["new"]}
    assert fix(tmp_path / "out", tmp_path / "again").changes == ()


def test_the_bos_is_a_token_that_is_there(tmp_path: Path) -> None:
    specimen = llama3()
    del specimen.tokenizer_config["bos_token"]
    specimen.tokenizer["added_tokens"][0]["content"] = "<s>"
    specimen.tokenizer = json.loads(json.dumps(specimen.tokenizer).replace("<|begin_of_text|>", "<s>"))
    repair = fix(written(specimen, tmp_path / "llama"), tmp_path / "out", "llama3")
    assert f'{CONFIG}, bos_token: absent -> "<s>"' in repair.changes
    assert not any("added as" in change for change in repair.changes)


def test_missing_tokens_do_not_hide_a_template_that_drops_what_is_said(tmp_path: Path) -> None:
    specimen = qwen()
    specimen.template = "{% for message in messages %}<|turn|>{{ message.role }}{% endfor %}"
    assert ids(written(specimen, tmp_path / "qwen")) == ["template-broken"]


def test_an_empty_eos_token_is_none(tmp_path: Path) -> None:
    specimen = qwen()
    specimen.tokenizer_config["eos_token"] = ""
    assert ids(written(specimen, tmp_path / "qwen")) == ["eos-missing"]
    assert fix(tmp_path / "qwen", tmp_path / "out").left == ()


@pytest.mark.parametrize("value", [[], {}])
def test_no_templates_are_no_template(tmp_path: Path, value: Any) -> None:
    specimen = qwen()
    specimen.template, specimen.tokenizer_config["chat_template"] = None, value
    assert read_folder_template(written(specimen, tmp_path / "qwen")) is None
    assert ids(tmp_path / "qwen") == ["no-template"]


def test_a_byte_order_mark_is_found_and_removed(tmp_path: Path) -> None:
    specimen = qwen()
    before = specimen.template
    specimen.template = f"\ufeff{before}"
    assert ids(written(specimen, tmp_path / "qwen")) == ["template-indented"]
    assert fix(tmp_path / "qwen", tmp_path / "out").left == ()
    assert (tmp_path / "out" / "chat_template.jinja").read_text(encoding="utf-8") == before


def test_a_row_that_is_no_number_spoils_no_new_row(tmp_path: Path) -> None:
    specimen = qwen()
    specimen.dtype = "F32"
    specimen.tensors[EMBEDDING][5] = np.nan
    before = len(specimen.tensors[EMBEDDING])
    fix(written(specimen, tmp_path / "qwen"), tmp_path / "out", "llama4")
    after = read_tensors(tmp_path / "out")[EMBEDDING]
    assert len(after) > before
    assert np.isnan(after).any(axis=1).nonzero()[0].tolist() == [5]


def test_errors_of_a_repair_name_the_source(tmp_path: Path) -> None:
    """Not the copy, which is gone by then."""
    folder = written(qwen(), tmp_path / "qwen")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"I16" '))
    with pytest.raises(CheckpointError) as caught:
        fix(folder, tmp_path / "out", "gemma")
    assert caught.value.where == str(path)
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_is_an_error_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(qwen(), tmp_path / "qwen")

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(fixing.shutil, "copyfile", full)
    with pytest.raises(UserError, match="No space left on device"):
        fix(folder, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["qwen"]


def test_this_folder_is_no_place_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(qwen(), tmp_path / "qwen")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="exists already"):
        fix(folder, Path())
