"""The text of a drafted recipe: sensible values, and a comment beside each that someone may want to change."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from posttrain.draft.data_facts import DataFacts
from posttrain.draft.model_facts import ModelFacts
from posttrain.recipe.environment import escape

TASKS: dict[str, tuple[str, ...]] = {"sft": ("chat",), "dpo": ("pair",), "both": ("chat", "pair")}
"""Task -> what it reads: conversations, preference pairs."""
_FULL, _LORA = 3.0e9, 6.5e9
"""Parameters below which everything is trained, or LoRA on a 16-bit base; from the second on, in 4 bits."""
_RATES = {
    "sft": {"full": "2e-5", "lora": "2e-4", "qlora": "2e-4"},
    "dpo": {"full": "5e-7", "lora": "5e-6", "qlora": "5e-6"},
}
_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
_ENOUGH = 20
"""Fewer rows are not split: all are trained on, and nothing is left to ask."""
_PLAIN = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*")


@dataclass(frozen=True)
class Plan:
    """How the weights are trained, by the number of them."""

    method: str
    why: str

    @property
    def adapter(self) -> bool:
        """Whether what is trained is merged afterwards."""
        return self.method != "full"


@dataclass(frozen=True)
class Answers:
    """Everything that the text is made of."""

    name: str
    model: ModelFacts
    conversations: DataFacts | None
    pairs: DataFacts | None

    @property
    def plan(self) -> Plan:
        """The method for a model of this size."""
        size = self.model.parameters
        if size < _FULL:
            return Plan("full", "method: full, as the model has less than 3 B parameters")
        if size < _LORA:
            return Plan("lora", "method: lora, as the model has 3 B parameters or more, and less than 6.5 B")
        return Plan("qlora", "method: qlora, as the model has 6.5 B parameters or more")


def recipe_text(answers: Answers) -> str:
    """Writes the recipe as commented YAML."""
    first = "sft" if answers.conversations else "dpo"
    parts = [_head(answers)]
    last = ""
    for kind, data, merged in (("sft", answers.conversations, "instruct"), ("dpo", answers.pairs, "aligned")):
        if data is None:
            continue
        parts.append(_training(answers, kind, data, first == kind))
        if answers.plan.adapter:
            parts.append(f'  {merged}: # the adapter becomes a model of its own, and the merge is certified\n'
                         f'    kind: merge\n    model: "@{kind}"\n')  # fmt: skip
        last = merged if answers.plan.adapter else kind
    report = _report(answers)
    parts += [report] if report else []
    licence = (
        f"    license: {_word(answers.model.license)} # of the base; the data may ask for more\n"
        if answers.model.license
        else ""
    )
    told = '    report: "@report"\n' if report else ""
    parts.append(f'  release: # a folder that plain transformers loads, with a model card\n    kind: publish\n'
                 f'    model: "@{last}"\n{told}    to: ./published/{answers.name}\n{licence}')  # fmt: skip
    return "\n".join(parts)


def _head(answers: Answers) -> str:
    given = [data.path for data in (answers.conversations, answers.pairs) if data]
    title = f"{answers.model.reference} on {' and '.join(given)}"
    return f"""# {_comment(title)}: written by `posttrain init`; nothing in it is tuned, all of it is yours to change.
#
#   posttrain check {answers.name}.yaml        what it reads, what it needs: memory, time, disk
#   posttrain rehearse {answers.name}.yaml     every stage on a tiny twin, on the CPU
#   posttrain run {answers.name}.yaml
name: {_word(answers.name)}
description: {_word(title)}
seed: 42
precision: bf16 # fp16 for cards older than Ampere (T4, V100)
runtime:
  device: auto # the GPU when there is one

