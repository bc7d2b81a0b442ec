"""Recipes that are broken by themselves: four of the seven kinds."""

# ruff: noqa: E501
from __future__ import annotations

from pathlib import Path

from broken.case import Case, edited
from broken.whole import RECIPE

BETA = "    trainer: {beta: 0.1, max_steps: 2, global_batch_size: 4}\n"
RATE = "      learning_rate: 1e-3\n"
METHOD = "    method: {lora: {r: 2}}\n"
CHATS = "    data: {sources: [{path: ./chats.jsonl}], max_length: 64}\n"
ALIGNED = '  aligned: {kind: merge, model: "@dpo"}\n'
INSTRUCT = '  instruct: {kind: merge, model: "@sft"}\n'
RELEASE = '  release: {kind: publish, model: "@aligned", report: "@report"}\n'
THREE = """\
  instruct: {kind: merge, model: "@more"} #!
  more: {kind: dpo, model: "@other", method: lora, data: {sources: [{path: ./pairs.jsonl}]}}
  other: {kind: merge, model: "@instruct"}
"""
CHECKS = "        checks: [{name: right, kind: any_of, field: answers}, {name: stops, kind: stops}]\n"
GATE = "      - {suite: questions, metric: right, model: aligned, min: 0}\n"

TYPOS = [
    edited("recipe key", "seed: 1\n", "sead: 1\n", "sead", "unknown key `sead`"),
    edited("stage kind", "    kind: dpo\n", "    kind: dop\n", "stages.dpo.kind", "unknown kind 'dop'"),
    edited("stage key", "    model: ./base\n", "    model: ./base\n    chat_tmplate: x #!\n", "stages.sft.chat_tmplate", "unknown key"),
    edited("trainer setting", BETA, "    trainer: {betta: 0.1}\n", "stages.dpo.trainer.betta", "unknown setting"),
    edited("loss", BETA, "    trainer: {loss_type: [sigmiod]}\n", "stages.dpo.trainer.loss_type", "'sigmiod'"),
    edited("scheduler", RATE, "      lr_scheduler_type: cosin\n", "stages.sft.trainer.lr_scheduler_type", "'cosin'"),
    edited("method", METHOD, "    method: qlra\n", "stages.sft.method", "unknown method 'qlra'"),
    edited("LoRA setting", METHOD, "    method: {lora: {alpha: 2}}\n", "stages.sft.method.lora.alpha", "unknown key `alpha`"),
    edited("template", "    model: ./base\n    chat_template: chatml\n", "    model: ./base\n    chat_template: chatlm #!\n", "stages.sft.chat_template", "chatlm"),
    edited("source key", CHATS, "    data: {sources: [{pth: ./chats.jsonl}]}\n", "stages.sft.data.sources[0].pth", "unknown key `pth`"),
    edited("check", CHECKS, CHECKS.replace("any_of", "anyof"), "stages.report.suites[0].checks[0].kind", "'anyof' is not allowed"),
    edited("figure", GATE, GATE.replace("right", "rihgt"), "stages.report.require[0].metric", "no figure 'rihgt'"),
    edited("regular expression", CHECKS, "        checks: [{name: right, kind: regex, value: '['}]\n", "stages.report.suites[0].checks[0].value", "'[' is no regular expression"),
    edited("zero", BETA, "    trainer: {beta: 0}\n", "stages.dpo.trainer.beta", "0 is out of range"),
    edited("negative", RATE, "      learning_rate: -1e-3\n", "stages.sft.trainer.learning_rate", "out of range"),
    edited("share above 1", CHATS, "    data: {sources: [{path: ./chats.jsonl}], max_dropped: 2}\n", "stages.sft.data.max_dropped", "2 is out of range"),
    edited("size", ALIGNED, '  aligned: {kind: merge, model: "@dpo", max_shard_size: lots}\n', "stages.aligned.max_shard_size", "'lots'"),
]  # fmt: skip

TYPES = [
    edited("number in quotes", "seed: 1\n", 'seed: "1"\n', "seed", "the text '1', not a whole number"),
    edited("fraction", "      max_steps: 2\n", "      max_steps: 2.5\n", "stages.sft.trainer.max_steps", "not a whole number"),
    edited("number for a name", "name: whole\n", "name: 7\n", "name", "the number 7, not text"),
    edited("rate in quotes", RATE, '      learning_rate: "1e-3"\n', "stages.sft.trainer.learning_rate", "the text '1e-3', not a number"),
    edited("list for a number", BETA, "    trainer: {beta: [0.1]}\n", "stages.dpo.trainer.beta", "a list, not a number"),
    edited("text for a list", CHATS, "    data: {sources: ./chats.jsonl}\n", "stages.sft.data.sources", "not a list"),
    edited("list for a mapping", METHOD, "    method: [lora]\n", "stages.sft.method", "a list, not a mapping"),
    edited("nothing", CHATS, "    data:\n", "stages.sft.data", "nothing (null), not a mapping"),
    edited("text for a stage", ALIGNED, "  aligned: merge\n", "stages.aligned", "not a mapping"),
    edited("YAML 1.1 boolean", RELEASE, RELEASE[:-2] + ", private: no}\n", "stages.release.private", "the text 'no', not true or false"),
]  # fmt: skip

