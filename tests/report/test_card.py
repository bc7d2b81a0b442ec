"""The card says what the records say, in valid YAML and Markdown."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import yaml

from posttrain.artifact import RECORD, Artifact, Record
from posttrain.data.ledger import Ledger
from posttrain.data.rows import Dropped, Origin
from posttrain.report.card import Card, model_card
from posttrain.report.history import history
from tests.report.test_markdown import make_report


def record(stage: str, kind: str, inputs: dict[str, str], **more: object) -> Record:
    identity = {"kind": kind, "seed": 7, "precision": "bf16", **more.pop("identity", {})}  # type: ignore[dict-item]
    provenance = {"seconds": 100.0, "versions": {"torch": "2.13.0", "trl": "not installed"}, "python": "3.11.9"}
    return Record(stage, kind, 1, "f" * 64, identity, inputs=inputs, provenance=provenance, **more)  # type: ignore[arg-type]


def make_ledger() -> dict[str, object]:
    ledger = Ledger()
    for source in ("HuggingFaceH4/ultrachat_200k", "/home/me/rows.jsonl"):
        ledger.read(source, 1790, [Dropped(Origin("/home/me/rows.jsonl", 3), "empty answer")])
        ledger.enter(source, tokens=20_000)
        ledger.train(source, supervised=12_000, masked=8_000, rows=1789)
    ledger.balance()
    return ledger.as_dict()


def write_run(run: Path) -> Artifact:
    records = [
        record(
            "sft",
            "sft",
            {"model": "mistralai/Mistral-7B-v0.1@" + "a" * 40},
            identity={
                "model": {"hub": "mistralai/Mistral-7B-v0.1", "commit": "a" * 40},
                "data": {
                    "sources": [
                        {
                            "hub": "HuggingFaceH4/ultrachat_200k",
                            "commit": "b" * 40,
                            "split": "train",
                            "weight": 0.5,
                        },
                        {"content": "c" * 64, "rows": 1790},
                    ]
                },
                "trainer": {"learning_rate": 2e-4, "beta": None, "adam_beta1": 0.9},
            },
            ledger=make_ledger(),
            summary={"headline": "loss 1.5"},
        ),
        record("unrelated", "sft", {}),
        record(
            "aligned",
            "merge",
            {"model": "@dpo"},
            summary={"headline": "ok", "metrics": {"certificate": {"mean_kl": 1.5e-6}, "merged_from": "/home/me/base"}},
        ),
        record("dpo", "dpo", {"model": "@sft"}, summary={"metrics": {"step_zero": {"loss": 0.693147}}}),
    ]
    for one in records:
        (run / one.stage).mkdir(parents=True)
        (run / one.stage / RECORD).write_text(json.dumps(asdict(one)), encoding="utf-8")
    found = Artifact.read(run / "aligned")
    assert found is not None
    return found


def test_history_is_the_line_of_parents_oldest_first(tmp_path: Path) -> None:
    assert [one.stage for one in history(write_run(tmp_path))] == ["sft", "dpo", "aligned"]


def test_history_ends_where_a_stage_is_gone(tmp_path: Path) -> None:
    aligned = write_run(tmp_path)
    (tmp_path / "sft" / RECORD).unlink()
    assert [one.stage for one in history(aligned)] == ["dpo", "aligned"]


def test_card_tells_the_whole_way(tmp_path: Path) -> None:
    records = history(write_run(tmp_path))
    text = model_card(
        Card("me/zephyr", records, "mistralai/Mistral-7B-v0.1", "mit", make_report(), "<|im_end|>", "me/zephyr")
    )
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["posttrain", "sft", "dpo"],
        "license": "mit",
        "base_model": "mistralai/Mistral-7B-v0.1",
        "datasets": ["HuggingFaceH4/ultrachat_200k"],
    }
    assert body.lstrip().startswith("# me/zephyr\n")
    assert "sft (sft) → dpo (dpo) → aligned (merge)" in body
    assert "| `HuggingFaceH4/ultrachat_200k` | commit bbbbbbbbbbbb | train | × 0.5 |" in body
    assert f"| rows.jsonl | sha256 {'c' * 16} |  | 1790 rows |" in body
    assert "| learning_rate | 0.0002 |" in body
    assert "| beta |" not in body
    assert '"adam_beta1": 0.9' in body
    assert "| rows.jsonl | 1,790 | 1,789 | 0 | 1 | 20,000 | 12,000 | 8,000 | 0 |" in body
    assert "Dropped: 2 empty answer." in body
    assert "| mean kl | 1.5e-06 |" in body
    assert "| loss | 0.6931 |" in body
    assert "/home/me" not in text
    assert "74.0 % [66.5, 80.3]" in body
    assert "+29.0 points" in body
    assert "- torch 2.13.0" in body
    assert "trl" not in body.split("## Made with")[1]
    assert "- time of all stages: 300 s" in body
    assert "`<|im_end|>`" in body
    assert 'from_pretrained("me/zephyr")' in body
    assert "Only what the tables show was measured (questions)" in body
    assert text == model_card(
        Card("me/zephyr", records, "mistralai/Mistral-7B-v0.1", "mit", make_report(), "<|im_end|>", "me/zephyr")
    )


def test_card_without_records_claims_nothing() -> None:
    text = model_card(Card("plain", []))
    assert "Nothing was measured" in text
    assert "No record." in text
    assert "license" not in text.split("---\n")[1]