stages:"""


def _training(answers: Answers, kind: str, data: DataFacts, first: bool) -> str:
    model, plan = answers.model, answers.plan
    lines = [f"  {kind}:", f"    kind: {kind}"]
    lines.append(
        f"    model: {_word(model.reference)}"
        if first
        else '    model: "@sft" # the model before, which is the reference'
    )
    if first and model.chat_template:
        lines.append(f"    chat_template: {model.chat_template} # `posttrain check --show 3` prints what is trained")
    lines += ["    data:", "      sources:", f"        - {_source(data, 'train')}"]
    lines.append(f"      max_length: {_length(data, kind, model.positions)} # tokens; longer rows are cut, and counted")
    if kind == "sft" and model.rewrites:
        lines.append("      history: split # the template rewrites earlier answers: one row for each")
    if model.refuses_system:
        lines.append("      system: fold # the template refuses system texts")
    if first:
        lines += _method(plan)
    lines += ["    trainer:", f"      learning_rate: {_RATES[kind][plan.method]} # of {plan.method} training",
              "      lr_scheduler_type: cosine", "      warmup_steps: 0.1 # below 1: a share of all steps",
              f"      num_train_epochs: {_epochs(kind, data.rows)}",
              f"      global_batch_size: {_batch(data.rows)} # rows of one step, cut as memory asks"]  # fmt: skip
    if kind == "dpo":
        lines.append("      beta: 0.1 # smaller: further from the reference")
    lines += ["      gradient_checkpointing: true # less memory, some speed", "      save_steps: 100", ""]
    return "\n".join(lines)


def _method(plan: Plan) -> list[str]:
    if plan.method == "full":
        return ["    method: full # every weight: the model is small"]
    why = (
        "a base in 4 bits: the model is large" if plan.method == "qlora" else "an adapter: the model is of middle size"
    )
    return [
        "    method:",
        f"      {plan.method}: # {why}",
        "        r: 16",
        "        lora_alpha: 32",
        "        lora_dropout: 0.05",
    ]


def _report(answers: Answers) -> str:
    """The evaluation of rows that were held out, or nothing where there are too few."""
    suites = [line for part in (_pairs_suite(answers.pairs), _questions_suite(answers.conversations)) for line in part]
    if not suites:
        return ""
    merged = answers.plan.adapter
    models = [f"      base: {_word(answers.model.reference)}"]
    models += [f'      instruct: "@{"instruct" if merged else "sft"}"'] if answers.conversations else []
    models += [f'      aligned: "@{"aligned" if merged else "dpo"}"'] if answers.pairs else []
    lines = [
        "  report: # all models, the same rows, none of which was trained on",
        "    kind: evaluate",
        "    models:",
        *models,
    ]
    if answers.model.chat_template:
        lines.append(f"    chat_template: {answers.model.chat_template} # for the base, which has none")
    return "\n".join([*lines, "    suites:", *suites, ""])


def _pairs_suite(data: DataFacts | None) -> list[str]:
    if data is None or not _splits(data):
        return []
    return ["      - name: preferences # is the chosen answer the likelier one?", "        kind: preference",
            f"        data: [{_source(data, 'heldout')}]", "        max_rows: 500"]  # fmt: skip


def _questions_suite(data: DataFacts | None) -> list[str]:
    if data is None or not _splits(data) or data.rows is None:  # of a hub dataset the question's column is not known
        return []
    return ["      - name: answers # read them in the report: answers/answers.jsonl has all", "        kind: generate",
            f"        data: [{_source(data, 'heldout', raw=True)}]", f"        prompt_field: {data.asked}",
            "        max_rows: 100", "        max_new_tokens: 256", "        checks:",
            "          - {name: stops, kind: stops} # ends by itself"]  # fmt: skip


def _splits(data: DataFacts) -> bool:
    return data.rows is None or data.rows >= _ENOUGH


def _source(data: DataFacts, side: str, raw: bool = False) -> str:
    """A source in one line, of one side of the split. Of unknown many rows the small side is the fixed one."""
    parts = [f"path: {_word(data.path)}"]
    parts += [f"split: {_word(data.split)}"] if data.split else []
    parts += [f"shape: {data.shape}"] if data.shape != "auto" and not raw else []
    if data.columns:
        mapped = ", ".join(f"{ours}: {_word(theirs)}" for ours, theirs in data.columns.items())
        parts.append(f"columns: {{{mapped}}}")
    if _splits(data) and data.rows is not None:
        kept = data.rows - min(500, max(1, data.rows // 10))
        parts.append(f"select: {{rows: {kept}, side: {side}}}")
    elif data.rows is None and data.shape == "auto":
        other = {"train": "heldout", "heldout": "train"}[side]  # 200 rows are asked, all the rest is trained on
        parts.append(f"select: {{rows: 200, side: {other}}}")
    return "{" + ", ".join(parts) + "}"


def _length(data: DataFacts, kind: str, positions: int | None) -> int:
    wanted = data.tokens or (2048 if kind == "sft" else 1024)
    fits = next((length for length in _LENGTHS if length >= wanted), _LENGTHS[-1])
    return min(fits, positions or fits)


def _epochs(kind: str, rows: int | None) -> int:
    return 3 if kind == "sft" and rows is not None and rows < 10_000 else 1


def _batch(rows: int | None) -> int:
    """At least some twenty steps in an epoch, and no more than 64 rows a step."""
    batch = 64
    while rows is not None and batch > 4 and rows < 20 * batch:
        batch //= 2
    return batch


def _word(text: str) -> str:
    """A text as a YAML scalar in flow or block; `${` is no variable."""
    return (
        text
        if _PLAIN.fullmatch(text) and text.lower() not in ("true", "false", "null") and not text[0].isdigit()
        else json.dumps(escape(text), ensure_ascii=False)
    )


def _comment(text: str) -> str:
    return " ".join(text.split())