REFERENCES = [
    edited("no such stage", ALIGNED, ALIGNED.replace("@dpo", "@dop"), "stages.aligned.model", "there is no stage `dop`"),
    edited("itself", ALIGNED, ALIGNED.replace("@dpo", "@aligned"), "stages.aligned.model", "in a circle: aligned -> aligned"),
    edited("circle of two", "    model: ./earlier/sft\n", '    model: "@aligned"\n', "stages.dpo.model", "in a circle: dpo -> aligned -> dpo"),
    edited("circle of three", INSTRUCT, THREE, "stages.instruct.model", "in a circle: instruct -> more -> other -> instruct"),
    edited("a report as a model", RELEASE, RELEASE.replace("@aligned", "@report"), "stages.release.model", "@report leaves a report, not a model"),
    edited("a model as a report", RELEASE, RELEASE.replace("@report", "@dpo"), "stages.release.report", "@dpo leaves a model, not a report"),
    edited("an adapter published", RELEASE, RELEASE.replace("@aligned", "@sft"), "stages.release.model", "@sft leaves an adapter"),
    edited("nothing to merge", ALIGNED, ALIGNED.replace("@dpo", "@instruct"), "stages.aligned.model", "no adapter to merge"),
    edited("no such model in a gate", GATE, GATE.replace("aligned", "algned"), "stages.report.require[0].model", "no model 'algned'"),
    edited("no such suite in a gate", GATE, GATE.replace("questions", "question"), "stages.report.require[0].suite", "no suite 'question'"),
    edited("variable that is not set", "    model: ./base\n", '    model: "${NO_SUCH_VARIABLE}"\n', "stages.sft.model", "NO_SUCH_VARIABLE is not set"),
    edited("neither path nor id", "    model: ./base\n", "    model: base model\n", "stages.sft.model", "is neither a stage, a path nor a hub id"),
]  # fmt: skip


def _bytes(data: bytes):
    def write(folder: Path) -> None:
        (folder / "recipe.yaml").write_bytes(data)

    return write


YAML = [
    edited("tab", "    trainer:\n      learning_rate", "    trainer:\n\tlearning_rate #!", "", "a tab in the indentation"),
    edited("duplicate key", "seed: 1\n", "seed: 1\nseed: 2 #!\n", "", "`seed` stands twice, on line 2 and on line 3"),
    edited("open bracket", BETA, "    trainer: {beta: 0.1\n  more: 1 #!\n", "", "expected ',' or '}'"),
    edited("colon in text", "    model: ./base\n", "    model: base: it\n", "", "mapping values are not allowed"),
    edited("unknown alias", "    model: ./base\n", "    model: *base\n", "", "refers to no anchor"),
    edited("tag", "    model: ./base\n", "    model: !!python/object:os.system ls\n", "", "the tag `!!python/object:os.system`"),
    edited("merge key", METHOD, METHOD + "    <<: {seed: 2} #!\n", "", "merge key `<<`"),
    edited("second document", "stages:\n", "---\nstages:\n", "", "a second document starts here"),
    Case("not UTF-8", _bytes(RECIPE.encode().replace(b"seed: 1\n", b"seed: 1 # a\xf1o\n")), "recipe.yaml:2: ", "not UTF-8 text (byte 0xf1)"),
    Case("empty", _bytes(b""), "recipe.yaml:1: ", "the file is empty"),
    Case("a list", _bytes(b"- name: whole\n"), "recipe.yaml:1: ", "the top level is not a mapping"),
    Case("control character", _bytes(b"name: who\x00le\n"), "recipe.yaml:1:10: ", "control character"),
    Case("too deep", _bytes(b"name: whole\nstages: " + b"[" * 5000 + b"]" * 5000), "recipe.yaml:2:", "nested deeper than 64 levels"),
    Case("bomb", _bytes(b"a: &a [x, x, x, x, x, x, x, x, x, x]\n" + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n, b", ".join([b"*%c" % (97 + n)] * 10)) for n in range(8))), "recipe.yaml:", "more than 100000 values"),
]  # fmt: skip
