"""A fast slice of the template matrix (`scripts/template_matrix.py`), and proof that it can fail."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from chat_tiny import SPECIAL, bundled, make_tokenizer
from spm_tiny import make_spm_tokenizer

from posttrain.chat.render import MASKED
from posttrain.recipe.bundled import list_bundled

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "template_matrix.py"
NAMES = list_bundled("chat_templates")
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
TOKENIZERS = {
    "bytes": make_tokenizer(["</s>"], eos_token="</s>"),
    "spm": make_spm_tokenizer(SPECIAL, **ENDS),
}
KNOWN: dict[str, dict] = {name: {} for name in TOKENIZERS}


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("template_matrix", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["template_matrix"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def check(matrix, name, tokenizer="bytes", count=12):
    return matrix.check_pair(bundled(name), tokenizer, TOKENIZERS[tokenizer], count, KNOWN[tokenizer])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_every_template_with_made_up_tokenizers(matrix, name, tokenizer):
    cell = check(matrix, name, tokenizer)
    assert cell.failures == []
    assert cell.skipped == ""
    assert cell.taken == 12
    assert cell.equal_ids + cell.cut >= cell.rows >= 12


@pytest.mark.parametrize("name", ["chatml", "llama3"])
def test_with_a_real_tokenizer(matrix, shared_dir, name):
    real = matrix.load_any_tokenizer(shared_dir / "tokenizers" / "phi-2")
    cell = matrix.check_pair(bundled(name), "phi-2", real, 12, {})
    assert (cell.failures, cell.taken, bool(cell.added)) == ([], 12, True)


def test_a_copy_gets_the_tokens_and_the_original_stays(matrix):
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>")
    wanted = matrix.tokens_to_add(tokenizer, bundled("llama3"))
    fitted = matrix.fit(tokenizer, wanted, {})
    assert wanted["bos_token"] == ["<s>"]
    assert fitted.bos_token == "<s>"
    assert matrix.required_tokens_missing(fitted, bundled("llama3")) == []
    assert "<|eot_id|>" not in tokenizer.get_vocab()
    assert tokenizer.bos_token is None


def all_trained(row):
    return replace(row, labels=list(row.input_ids))


def end_masked(row):
    labels = [
        label if after != MASKED else MASKED for label, after in zip(row.labels, [*row.labels[1:], MASKED], strict=True)
    ]
    return replace(row, labels=labels)


def starts_late(row):
    labels = [
        label if before != MASKED else MASKED for label, before in zip(row.labels, [MASKED, *row.labels], strict=False)
    ]
    return replace(row, labels=labels)


def starts_early(row):
    first = next((at for at, label in enumerate(row.labels) if label != MASKED), 1)
    return replace(row, labels=[*row.labels[: first - 1], *row.input_ids[first - 1 : first], *row.labels[first:]])


def other_ids(row):
    return replace(row, input_ids=[*row.input_ids[:-1], 5])


@pytest.mark.parametrize("name", ["chatml", "qwen2.5"])
@pytest.mark.parametrize("broken", [all_trained, end_masked, starts_late, starts_early, other_ids])
def test_a_wrong_row_is_found(matrix, monkeypatch, broken, name):
    right = matrix.render_turns
    monkeypatch.setattr(matrix, "render_turns", lambda *given: [broken(row) for row in right(*given)])
    assert check(matrix, name, count=6).failures


def test_lost_stops_and_wrong_marks_are_found(matrix, monkeypatch):
    monkeypatch.setattr(matrix, "agree", lambda *_: [])
    assert any("saved:" in one for one in check(matrix, "llama3", count=3).failures)
    monkeypatch.undo()
    template = bundled("chatml")
    leaking = "{%- set x = 'y' -%}{%- endgeneration -%}{{- x -}}"  # set inside marks, it is not seen outside them
    marked = replace(template, source=template.source.replace("{%- endgeneration -%}", leaking))
    cell = matrix.check_pair(marked, "bytes", TOKENIZERS["bytes"], 3, KNOWN["bytes"])
    assert "the text differs with and without marks" in cell.failures


def test_wrong_facts_about_history_are_found(matrix):
    template = bundled("chatml")
    told = replace(template, facts=replace(template.facts, history="rewritten"))
    cell = matrix.check_pair(told, "bytes", TOKENIZERS["bytes"], 6, KNOWN["bytes"])
    assert cell.failures == ["facts say that history is rewritten; it is kept"]


def test_the_table_names_every_pair_and_failure(matrix):
    cells = [check(matrix, "chatml", count=3), check(matrix, "zephyr", count=3)]
    cells[1].failures = ["something", "something"]
    page = matrix.table(cells, 1.0, 3)
    assert "| chatml | ok+ |" in page
    assert "| zephyr | **2 failures** |" in page
    assert "* zephyr with bytes: something (2 times)" in page
