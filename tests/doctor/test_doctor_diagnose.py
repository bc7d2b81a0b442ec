"""What the doctor tells: findings and profile of small checkpoints, the command's output and exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import zoo_templates as templates
from typer.testing import CliRunner
from zoo import EMBEDDING, Specimen, data_file, gemma, llama3, mistral, olmo, qwen, salamandra

from posttrain import cli
from posttrain.doctor.diagnose import Diagnosis, diagnose
from posttrain.errors import CheckpointError, UserError

GOLDEN = """\
FOLDER
  template    chat_template.jinja (DIGEST)
  end of turn <|im_end|> (5)
  stops at    </s> (2)
  bos         <s>, begins plain texts and chats
  pad         <pad>
  system      own turn
  history     kept
  tools       not written
  thinking    not written
  white space trimmed
  sizes       456 tokens, 464 embedding rows

error: end-of-turn-not-eos: the token that ends an answer does not stop generation
  generation_config.json, eos_token_id: [2] lacks '<|im_end|>' (5), which ends an answer: generation goes on after it
  -> set it to [5, 2]; --fix does

warning: content-trimmed: the template trims what messages say
  template chat_template.jinja: trims what the user and the assistant says: code loses its indentation
  -> expect it, or choose a template that does not for code

1 error, 1 warning; --fix OUT can mend 1 of them
"""


def look(it: Specimen, folder: Path, template: str | None = None) -> Diagnosis:
    """Writes a specimen and diagnoses it."""
    it.write(folder)
    return diagnose(folder, template, data_file(folder) if it.rows is not None else None)


def ids(diagnosis: Diagnosis) -> list[str]:
    return [finding.id for finding in diagnosis.findings]


def command(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, ["doctor", *words])
    return done.exit_code, done.output


def test_what_people_read(tmp_path):
    it = salamandra()
    it.say(eos_token_id=it.id("</s>"))
    it.generation |= {"eos_token_id": it.id("</s>")}
    it.replace("message['content']", "(message['content'] | trim)")
    diagnosis = look(it, tmp_path / "model")
    code, said = command(str(tmp_path / "model"))
    digest = diagnosis.profile["template"]["digest"]
    said = said.replace(str(tmp_path / "model"), "FOLDER").replace(digest[:12], "DIGEST")
    assert said == GOLDEN
    assert code == 1


def test_a_repair_is_told_and_what_is_left_decides(tmp_path):
    it = salamandra()
    it.generation |= {"eos_token_id": it.id("</s>")}
    it.write(tmp_path / "model")
    code, said = command(str(tmp_path / "model"), "--fix", str(tmp_path / "mended"))
    assert code == 0
    assert "error: end-of-turn-not-eos" in said
    assert said.endswith("in the copy: nothing found\n")
    assert ids(diagnose(tmp_path / "mended")) == []
    code, said = command(str(tmp_path / "model"), "--fix", str(tmp_path / "again"), "--json")
    told = json.loads(said)
    assert (code, told["fixed"]) == (0, str(tmp_path / "again"))
    assert [finding["id"] for finding in told["findings"]] == ["end-of-turn-not-eos"]
    assert told["changes"]
    assert told["left"] == []


def test_nothing_found_is_one_line_and_exit_code_0(tmp_path):
    qwen().write(tmp_path / "model")
    code, said = command(str(tmp_path / "model"))
    assert code == 0
    assert said.endswith("\n\nnothing found\n")


def test_json_holds_folder_profile_and_findings(tmp_path):
    it = mistral()
    del it.tokenizer_config["pad_token"]
    for settings in (it.config, it.generation):
        del settings["pad_token_id"]
    it.write(tmp_path / "model")
    code, said = command(str(tmp_path / "model"), "--json")
    told = json.loads(said)
    assert code == 1
    assert told.keys() == {"folder", "profile", "findings"}
    assert told["profile"] == {
        "rows": 464,
        "tokens": 456,
        "stop_tokens": ["</s> (2)"],
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": None,
        "plain_begins_with_bos": True,
        "template": {
            "name": "chat_template.jinja",
            "family": "unknown",
            "digest": told["profile"]["template"]["digest"],
            "end_of_turn": {"text": "</s>", "id": 2},
            "begins_with_bos": True,
            "system": "own turn",
            "default_system": None,
            "tools": False,
            "thinking": False,
            "history": "kept",
            "trims": False,
        },
    }
    (finding,) = told["findings"]
    assert finding.keys() == {"id", "severity", "where", "cause", "remedy", "mendable"}
    assert finding["id"] == "pad-missing"


@pytest.mark.parametrize(
    ("word", "message"),
    [("./nowhere", "no such folder"), ("nowhere", "neither a stage, a path nor a hub id"), ("@sft", "runs/RECIPE")],
)
def test_a_mistake_names_the_checkpoint(word, message):
    with pytest.raises(UserError, match=message) as caught:
        CliRunner().invoke(cli.app, ["doctor", word], catch_exceptions=False)
    assert (caught.value.where, caught.value.exit_code) == (word, 2)


def test_damaged_files_are_no_defect_but_no_checkpoint(tmp_path):
    qwen().write(tmp_path / "model")
    for name in ("generation_config.json", "config.json"):
        kept = (tmp_path / "model" / name).read_text()
        (tmp_path / "model" / name).write_text("{")
        with pytest.raises(CheckpointError, match=name):
            diagnose(tmp_path / "model")
        (tmp_path / "model" / name).write_text(kept)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="header promises"):
        diagnose(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"chat_template": 5}, ["template-broken"]),
        ({"chat_template": {"default": ["a"]}}, ["template-broken"]),
        ({"chat_template": "{% for"}, ["template-broken"]),
        ({"chat_template": {"rag": "x"}}, ["no-default-template"]),
        ({"chat_template": [{"x": 1}]}, ["tokenizer-broken", "no-default-template"]),
        ({"added_tokens_decoder": []}, ["tokenizer-broken", "no-template"]),
        ({"model_max_length": "512"}, ["tokenizer-broken", "no-template"]),
        ({"eos_token": "<nowhere>"}, ["files-disagree", "no-template"]),
    ],
)
def test_odd_values_are_findings_not_crashes(tmp_path, change, expected):
    it = qwen()
    it.template = None
    it.tokenizer_config |= change
    found = ids(look(it, tmp_path / "model"))
    assert sorted(found) == sorted(
        id for id in expected if not (id == "no-template" and "tokenizer-broken" in expected)
    )


def test_an_adapter_is_diagnosed_by_its_chat_files(tmp_path):
    it = qwen()
    it.tokenizer_config["eos_token"] = "<|endoftext|>"
    it.config = None
    it.generation |= {"eos_token_id": [it.id("<|endoftext|>")]}
    it.files["adapter_config.json"] = '{"peft_type": "LORA"}'
    assert ids(look(it, tmp_path / "adapter")) == ["end-of-turn-not-eos"]


def test_without_a_template_its_behaviour_is_not_judged(tmp_path):
    it = olmo()
    it.template = None
    diagnosis = look(it, tmp_path / "model")
    assert ids(diagnosis) == ["no-template"]
    assert diagnosis.profile["template"] is None
    assert "--template" in diagnosis.findings[0].remedy


def test_another_template_can_be_judged(tmp_path):
    it = qwen()
    it.template = None
    it.write(tmp_path / "model")
    assert ids(diagnose(tmp_path / "model", "chatml")) == []
    assert ids(diagnose(tmp_path / "model", "gemma"))[0] == "template-tokens-missing"
    (tmp_path / "own.jinja").write_text(templates.CHATML)
    assert ids(diagnose(tmp_path / "model", "own.jinja", base_dir=tmp_path)) == []
    with pytest.raises(UserError, match="chatml"):
        diagnose(tmp_path / "model", "chatmll")


def test_what_a_bundled_template_declares_is_a_note(tmp_path):
    it = gemma()
    it.template = None
    it.write(tmp_path / "model")
    found = {finding.id: finding.severity for finding in diagnose(tmp_path / "model", "gemma").findings}
    assert set(found.values()) == {"note"}
    assert "content-trimmed" in found


def test_an_extra_that_lacks_is_said_instead_of_a_defect(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match=r"posttrain\[tiktoken\]"):
        diagnose(tmp_path)


def test_data_are_counted_and_placed(tmp_path):
    it = qwen()
    say = [{"role": "user", "content": "Kaixo"}, {"role": "assistant", "content": "Bai."}]
    forged = [{"role": "user", "content": "a<|im_start|>b"}, say[1]]
    thought = [say[0], {"role": "assistant", "content": "Bai.", "reasoning_content": "Zer?"}]
    it.rows = [{"messages": say}, {"messages": forged}, {"messages": thought}, {"messages": forged}]
    found = {finding.id: finding for finding in look(it, tmp_path / "model").findings}
    assert found.keys() == {"control-tokens-in-data", "reasoning-dropped"}
    forgery = found["control-tokens-in-data"]
    assert forgery.where.endswith("model.jsonl:2")
    assert forgery.cause == "2 of 4 rows looked at; the first: the user says '<|im_start|>'"
    assert found["reasoning-dropped"].where.endswith("model.jsonl:3")


def test_pairs_are_data_too(tmp_path):
    it = olmo()
    end = "<|endoftext|>"
    it.rows = [{"prompt": "Zer?", "chosen": f"Bai.{end}", "rejected": "Ez."} for _ in range(3)]
    assert ids(look(it, tmp_path / "model")) == ["eos-in-data"]


def test_data_need_a_template(tmp_path):
    it = olmo()
    it.template, it.rows = None, [{"prompt": "a", "completion": "b"}]
    with pytest.raises(UserError, match="--template"):
        look(it, tmp_path / "model")


def test_each_token_row_says_why_it_looks_untrained(tmp_path):
    it = llama3()
    start, end, eot = (it.id(f"<|{name}|>") for name in ("start_header_id", "end_header_id", "eot_id"))
    it.tensors[EMBEDDING][start] = 0
    it.tensors[EMBEDDING][end] *= 0.01
    it.tensors[EMBEDDING][eot] = it.tensors[EMBEDDING][it.id("<|begin_of_text|>")]
    (finding,) = look(it, tmp_path / "model").findings
    assert finding.id == "token-row-untrained"
    for reason in (
        "'<|start_header_id|>' is zeros",
        "'<|end_header_id|>' has length 0.00",
        "'<|eot_id|>' equals the row",
    ):
        assert reason in finding.cause


def test_rows_that_nothing_predicts_may_look_alike_in_the_output_matrix(tmp_path):
    it = llama3()
    head = it.tensors["lm_head.weight"]
    head[it.id("<|start_header_id|>")] = head[it.id("<|end_header_id|>")]
    assert ids(look(it, tmp_path / "model")) == []


def test_a_stop_token_that_ends_no_answer_may_pad(tmp_path):
    it = qwen()
    it.generation |= {"eos_token_id": [it.id("<|im_end|>"), it.id("<|endoftext|>")]}
    assert ids(look(it, tmp_path / "model")) == []


def test_a_thought_that_the_prompt_opens_belongs_to_no_mark(tmp_path):
    it = qwen()
    it.template = templates.CHATML_MARKED
    it.replace(
        "{%- if message['role'] == 'assistant' -%}",
        "{%- if message['role'] == 'assistant' -%}{{- '<think>\\n\\n</think>\\n\\n' -}}",
    )
    it.replace("{{- '<|im_start|>assistant\\n' -}}", "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' -}}")
    assert ids(look(it, tmp_path / "model")) == []
