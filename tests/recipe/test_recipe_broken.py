"""Broken recipes: each mistake gives exactly one error, at its line, with what was found and what to do.

A case replaces one line of the valid recipe; `#!` marks the line of the error in what it puts there.
"""

# ruff: noqa: E501
from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_sample import VALID

from posttrain.errors import RecipeErrors
from posttrain.recipe.load import load_recipe
from posttrain.recipe.yaml12 import dump, parse

SFT = "stages.sft"
BETA = "      beta: 0.1\n"
SFT_DATA = "    data: {sources: [{path: ./chats.jsonl}], max_length: 256}\n"
SFT_METHOD = "    method: {qlora: {r: 16, target_modules: [q_proj, v_proj]}}\n"
SFT_TRAINER = "    trainer: {learning_rate: 2e-4, num_train_epochs: 3}\n"
DPO_DATA = "    data: {sources: [{path: ./pairs.jsonl}]}\n"
LOSSES = "      loss_type: [sigmoid, sft]\n"
WEIGHTS = "      loss_weights: [1.0, 0.2]\n"
ALIGNED = '  aligned: {kind: merge, model: "@dpo"}\n'
GATE = "      - {suite: questions, metric: right, model: aligned, minus: instruct, interval_above: 0}\n"
RELEASE = '  release: {kind: publish, model: "@aligned", report: "@report"}\n'

TYPOS = [
    ("seed: 42\n", "sead: 42 #!\n", "sead", "unknown key `sead`", "did you mean seed?"),
    ("    kind: sft\n", "    kind: sftt #!\n", f"{SFT}.kind", "unknown kind 'sftt'", "did you mean sft?"),
    ("    chat_template: chatml\n", "    chat_tmplate: chatml #!\n", f"{SFT}.chat_tmplate", "unknown key", "chat_template"),
    (SFT_DATA, "    data: {sources: [{pth: ./c.jsonl}]} #!\n", f"{SFT}.data.sources[0].pth", "unknown key `pth`", "path"),
    ("          rows: 10\n", "          wieght: 1.0 #!\n", "stages.base.data.sources[1].wieght", "unknown key", "weight"),
    (SFT_METHOD, "    method: qlra #!\n", f"{SFT}.method", "unknown method 'qlra'", "did you mean qlora?"),
    (SFT_METHOD, "    method: {loraa: {r: 8}} #!\n", f"{SFT}.method.loraa", "unknown method 'loraa'", "lora"),
    (SFT_METHOD, "    method:\n      lora:\n        alpha: 8 #!\n", f"{SFT}.method.lora.alpha", "unknown key", "lora_alpha"),
    (SFT_METHOD, "    method: {lora: {}, dora: {}} #!\n", f"{SFT}.method", "give exactly one of", ""),
    ("runtime: {device: cpu}\n", "runtime: {device: gpu} #!\n", "runtime.device", "'gpu' is not allowed", "did you mean cuda?"),
    ("precision: bf16\n", "precision: bf-16 #!\n", "precision", "'bf-16' is not allowed", "did you mean bf16?"),
    (BETA, "      betta: 0.1 #!\n", "stages.dpo.trainer.betta", "unknown setting", "did you mean beta?"),
    (LOSSES, "      loss_type: [sigmiod, sft] #!\n", "stages.dpo.trainer.loss_type", "'sigmiod'", "did you mean sigmoid?"),
    (BETA, "      lr_scheduler_type: cosin #!\n", "stages.dpo.trainer.lr_scheduler_type", "'cosin'", "mean cosine?"),
    (BETA, "      warmup_ratio: 0.1 #!\n", "stages.dpo.trainer.warmup_ratio", "unknown setting", "warmup_steps"),
    (BETA, "      max_length: 512 #!\n", "stages.dpo.trainer.max_length", "not for a recipe", "data.max_length"),
    (BETA, "      gradient_accumulation_step: 2 #!\n", "stages.dpo.trainer.gradient_accumulation_step", "", "global_batch_size"),
    (BETA, "    learning_rate: 1e-5 #!\n", "stages.dpo.learning_rate", "unknown key", "belongs under `trainer`"),
    ("    chat_template: chatml\n", "    max_length: 512 #!\n", f"{SFT}.max_length", "unknown key", "under `data`"),
    ('    model: "@base"\n', "", SFT, "`model` is missing", "add it"),
    (ALIGNED, '  aligned: {model: "@dpo"} #!\n', "stages.aligned", "`kind` is missing", "merge"),
    (RELEASE, '  Release: {kind: publish, model: "@aligned"} #!\n', "stages.Release", "'Release' cannot be a name", "match"),
]  # fmt: skip

