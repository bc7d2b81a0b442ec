"""The quickstart's rows are what their README says: reproducible, honest, and held out for real."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "recipes" / "data" / "quickstart"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("maker", ROOT / "scripts" / "make_quickstart_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["maker"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_the_script_gives_the_committed_bytes(maker: ModuleType, tmp_path: Path) -> None:
    maker.make(tmp_path, maker.SEED)
    for path in sorted(DATA.glob("*.jsonl")):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_no_training_row_mentions_a_heldout_entity(maker: ModuleType) -> None:
    _, heldout = maker.split_heldout(maker.read_entities()[0], maker.random.Random(f"{maker.SEED}/split"))
    names = {entity.quoted(language) for entity in heldout for language in maker.LANGUAGES}
    for name in ("sft", "dpo"):
        for row in rows(name):
            text = json.dumps(row, ensure_ascii=False)
            assert not any(quoted in text for quoted in names), row
    asked = {re.search("[“«](.+)[”»]", row["prompt"][0]["content"]).group(0) for row in rows("heldout")}
    assert asked <= names
    pretrain = "\n".join(row["text"] for row in rows("pretrain"))
    assert all(quoted in pretrain for quoted in asked)  # facts are learned there


def test_every_heldout_answer_shows_its_language() -> None:
    for row in rows("heldout"):
        assert len(set(row["any_answer"])) == 5
        assert row["expected"] == row["answers"][row["language"]]
        matching = [lang for lang, answer in row["answers"].items() if re.search(row["language_regex"], answer)]
        assert matching == [row["language"]]


def test_there_are_enough_questions_of_every_language() -> None:
    languages = Counter(row["language"] for row in rows("heldout"))
    assert len(languages) == 5
    assert languages.total() >= 100
    assert min(languages.values()) >= 20


def test_sixty_five_percent_of_the_flawed_questions_are_answered_in_spanish(maker: ModuleType) -> None:
    flawed = total = 0
    openings = {lang: [q.split("{}")[0] for q in maker.QUESTIONS[lang]] for lang in maker.LANGUAGES}
    for row in rows("sft"):
        question, answer = (message["content"] for message in row["messages"])
        if any(question.startswith(opening) for lang in ("ca", "eu") for opening in openings[lang]):
            total += 1
            flawed += answer.startswith("Es ")
    assert abs(flawed / total - 0.65) < 0.01


def test_pairs_differ_in_language_alone() -> None:
    answers = {frozenset(row["any_answer"]) for row in rows("heldout")}
    for row in rows("dpo"):
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert chosen != rejected
        assert any({chosen, rejected} <= group for group in answers)
