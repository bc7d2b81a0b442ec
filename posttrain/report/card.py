"""The model card: what a model is, how it was made and what was measured, from the records alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import yaml

from posttrain.artifact import Record
from posttrain.report.markdown import difference_table, figure_table, table

SHOWN_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "global_batch_size",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "beta",
    "loss_type",
)
_ENERGY = ("energy_wh", "energy_joules")


@dataclass(frozen=True)
class Card:
    """What a card is made from."""

    name: str
    records: Sequence[Record]
    """Of the model and everything it stands on, oldest first."""
    base: str | None = None
    """Hub id of the base; None for a model from scratch or from a local folder."""
    license: str | None = None
    report: Mapping[str, Any] | None = None
    """`report.json` of an evaluation."""
    end_of_turn: str | None = None
    repository: str | None = None
    """Hub repository the model will lie in; the usage snippet names it."""
    chats: bool = True
    """Whether it has a chat template; a base model continues texts."""
    snapshots: Sequence[int] = ()
    """Optimizer steps whose models are published beside it."""


def model_card(card: Card) -> str:
    """Returns the README of a published model: YAML front matter and Markdown, the same for the same records."""
    parts = [_front_matter(card), f"# {card.name}", "", _origin(card), "", *_usage(card)]
    if card.records:
        parts += ["", "## How it was made", "", *_stage_table(card.records)]
    for record in card.records:
        if record.ledger is not None or "data" in record.identity:
            parts += ["", f"### {record.stage} ({record.kind})", "", *_training(record)]
    parts += _snapshots(card)
    parts += _certificates(card.records)
    parts += ["", "## Evaluation", "", *_evaluation(card.report)]
    parts += ["", "## Made with", "", *_machine(card.records)]
    parts += ["", "## Limitations", "", *_limitations(card)]
    return "\n".join(parts) + "\n"


def _front_matter(card: Card) -> str:
    facts: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["posttrain", *dict.fromkeys(r.kind for r in card.records if r.kind in ("pretrain", "sft", "dpo"))],
    }
    if card.license:
        facts["license"] = card.license
    if card.base:
        facts["base_model"] = card.base
    datasets = [source["hub"] for record in card.records for source in _sources(record) if "hub" in source]
    if datasets:
        facts["datasets"] = list(dict.fromkeys(datasets))
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---\n"


def _origin(card: Card) -> str:
    way = " → ".join(f"{record.stage} ({record.kind})" for record in card.records)
    start = f"from `{card.base}`" if card.base else "from a local or newly trained base"
    return (
        f"Made {start} with posttrain: {way}." if way else f"Published with posttrain {start}; no record of training."
    )


def _usage(card: Card) -> list[str]:
    where = card.repository or "PATH_OF_THIS_FOLDER"
    if not card.chats:
        return [
            *_loading(where),
            'inputs = tokenizer("Once upon a time", return_tensors="pt")',
            "text = model.generate(**inputs, max_new_tokens=64)",
            "print(tokenizer.decode(text[0], skip_special_tokens=True))",
            "```",
            "",
            "A base model: it continues texts, and has no chat template. `sha256sum -c SHA256SUMS` checks the files.",
        ]
    stop = f" Generation stops at `{card.end_of_turn}`, set in `generation_config.json`." if card.end_of_turn else ""
    return [
        *_loading(where),
        'messages = [{"role": "user", "content": "Hello!"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "answer = model.generate(**inputs, max_new_tokens=256)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        "```",
        "",
        f"The chat template is `chat_template.jinja`.{stop} `sha256sum -c SHA256SUMS` checks the files.",
    ]


def _loading(where: str) -> list[str]:
    return [
        "## How to use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{where}")',
        f'model = AutoModelForCausalLM.from_pretrained("{where}")',
    ]


def _snapshots(card: Card) -> list[str]:
    if not card.snapshots:
        return []
    last = card.snapshots[-1]
    place = (
        f'`from_pretrained("{card.repository}", revision="step-{last}")`'
        if card.repository
        else f'`from_pretrained("snapshots/step-{last}")`'
    )
    where = "a branch" if card.repository else "a folder `snapshots/step-N`"
    return [
        "",
        "## Snapshots",
        "",
        f"The model at {len(card.snapshots)} points of its training, each in {where}: {place}. "
        f"Steps: {', '.join(map(str, card.snapshots))}.",
        "",
        "`data_order.npz` holds the rows of every step, in the order of training (step 0 is before the first); the "
        "model after step N has seen those of steps 1 to N. `metrics.jsonl` is the log. To look up a step:",
        "",
        "```python",
        "from pathlib import Path",
        "from posttrain.pretraining.order import rows_of_step",
        "",
        f'rows_of_step(Path("."), {max(last, 1)})  # [(source, file, row of the file), …]',
        "```",
        "",
        "Without posttrain: `items[offsets[N - 1]:offsets[N]]` are the (source, row) pairs of step N, and "
        "`places[starts[source] + row]` is (index into `files`, row of that file).",
    ]


def _stage_table(records: Sequence[Record]) -> list[str]:
    rows = [
        [
            record.stage,
            record.kind,
            str(record.summary.get("headline", "")),
            str(record.identity.get("seed", "")),
            str(record.identity.get("precision", "")),
            _duration(record),
            record.fingerprint[:12],
        ]
        for record in records
    ]
    return table(["stage", "kind", "result", "seed", "precision", "time", "fingerprint"], rows)


def _duration(record: Record) -> str:
    seconds = record.provenance.get("seconds")
    return "" if seconds is None else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.2f} h"


def _training(record: Record) -> list[str]:
    lines = _data_table(record)
    if record.ledger is not None:
        lines += ["", "Every row and token of one epoch:", "", *_ledger_table(record.ledger)]
    settings: Mapping[str, Any] = record.identity.get("trainer") or {}
    shown = {name: settings[name] for name in SHOWN_SETTINGS if settings.get(name) is not None}
    if shown:
        lines += ["", *table(["setting", "value"], [[name, _json(value)] for name, value in shown.items()])]
    rest = {key: value for key, value in record.identity.items() if key not in ("data", "kind", "version")}
    lines += ["", "<details><summary>All settings</summary>", "", "```json", _json(rest, indent=2), "```", "</details>"]
    return lines


def _data_table(record: Record) -> list[str]:
    names = list((record.ledger or {}).get("sources", {}))
    sources = _sources(record)
    labels = names if len(names) == len(sources) else ["local files"] * len(sources)
    rows = [
        [
            f"`{source['hub']}`" if "hub" in source else _without_folder(label),
            f"commit {source['commit'][:12]}" if "commit" in source else f"sha256 {source.get('content', '')[:16]}",
            str(source.get("split", "")),
            f"{source['rows']} rows" if "rows" in source else f"× {source.get('weight', 1):g}",
        ]
        for source, label in zip(sources, labels, strict=True)
    ]
    return table(["data", "version", "split", "per epoch"], rows) if rows else []


def _ledger_table(ledger: Mapping[str, Any]) -> list[str]:
    """Counts alone: which rows were dropped stands in the record, with paths that are nobody's business."""
    rows = []
    for name, source in [*ledger["sources"].items(), ("total", ledger["total"])]:
        counts, tokens = source["rows"], source["tokens"]
        figures = [counts["in"], counts["trained"], counts["left_out"], sum(counts["dropped"].values())]
        figures += [tokens[key] for key in ("in", "trained", "masked", "truncated")]
        rows.append([_without_folder(name), *(f"{figure:,}" for figure in figures)])
    head = ["source", "rows", "trained on", "left out", "dropped", "tokens", "trained on", "masked", "truncated"]
    lines = table(head, rows)
    total = ledger["total"]["rows"]
    if total.get("split"):
        lines += ["", f"Split: {total['split']:,} conversations into {total['made']:,} rows, one per answer."]
    if total.get("held_out"):
        lines += ["", f"Held out for certificates, never trained on: {total['held_out']:,} rows."]
    dropped = total["dropped"]
    if dropped:
        lines += ["", "Dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) + "."]
    return lines


def _without_folder(name: str) -> str:
    return PurePath(name).name if PurePath(name).is_absolute() else name


def _sources(record: Record) -> list[Mapping[str, Any]]:
    return record.identity.get("data", {}).get("sources", [])


def _certificates(records: Sequence[Record]) -> list[str]:
    """Proofs of hand-offs: merged files against the adapter in use, DPO's policy against its reference."""
    parts: list[str] = []
    for record in records:
        metrics: Mapping[str, Any] = record.summary.get("metrics", {})
        proof = metrics.get("certificate" if record.kind == "merge" else "step_zero")
        if not proof:
            continue
        what = "merged files against the adapter in use" if record.kind == "merge" else "policy against its reference"
        figures = [[name.replace("_", " "), _number(value)] for name, value in proof.items() if value is not None]
        parts += ["", f"{record.stage}: {what}", "", *table(["measured", ""], figures)]
    if records and records[-1].kind == "merge" and "verdict" in records[-1].summary.get("metrics", {}):
        verdict = records[-1].summary["metrics"]["verdict"]
        parts += ["", f"The whole certificate of these files: [certificate.md](certificate.md), verdict {verdict}."]
    return ["", "## Certificates", *parts] if parts else []


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _json(value)


def _evaluation(report: Mapping[str, Any] | None) -> list[str]:
    if report is None:
        return ["None was published with this model."]
    lines = [f"- {note}" for note in report["notes"]]
    for suite in report["suites"]:
        lines += ["", f"### {suite['name']} ({suite['rows']} rows)", "", *figure_table(suite, report["models"])]
        if any(metric["differences"] for metric in suite["metrics"].values()):
            lines += ["", "Paired differences on the same rows:", "", *difference_table(suite)]
    return [*lines, "", "Square brackets hold 95 % intervals."]


def _machine(records: Sequence[Record]) -> list[str]:
    """Versions and machine of the newest record, times and energy of all."""
    if not records:
        return ["No record."]
    newest = records[-1].provenance
    versions = newest.get("versions", {})
    lines = [f"- {name} {version}" for name, version in versions.items() if version != "not installed"]
    lines += [f"- {key}: {newest[key]}" for key in ("python", "platform", "gpu", "cpus") if newest.get(key)]
    seconds = sum(record.provenance.get("seconds", 0) for record in records)
    lines.append(f"- time of all stages: {seconds:.0f} s")
    lines += [_memory(record) for record in records if record.summary.get("metrics", {}).get("memory")]
    for key in _ENERGY:
        known = [record.provenance[key] for record in records if key in record.provenance]
        if known:
            lines.append(f"- {key}: {sum(known):.1f}, in {len(known)} of {len(records)} stages")
    return lines


def _memory(record: Record) -> str:
    """Peak GPU memory of a training stage, measured and as it was predicted before the run."""
    memory = record.summary["metrics"]["memory"]
    figures = [(memory.get(f"{name}_bytes"), name) for name in ("measured", "predicted")]
    told = [f"{size / 2**30:.2f} GiB {name}" for size, name in figures if size is not None]
    return f"- peak memory of {record.stage}: {', '.join(told) or 'not measured'}"


def _limitations(card: Card) -> list[str]:
    lines = [
        "- It can state what is false, and repeats what its training data and its base hold.",
        "- Languages, tasks and lengths that are not in the data above were not trained here.",
    ]
    if card.report is None:
        return [*lines, "- Nothing was measured on this model."]
    names = ", ".join(suite["name"] for suite in card.report["suites"])
    return [*lines, f"- Only what the tables show was measured ({names}); safety was not, unless a suite says so."]


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