VALUES = [
    (BETA, "      beta: 0 #!\n", "stages.dpo.trainer.beta", "0 is out of range", "more than 0"),
    (BETA, "      adam_beta2: 1.0 #!\n", "stages.dpo.trainer.adam_beta2", "1.0 is out of range", "below 1"),
    (BETA, "      learning_rate: -1e-5 #!\n", "stages.dpo.trainer.learning_rate", "out of range", "at least 0"),
    (BETA, "      warmup_steps: 1.5 #!\n", "stages.dpo.trainer.warmup_steps", "1.5 is out of range", "whole number"),
    (BETA, "      max_steps: 0 #!\n", "stages.dpo.trainer.max_steps", "0 is out of range", "at least 1"),
    (BETA, "      beta: .inf #!\n", "stages.dpo.trainer.beta", "inf is not a finite number", ""),
    (BETA, "      global_batch_size: 0 #!\n", "stages.dpo.trainer.global_batch_size", "out of range", "at least 1"),
    ("          rows: 10\n", "          rows: 0 #!\n", "stages.base.data.sources[1].rows", "0 is out of range", "at least 1"),
    ("          rows: 10\n", "          weight: .nan #!\n", "stages.base.data.sources[1].weight", "not a finite number", ""),
    ("      max_length: 512\n", "      max_length: 4096 #!\n", "stages.base.data.max_length", "4096 is more than init", "lower"),
    ("      max_length: 512\n", "      max_dropped: 2 #!\n", "stages.base.data.max_dropped", "2 is out of range", "at most 1"),
    (SFT_DATA, "    data: {sources: []} #!\n", f"{SFT}.data.sources", "an empty list", "at least one"),
    ("    snapshots: {every: 100}\n", "    snapshots: {} #!\n", "stages.base.snapshots", "keeps nothing", "every"),
    (WEIGHTS, "      loss_weights: [1.0] #!\n", "stages.dpo.trainer.loss_weights", "1 weights for 2", "one weight per"),
    (LOSSES, "      loss_type: [sigmoid, exo_pair] #!\n", "stages.dpo.trainer.loss_type", "label_smoothing", "1e-3"),
    (BETA, "      label_smoothing: 0.1 #!\n", "stages.dpo.trainer.label_smoothing", "has no effect", "robust"),
    (BETA, "      save_strategy: best #!\n", "stages.dpo.trainer.save_strategy", "evaluations", "steps"),
    (BETA, "      lr_scheduler_type: cosine_with_min_lr #!\n", "stages.dpo.trainer.lr_scheduler_type", "min_lr", "min_lr_rate"),
    (BETA, "      lr_scheduler_kwargs: {cycles: 2} #!\n", "stages.dpo.trainer.lr_scheduler_kwargs", "no `cycles`", ""),
    (BETA, "      optim: galore_adamw #!\n      optim_target_modules: all-linear\n", "stages.dpo.trainer.optim",
     "needs the package galore_torch", "install"),
    ("runtime: {device: cpu}\n", "runtime: {micro_batch_tokens: 64, micro_batch_size: 2} #!\n",
     "runtime.micro_batch_size", "both given", "keep one"),
    ("precision: bf16\nruntime: {device: cpu}\n", "precision: fp16\nruntime: {device: cpu} #!\n", "runtime.device",
     "does not train in fp16", "bf16"),
    (DPO_DATA, "    data: {sources: [{path: ./p.jsonl}], packing: wrap} #!\n", "stages.dpo.data.packing", "cut pairs", "bfd"),
    (DPO_DATA, "    data: {sources: [{path: ./p.jsonl}], history: split} #!\n", "stages.dpo.data.history", "several answers", "sft"),
    ("      max_length: 512\n", "      max_length: 512\n      system: fold #!\n", "stages.base.data.system", "conversations", ""),
    (SFT_DATA, "    data: {sources: [{path: ./c.jsonl}], history: cut} #!\n", f"{SFT}.data.history", "cut", "split"),
    (DPO_DATA, "    data: {sources: [{path: ./p.jsonl, shape: alpaca}]} #!\n", "stages.dpo.data.sources[0].shape",
     "alpaca rows hold no pairs", "preference"),
]  # fmt: skip

