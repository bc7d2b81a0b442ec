"""The same questions to several models, one at a time, and what the differences are worth."""

from __future__ import annotations

import gc
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from posttrain.artifact import write_atomically
from posttrain.chat.contract import end_of_turn
from posttrain.chat.system import fold_system
from posttrain.chat.templates import ChatTemplate, load_template, read_folder_template
from posttrain.chat.tokenizer import load_any_tokenizer
from posttrain.data.read import read_source
from posttrain.data.rows import PairRow
from posttrain.errors import ChatError, UserError
from posttrain.evaluation.gates import GateRule, check_gates, judge
from posttrain.evaluation.questions import CheckRule, Question, check_rules, read_questions
from posttrain.evaluation.suites import RowScore, Suite, Talker, score, table
from posttrain.models.lineage import lineage_of
from posttrain.models.load import load_policy
from posttrain.recipe import schema
from posttrain.report.markdown import console_table, headline, report_page
from posttrain.stages.context import Context, Summary
from posttrain.stages.parents import model_folder
from posttrain.stages.setup import Machine, set_up
from posttrain.stages.sources import WANTED, source_spec

SAMPLES = 8
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]*")

Scores = dict[str, list[RowScore | None]]


def run(config: schema.Evaluate, context: Context) -> Summary:
    """Scores every model on every suite and writes `report.json`, `report.md` and `answers/<suite>.jsonl`.

    Raises:
        UserError: a suite, check or gate that cannot work, or rows that cannot be read.
        CheckpointError: a model folder that does not load, or an adapter without a record of ours (merge it first).
    """
    context.clock.enter("data")
    transformers_logging.disable_progress_bar()
    machine = set_up(context)
    _check_names(config)
    suites, notes = _read_suites(config, context)
    gates = [GateRule(**gate.model_dump()) for gate in config.require]
    check_gates(gates, suites, config.models)

    scores: dict[str, Scores] = {suite.name: {} for suite in suites}
    templates: dict[str, ChatTemplate | None] = {}
    for name in config.models:
        context.clock.enter("loading")
        talker = _talker(name, config, context, machine)
        templates[name] = talker.template
        for suite in suites:
            context.events("phase", text=f"{name}: {suite.name} ({len(suite.rows)} rows)")
            context.clock.enter("generation" if suite.kind == "generate" else "scoring")
            scores[suite.name][name] = score(suite, talker)
        del talker
        _free_memory()

    context.events("phase", text="intervals and report")
    context.clock.enter("saving")
    report = make_report(list(config.models), suites, scores, gates, context.seed)
    report["notes"] += [*notes, *_template_notes(templates)]
    report["certificates"] = _certificates(config, context)
    files = write_report(context.folder, report, suites, scores)
    failed = [_failure(gate) for gate in report["gates"] if not gate["passed"]]
    figures = {table["name"]: table["metrics"] for table in report["suites"]}
    return Summary(headline(report), files, metrics=figures, failed=failed, table=console_table(report))


def _check_names(config: schema.Evaluate) -> None:
    names = [suite.name for suite in config.suites]
    for number, suite in enumerate(config.suites):
        where = f"suites[{number}].name"
        if not _FILE_NAME.fullmatch(suite.name):
            raise UserError(where, f"{suite.name!r} cannot name a file", "use letters, digits, `.`, `_`, `-`")
        if suite.name in names[:number]:
            raise UserError(where, f"a second suite named {suite.name}", "give each suite its own name")
        if suite.system == "fold" and suite.kind == "bits_per_byte":
            raise UserError(f"suites[{number}].system", "bits_per_byte reads plain text", "remove it")
        check_rules(suite.name, _rules(suite))


def _rules(suite: schema.Suite) -> list[CheckRule]:
    return [CheckRule(**check.model_dump()) for check in suite.checks]


def _read_suites(config: schema.Evaluate, context: Context) -> tuple[list[Suite], list[str]]:
    suites, notes = [], []
    for given in config.suites:
        context.events("phase", text=f"reading {given.name}")
        rows: list[Any] = []
        for source in given.data:
            left = None if given.max_rows is None else given.max_rows - len(rows)
            if left == 0:
                break
            read = read_source(source_spec(source, context.recipe_dir), WANTED[given.kind], left)
            rows += read.rows
            if read.dropped:
                reasons = Counter(one.reason for one in read.dropped)
                listed = ", ".join(f"{reason} ({count})" for reason, count in reasons.items())
                notes.append(f"{given.name}: {len(read.dropped)} rows of {Path(source.path).name} not used: {listed}.")
        if given.max_rows is not None:
            notes.append(f"{given.name}: no more than the first {given.max_rows} rows (`max_rows`).")
        rules: Sequence[CheckRule] = _rules(given)
        if given.kind == "generate":
            rows, rules = read_questions(rows, given.prompt_field, rules)
        if given.system == "fold":
            rows = [_folded(row) for row in rows]
        suites.append(Suite(given.name, given.kind, rows, given.max_length, given.max_new_tokens, tuple(rules)))
    return suites, notes


def _folded(row: PairRow | Question) -> PairRow | Question:
    """A row with its system text in the user's next text; names it where that cannot be."""
    try:
        if isinstance(row, PairRow):
            return replace(row, prompt=fold_system(row.prompt))
        return replace(row, messages=fold_system(row.messages))
    except ChatError as error:
        raise error.at(str(row.origin)) from None


