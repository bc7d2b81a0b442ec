"""The evaluate stage on three tiny models and files, through its own door."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from posttrain.artifact import RECORD, Record
from posttrain.chat.templates import load_template
from posttrain.data.rows import Origin, PairRow
from posttrain.errors import ChatError, PosttrainError, UserError
from posttrain.evaluation.likelihood import preference
from posttrain.models.lineage import Lineage, Link
from posttrain.models.load import Adapter, add_adapter, load_base
from posttrain.recipe.bundled import find_bundled
from posttrain.recipe.schema import Evaluate, Runtime
from posttrain.stages.context import Context, Events, ModelInput
from posttrain.stages.evaluate import run
from tests.evaluation.tiny import END, make_tokenizer, save


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without a template, an instruct, and an aligned model that says its end of turn at once."""
    folder = tmp_path_factory.mktemp("run")
    template = find_bundled("chat_templates", "chatml").read_text(encoding="utf-8")
    save(folder / "base", 0, None)
    save(folder / "instruct", 1, template)
    save(folder / "aligned", 2, template)
    model = LlamaForCausalLM.from_pretrained(folder / "aligned")
    with torch.no_grad():  # every position's features are one constant, and the end of turn likes it best
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight.zero_()
        model.lm_head.weight[END] = 1.0
    model.save_pretrained(folder / "aligned")
    rows = [{"prompt": f"What is {name}?", "answer": "", "names": [name, "x"]} for name in ("eu", "ca", "gl", "es")]
    rows.append({"prompt": "long " * 60, "answer": "", "names": ["x"]})
    write_lines(folder / "questions.jsonl", rows)
    pairs = [{"prompt": f"Q{i}", "chosen": "yes" * (i + 1), "rejected": "no"} for i in range(5)]
    write_lines(folder / "pairs.jsonl", [*pairs, {"prompt": "same", "chosen": "a", "rejected": "a"}])
    write_lines(folder / "texts.jsonl", [{"text": "kaixo mundua"}, {"text": "bon dia"}])
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def settings(**more: Any) -> dict[str, Any]:
    suites = [
        {
            "name": "questions",
            "kind": "generate",
            "data": [{"path": "questions.jsonl"}],
            "max_length": 120,
            "max_new_tokens": 4,
            "checks": [
                {"name": "stops", "kind": "stops"},
                {"name": "known", "kind": "any_of", "field": "names"},
                {"name": "blank", "kind": "regex", "value": "^$"},
            ],
        },
        {"name": "pairs", "kind": "preference", "data": [{"path": "pairs.jsonl"}]},
        {"name": "text", "kind": "bits_per_byte", "data": [{"path": "texts.jsonl"}], "max_length": 8},
    ]
    models = {"base": "@base", "instruct": "@instruct", "aligned": "@aligned"}
    return {"kind": "evaluate", "models": models, "chat_template": "chatml", "suites": suites, **more}


def context(run_dir: Path, folder: Path, config: Evaluate, events: Events | None = None) -> Context:
    inputs = {f"models.{name}": ModelInput(ref, run_dir / ref[1:]) for name, ref in config.models.items()}
    return Context(
        run_dir=run_dir,
        recipe_dir=run_dir,
        stage="report",
        folder=folder,
        seed=42,
        precision="fp32",
        runtime=Runtime(device="cpu"),
        trainer={},
        inputs=inputs,
        identity={},
        fingerprint="",
        events=events or Events(None),
        should_stop=lambda: False,
    )