TYPES = [
    ("seed: 42\n", 'seed: "42" #!\n', "seed", "the text '42', not a whole number", "write 42 without quotes"),
    ("seed: 42\n", "seed: 42.0 #!\n", "seed", "42.0, not a whole number", "write 42"),
    ("name: small\n", "name: 7 #!\n", "name", "the number 7, not text", 'quotes: "7"'),
    (BETA, '      beta: "0.1" #!\n', "stages.dpo.trainer.beta", "the text '0.1', not a number", "write 0.1 without"),
    (BETA, "      learning_rate: 5,000 #!\n", "stages.dpo.trainer.learning_rate", "'5,000'", "write 5000 without"),
    (BETA, "      beta: [0.1] #!\n", "stages.dpo.trainer.beta", "a list, not a number", "give a number"),
    (BETA, "      max_steps: 1e3 #!\n", "stages.dpo.trainer.max_steps", "not a whole number", "write 1000"),
    (BETA, "      gradient_checkpointing: yes #!\n", "stages.dpo.trainer.gradient_checkpointing", "the text 'yes'", "true"),
    (BETA, "      learning_rate: #!\n", "stages.dpo.trainer.learning_rate", "nothing (null), not a number", "remove"),
    (BETA, "      use_weighting: 1 #!\n", "stages.dpo.trainer.use_weighting", "the number 1, not true or false", ""),
    (SFT_DATA, "    data: #!\n", f"{SFT}.data", "nothing (null), not a mapping", "give it a value"),
    (SFT_DATA, "    data: {sources: ./chats.jsonl} #!\n", f"{SFT}.data.sources", "'./chats.jsonl', not a list", "["),
    (SFT_TRAINER, "    trainer: [2e-4] #!\n", f"{SFT}.trainer", "a list, not a mapping", ""),
    (SFT_METHOD, "    method: {lora: {target_modules: [1]}} #!\n", f"{SFT}.method.lora.target_modules[0]", "not text", ""),
    (SFT_METHOD, "    method: {lora: {target_modules: 1}} #!\n", f"{SFT}.method.lora.target_modules", "text or a list", ""),
    ("    tokenizer: {vocab_size: 4000}\n", "    tokenizer: {vocab_size: 10} #!\n", "stages.base.tokenizer.vocab_size",
     "10 is out of range", "at least 300"),
    ("    tokenizer: {vocab_size: 4000}\n", "    tokenizer: 5 #!\n", "stages.base.tokenizer", "a mapping or text", ""),
    ("    tokenizer: {vocab_size: 4000}\n", "    tokenizer: {vocabsize: 9} #!\n", "stages.base.tokenizer.vocabsize", "",
     "did you mean vocab_size?"),
    (ALIGNED, "  aligned: merge #!\n", "stages.aligned", "not a mapping", ""),
    (RELEASE, RELEASE[:-2] + ", private: no} #!\n", "stages.release.private", "the text 'no'", "only true and false"),
]  # fmt: skip

REFERENCES = [
    (ALIGNED, '  aligned: {kind: merge, model: "@dop"} #!\n', "stages.aligned.model", "no stage `dop`", "did you mean dpo?"),
    (ALIGNED, '  aligned: {kind: merge, model: "@base"} #!\n', "stages.aligned.model", "no adapter to merge", "@base"),
    (ALIGNED, '  aligned: {kind: merge, model: "@"} #!\n', "stages.aligned.model", "there is no stage ``", ""),
    (ALIGNED, '  aligned: {kind: merge, model: ""} #!\n', "stages.aligned.model", "is empty", "@stage"),
    (ALIGNED, '  aligned: {kind: merge, model: "@aligned"} #!\n', "stages.aligned.model", "aligned -> aligned", "break"),
    (ALIGNED, '  aligned: {kind: merge, model: "@report"} #!\n', "stages.aligned.model", "circle: aligned -> report", ""),
    (RELEASE, '  release: {kind: publish, model: "@report"} #!\n', "stages.release.model", "leaves a report", "@aligned"),
    (RELEASE, '  release: {kind: publish, model: "@dpo"} #!\n', "stages.release.model", "leaves an adapter", "merge it"),
    (RELEASE, RELEASE.replace("@report", "@dpo").replace("}\n", "} #!\n"), "stages.release.report", "leaves a model", "@report"),
    (RELEASE, RELEASE.replace("@report", "report").replace("}\n", "} #!\n"), "stages.release.report", "no reference", "@NAME"),
    (DPO_DATA, DPO_DATA + "    method: full #!\n", "stages.dpo.method", "@sft leaves an adapter", "merge it first"),
    (SFT_METHOD, "    method: continue #!\n", f"{SFT}.method", "only a dpo stage", "lora"),
    (ALIGNED, '  aligned: {kind: merge, model: "@plain", base: dequantized} #!\n'
     '  plain: {kind: sft, model: "@base", method: lora, data: {sources: [{path: ./c.jsonl}]}}\n',
     "stages.aligned.base", "not trained on a quantised base", "original"),
    (ALIGNED, ALIGNED + '  more:\n    kind: dpo\n    model: "@aligned"\n    method: continue #!\n'
     "    data: {sources: [{path: ./p.jsonl}]}\n", "stages.more.method", "no adapter to continue", ""),
    (GATE, GATE.replace("suite: questions", "suite: question").replace("\n", " #!\n"),
     "stages.report.require[0].suite", "no suite 'question'", "did you mean questions?"),
    (GATE, GATE.replace("model: aligned", "model: algned").replace("\n", " #!\n"),
     "stages.report.require[0].model", "no model 'algned'", "did you mean aligned?"),
    (GATE, "      - {suite: questions, metric: right, model: aligned} #!\n", "stages.report.require[0]", "requires nothing", ""),
    ("        kind: generate\n", "        kind: preference\n", "stages.report.suites[0].checks", "generates nothing", "generate"),
    ("    chat_template: chatml\n", '    chat_template: "${NOT_SET}" #!\n', f"{SFT}.chat_template", "NOT_SET is not set", "export"),
    ("    chat_template: chatml\n", '    chat_template: "${A-B}" #!\n', f"{SFT}.chat_template", "`${A-B}` names no variable", "$${"),
]  # fmt: skip