def _talker(name: str, config: schema.Evaluate, context: Context, machine: Machine) -> Talker:
    """Loads one model with its tokenizer and template; the caller lets go of it before the next."""
    given = context.inputs[f"models.{name}"]
    context.events("phase", text=f"{name}: loading {given.ref}")
    folder = model_folder(given)
    tokenizer = load_any_tokenizer(folder)
    template = _template(name, folder, config, context)
    eos_ids = (end_of_turn(tokenizer, template).id,) if template else ()
    default = 16384 if machine.device == "cuda" else 4096
    # A standalone folder as it stands; an adapter of ours with the base and parents that its record names.
    model = load_policy(lineage_of(folder, given.ref), machine.dtype, machine.device, machine.attn_implementation)
    return Talker(model.eval(), tokenizer, template, eos_ids, context.runtime.micro_batch_tokens or default)


def _template(name: str, folder: Path, config: schema.Evaluate, context: Context) -> ChatTemplate | None:
    """A model's own saved template, else the one the recipe gives to models that have none."""
    if all(suite.kind == "bits_per_byte" for suite in config.suites):
        return None
    own = read_folder_template(folder)
    if own is None and config.chat_template is None:
        raise ChatError(f"models.{name}", f"{folder} has no chat template", "set `chat_template` of the stage")
    return own or load_template(str(config.chat_template), context.recipe_dir)


def _certificates(config: schema.Evaluate, context: Context) -> list[dict[str, Any]]:
    """What the certificate of each merged model says, and where it lies, seen from the report."""
    found = []
    for name in config.models:
        given = context.inputs[f"models.{name}"]
        path = given.folder / "certificate.json" if given.folder else None
        if path is None or given.artifact is None or not path.is_file():
            continue
        certificate = json.loads(path.read_text(encoding="utf-8"))
        page = path.with_suffix(".md")
        beside = given.folder.parent.resolve() == context.run_dir.resolve()  # type: ignore[union-attr]
        where = f"../{page.parent.name}/{page.name}" if beside else str(page)
        found.append({"model": name, "page": where, **{key: certificate[key] for key in ("verdict", "rows", "logits")}})
    return found


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_report(
    models: list[str], suites: Sequence[Suite], scores: dict[str, Scores], gates: Sequence[GateRule], seed: int
) -> dict[str, Any]:
    """Returns what `report.json` holds: `models`, `suites` (with samples), `gates`, `notes`."""
    tables = [table(suite, scores[suite.name], seed) for suite in suites]
    for suite, one in zip(suites, tables, strict=True):
        if suite.kind == "generate":
            one["samples"] = _samples(suite, scores[suite.name])
    notes = ["The same rows, the same code and one precision for every model."]
    if any(suite.kind == "generate" for suite in suites):
        notes.append("Answers are greedy; only the end-of-turn token ends one, nothing forces it.")
    return {"models": models, "suites": tables, "gates": [judge(gate, tables) for gate in gates], "notes": notes}


def _samples(suite: Suite, scores: Scores) -> list[dict[str, Any]]:
    """Some rows that all models answered, spread evenly over the suite."""
    shared = [row for row in range(len(suite.rows)) if all(rows[row] for rows in scores.values())]
    chosen = shared[:: max(1, -(-len(shared) // SAMPLES))]
    return [
        {
            "question": suite.rows[row].messages[-1]["content"],
            "answers": {name: one.detail["answer"] for name, rows in scores.items() if (one := rows[row])},
        }
        for row in chosen
    ]


def write_report(folder: Path, report: dict[str, Any], suites: Sequence[Suite], scores: dict[str, Scores]) -> list[str]:
    """Writes the report and every row's answers, and returns the files, relative to `folder`."""
    write_atomically(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False))
    write_atomically(folder / "report.md", report_page(report))
    (folder / "answers").mkdir(exist_ok=True)
    files = ["report.json", "report.md"]
    for suite in suites:
        files.append(f"answers/{suite.name}.jsonl")
        lines = (_row_line(suite, row, scores[suite.name]) for row in range(len(suite.rows)))
        write_atomically(folder / files[-1], "".join(f"{line}\n" for line in lines))
    return files


def _row_line(suite: Suite, row: int, scores: Scores) -> str:
    given = suite.rows[row]
    if suite.kind == "generate":
        asked = {"origin": given.origin, "question": given.messages, "expected": given.expected}
    else:
        asked = {"origin": str(given.origin)}
    found = {name: one.detail if (one := rows[row]) else None for name, rows in scores.items()}
    return json.dumps({**asked, "models": found}, ensure_ascii=False)


def _template_notes(templates: dict[str, ChatTemplate | None]) -> list[str]:
    sources = {template.source for template in templates.values() if template}
    return [] if len(sources) < 2 else ["The models do not share one chat template: each was asked through its own."]


def _failure(gate: dict[str, Any]) -> str:
    found = "not measured" if gate["value"] is None else f"{gate['value']:.4g} [{gate['low']:.4g}, {gate['high']:.4g}]"
    return f"{gate['subject']} must be {gate['bounds']}; it is {found}"