def test_one_run_of_everything(run_dir: Path, tmp_path: Path) -> None:
    gates = [
        {"suite": "questions", "metric": "stops", "model": "aligned", "minus": "instruct", "min": 0.5},
        {"suite": "questions", "metric": "stops", "model": "instruct", "min": 0.9},
    ]
    config = Evaluate.model_validate(settings(require=gates))
    read, write = os.pipe()
    summary = run(config, context(run_dir, tmp_path, config, Events(write)))
    os.close(write)
    with os.fdopen(read) as lines:
        phases = [json.loads(line)["text"] for line in lines]

    assert "aligned: pairs (5 rows)" in phases
    names = ["report.json", "report.md", "answers/questions.jsonl", "answers/pairs.jsonl", "answers/text.jsonl"]
    assert summary.files == names
    report = json.loads((tmp_path / "report.json").read_text())
    questions, pairs, text = report["suites"]
    assert (questions["rows"], questions["left_out"]) == (4, 1)
    stops = questions["metrics"]["stops"]
    assert {name: figure["value"] for name, figure in stops["models"].items()} == {
        "base": 0.0,
        "instruct": 0.0,
        "aligned": 1.0,
    }
    assert questions["metrics"]["blank"]["models"]["aligned"]["value"] == 1.0
    assert pairs["rows"] == 5
    assert any("1 rows of pairs.jsonl not used: chosen" in note for note in report["notes"])
    # The aligned model gives 257 of 258 tokens one logit: its bits are known.
    assert text["metrics"]["bits_per_byte"]["models"]["aligned"]["value"] > 8
    assert [gate["passed"] for gate in report["gates"]] == [True, False]
    assert summary.failed == ["questions: stops of instruct must be at least 0.9; it is 0 [0, 0.4899]"]
    assert summary.headline == "aligned: stops 100 % (51-100), +100 points over instruct (+100..+100)"
    assert summary.metrics["questions"]["stops"] == stops

    rows = [json.loads(line) for line in (tmp_path / "answers" / "questions.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    assert rows[0]["question"] == [{"role": "user", "content": "What is eu?"}]
    assert rows[0]["expected"]["known"] == ["eu", "x"]
    assert rows[0]["models"]["aligned"]["verdicts"] == {"stops": True, "known": False, "blank": True}
    assert rows[4]["models"] == {"base": None, "instruct": None, "aligned": None}
    assert (tmp_path / "report.md").read_text().startswith("# Evaluation: base · instruct · aligned")
    assert "**FAIL**" in (tmp_path / "report.md").read_text()


def test_same_run_writes_the_same_bytes(run_dir: Path, tmp_path: Path) -> None:
    config = Evaluate.model_validate(settings())
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(config, context(run_dir, tmp_path / name, config))
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_max_rows_takes_the_first(run_dir: Path, tmp_path: Path) -> None:
    suite = {**settings()["suites"][2], "max_rows": 1}
    config = Evaluate.model_validate(settings(suites=[suite], chat_template=None))  # texts need no template
    run(config, context(run_dir, tmp_path, config))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["suites"][0]["rows"] == 1
    assert "text: no more than the first 1 rows (`max_rows`)." in report["notes"]


def changed(suite: int, **more: Any) -> dict[str, Any]:
    made = settings()
    made["suites"][suite] = {**made["suites"][suite], **more}
    return made


@pytest.mark.parametrize(
    ("given", "where", "found"),
    [
        (settings(chat_template=None), "models.base", "has no chat template"),
        (changed(1, name="questions"), "suites[1].name", "a second suite"),
        (changed(1, name="../x"), "suites[1].name", "cannot name a file"),
        (changed(0, checks=[{"name": "a", "kind": "exact"}]), "suite questions, check a", "needs an expected value"),
        (changed(0, prompt_field="question"), "questions.jsonl:1", "no field `question`"),
        (settings(require=[{"suite": "q", "metric": "stops", "model": "base"}]), "require[0].suite", "unknown: q"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    run_dir: Path, tmp_path: Path, given: dict[str, Any], where: str, found: str
) -> None:
    config = Evaluate.model_validate(given)
    with pytest.raises(PosttrainError) as caught:
        run(config, context(run_dir, tmp_path, config))
    assert caught.value.exit_code == 2
    assert where in caught.value.where
    assert found in caught.value.found
    assert list(tmp_path.iterdir()) == []


def test_foreign_adapter_is_refused_with_advice(run_dir: Path, tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", 3, None)
    (adapter / "adapter_config.json").write_text("{}")
    config = Evaluate.model_validate({**settings(), "models": {"sft": "@sft"}})
    given = context(run_dir, tmp_path, config)
    given.inputs["models.sft"] = ModelInput("./adapter", adapter)
    with pytest.raises(PosttrainError, match="merge") as caught:
        run(config, given)
    assert caught.value.exit_code == 2


def test_adapter_of_ours_is_scored_on_the_base_that_its_record_names(run_dir: Path, tmp_path: Path) -> None:
    base = run_dir / "instruct"
    model = add_adapter(load_base(base, torch.float32, "cpu", "sdpa"), Adapter(4, 8, 0.0, "all-linear"), [])
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    adapter = run_dir / "sft"
    model.save_pretrained(str(adapter))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, adapter / name)
    lineage = Lineage(Link(base, "@instruct", None)).grown(Link(adapter, "@sft", None), None)
    record = Record("sft", "sft", 1, "f" * 64, {}, lineage=lineage.as_dict(run_dir))
    (adapter / RECORD).write_text(json.dumps(asdict(record)))
    config = Evaluate.model_validate({**settings(), "models": {"plain": "@instruct", "tuned": "@sft"}})
    run(config, context(run_dir, tmp_path, config))
    pair = json.loads((tmp_path / "answers" / "pairs.jsonl").read_text().splitlines()[2])
    merged = model.merge_and_unload()
    row = PairRow(
        [{"role": "user", "content": "Q2"}],
        [{"role": "assistant", "content": "yes" * 3}],
        [{"role": "assistant", "content": "no"}],
        None,
        Origin("", 1),
    )
    expected = preference(merged, make_tokenizer(), load_template("chatml", run_dir), [row], 512)[0]
    assert expected is not None
    assert pair["models"]["tuned"]["chosen"] == pytest.approx(expected.chosen, rel=1e-4)
    assert pair["models"]["plain"]["chosen"] != pytest.approx(expected.chosen, rel=1e-2)


@pytest.mark.parametrize("kind", ["generate", "preference"])
def test_system_text_is_folded_where_a_template_refuses_it(run_dir: Path, tmp_path: Path, kind: str) -> None:
    chatml = find_bundled("chat_templates", "chatml").read_text(encoding="utf-8")
    refuses = "{%- if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif -%}"
    (run_dir / "strict.jinja").write_text(refuses + chatml, encoding="utf-8")
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    write_lines(run_dir / "system.jsonl", [{"prompt": prompt, "chosen": "yes", "rejected": "no"}])
    suite = {"name": "asked", "kind": kind, "data": [{"path": "system.jsonl"}], "max_new_tokens": 2}
    suite |= {"checks": [{"name": "stops", "kind": "stops"}]} if kind == "generate" else {}

    def evaluate(**more: Any) -> Evaluate:
        given = {"chat_template": "./strict.jinja", "models": {"base": "@base"}, "suites": [suite | more]}
        return Evaluate.model_validate({"kind": "evaluate", **given})

    with pytest.raises(ChatError, match=r"system\.jsonl:1: .*takes no system message"):
        run(evaluate(), context(run_dir, tmp_path, evaluate()))
    config = evaluate(system="fold")
    assert run(config, context(run_dir, tmp_path, config)).failed == []
    assert evaluate(system="keep") == evaluate()


def test_system_text_cannot_be_folded_without_a_user(run_dir: Path, tmp_path: Path) -> None:
    write_lines(run_dir / "alone.jsonl", [{"prompt": [{"role": "system", "content": "Be brief."}]}])
    suite = {"name": "asked", "kind": "generate", "data": [{"path": "alone.jsonl"}], "system": "fold"}
    config = Evaluate.model_validate(settings(suites=[suite]))
    with pytest.raises(ChatError, match=r"alone\.jsonl:1: .*no user message follows"):
        run(config, context(run_dir, tmp_path, config))
    config = Evaluate.model_validate(settings(suites=[suite | {"kind": "bits_per_byte"}]))
    with pytest.raises(UserError, match=r"suites\[0\]\.system: bits_per_byte reads plain text"):
        run(config, context(run_dir, tmp_path, config))