YAML = [
    ("seed: 42\n", "seed: 42\nseed: 43 #!\n", "", "`seed` stands twice, on line 2 and on line 3", "keep one"),
    (BETA, BETA + "      beta: 0.2 #!\n", "", "`beta` stands twice", "keep one"),
    (BETA, "      \tbeta: 0.1 #!\n", "", "tab", "spaces"),
    (ALIGNED, "  aligned: {kind: merge, model: @dpo} #!\n", "", "cannot start any token", "quotes"),
    (ALIGNED, "  aligned: {kind: merge, model: ${M}} #!\n", "", "expected ',' or '}'", '"${NAME}"'),
    (ALIGNED, "  aligned: {kind: merge, model: *dpo} #!\n", "", "refers to no anchor", "anchor it"),
    (ALIGNED, ALIGNED + "---\n", "", "a second document", "keep one document"),
    (BETA, "      beta: !!float 0.1 #!\n", "", "the tag `!!float`", "remove it"),
    (BETA, "      <<: {beta: 0.1} #!\n", "", "merge key", "repeat"),
    (BETA, "      1: 0.1 #!\n", "", "a key is `1`", "quotes"),
    (BETA, "     beta: 0.1 #!\n", "", "", "indentation"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "key", "found", "todo"), [*TYPOS, *VALUES, *TYPES, *REFERENCES, *YAML], ids=lambda value: ""
)
def test_one_mistake_gives_one_error_at_its_line(tmp_path: Path, old, new, key, found, todo):
    assert VALID.count(old) == 1
    path = tmp_path / "broken.yaml"
    text = VALID.replace(old, new)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(path, env={})
    assert len(caught.value.problems) == 1, str(caught.value)
    problem = caught.value.problems[0]
    place, _, key_path = problem.where.partition("  ")
    assert key_path == key
    line = int(place.removeprefix(f"{path}:").split(":")[0])
    assert found in problem.found
    assert todo in problem.todo
    if "#!" in text:
        assert text.splitlines()[line - 1].endswith("#!"), str(problem)


def _places(node, path=()):
    yield path
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _places(inner, (*path, key))


PLACES = [path for path in _places(parse(VALID, "r.yaml").value) if path]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["", "x", "@sft", "@x", "${", "lora", "5"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["kind", "model", "r", "x"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), JUNK), min_size=1, max_size=3))
def test_whatever_stands_at_a_key_the_answer_is_a_recipe_or_its_errors(tmp_path_factory, changes):
    tree = parse(VALID, "r.yaml").value
    for path, junk in changes:
        node = tree
        for part in path[:-1]:
            node = (
                node[part]
                if isinstance(node, dict) and part in node
                else node[0]
                if isinstance(node, list) and node
                else {}
            )
        if isinstance(node, dict):
            node[path[-1]] = junk
    path = tmp_path_factory.getbasetemp() / "junk.yaml"
    path.write_text(dump(tree), encoding="utf-8")
    problems = []
    try:
        load_recipe(path, env={})
    except RecipeErrors as errors:
        problems = errors.problems
    assert all(problem.where.startswith(str(path)) and problem.found for problem in problems)
