"""The repair beside the zoo: what is linked and left out, what is proved before it is changed, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zoo_templates as templates
from zoo import EMBEDDING, Specimen, gemma, llama3, olmo, qwen, read_tensors, salamandra
from zoo_tokenizers import token_count

from posttrain.artifact import RECORD, Record, write_record
from posttrain.chat.contract import control_tokens
from posttrain.chat.corpus import conversations
from posttrain.chat.jinja import Message, render_text
from posttrain.chat.templates import ChatTemplate, load_template, read_folder_template
from posttrain.chat.tokenizer import load_tokenizer
from posttrain.doctor import fix as fix_module
from posttrain.doctor.diagnose import diagnose
from posttrain.doctor.fix import Repair, fix
from posttrain.doctor.mend_template import FOLD
from posttrain.errors import ChatError, UserError
from posttrain.merging import atomic
from posttrain.models.new_tokens import read_new_tokens

Tree = dict[str, bytes]


def tree(folder: Path) -> Tree:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mended(tmp_path: Path, specimen: Specimen, template: str | None = None) -> tuple[Path, Path, Repair]:
    """Writes and mends a specimen: (source, copy, repair)."""
    specimen.write(tmp_path / "sick")
    return tmp_path / "sick", tmp_path / "well", fix(tmp_path / "sick", tmp_path / "well", template)


def own(folder: Path) -> str:
    template = read_folder_template(folder)
    assert template is not None
    return template.inference


# the copy


def test_weights_are_linked_and_nothing_else_is(tmp_path: Path) -> None:
    sick, well, _ = mended(tmp_path, llama3())
    linked = {path.name for path in well.iterdir() if os.path.samefile(path, sick / path.name)}
    assert linked == {"model.safetensors"}


def test_weights_are_copied_where_they_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(fix_module.os, "link", refuse)
    sick, well, _ = mended(tmp_path, llama3())
    assert not os.path.samefile(well / "model.safetensors", sick / "model.safetensors")
    assert tree(well) == tree(sick)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    qwen().write(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    fix(tmp_path / "snapshot", tmp_path / "well")
    assert tree(tmp_path / "well") == tree(tmp_path / "blobs")
    assert not any(path.is_symlink() for path in (tmp_path / "well").iterdir())


def test_logs_checkpoints_and_stale_forms_of_the_weights_stay_behind(tmp_path: Path) -> None:
    specimen = qwen()
    specimen.files |= {
        "checkpoints/x.json": "{}",
        "log.txt": "",
        "pytorch_model.bin": "",
        "README.md": "A model",
    }
    _, well, _ = mended(tmp_path, specimen)
    assert "README.md" in tree(well)
    assert not {"checkpoints/x.json", "log.txt", "pytorch_model.bin"} & tree(well).keys()


@pytest.mark.parametrize("inside", [True, False])
def test_a_bad_place_for_the_copy_is_refused(tmp_path: Path, inside: bool) -> None:
    qwen().write(tmp_path / "sick")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="lies inside" if inside else "exists already"):
        fix(tmp_path / "sick", tmp_path / "sick" / "copy" if inside else tmp_path / "there")


def test_a_repair_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specimen = qwen()
    specimen.template = None
    specimen.write(tmp_path / "sick")
    before = tree(tmp_path)
    monkeypatch.setattr(atomic, "publish_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fix(tmp_path / "sick", tmp_path / "well")
    assert tree(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"sick"}


def test_what_a_killed_repair_left_is_no_hindrance(tmp_path: Path) -> None:
    qwen().write(tmp_path / "sick")
    (tmp_path / ".well.mending").mkdir()
    (tmp_path / ".well.mending" / "config.json").write_text("{")
    fix(tmp_path / "sick", tmp_path / "well")
    assert tree(tmp_path / "well") == tree(tmp_path / "sick")


def test_torch_is_not_needed(tmp_path: Path) -> None:
    specimen = olmo()
    specimen.template = templates.CHATML
    specimen.write(tmp_path / "sick")
    code = (
        "import sys; from pathlib import Path; from posttrain.doctor.fix import fix;"
        f"r = fix(Path({str(tmp_path / 'sick')!r}), Path({str(tmp_path / 'well')!r}));"
        "assert r.changes and not r.left, r; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# templates


@pytest.mark.parametrize("name", ["gemma", "gemma3", "llama3.1", "mistral-v3", "qwen2.5"])
def test_what_a_family_is_known_for_is_not_mended(tmp_path: Path, name: str) -> None:
    specimen = {"gemma": gemma, "gemma3": gemma, "llama3.1": llama3}.get(name, qwen)()
    template = load_template(name, Path())
    specimen.template = template.inference
    _, well, repair = mended(tmp_path, specimen)
    if name != "mistral-v3":  # there the vocabulary does not fit, and gets the tokens
        assert not any("chat_template" in change for change in repair.changes)
    assert own(well) == template.inference


def test_a_chosen_file_becomes_the_template(tmp_path: Path) -> None:
    qwen().write(tmp_path / "sick")
    text = templates.CHATML_TOOLS
    (tmp_path / "mine.jinja").write_text(text)
    repair = fix(tmp_path / "sick", tmp_path / "well", "mine.jinja", tmp_path)
    assert own(tmp_path / "well") == text
    assert len(repair.changes) == 1
    with pytest.raises(UserError):
        fix(tmp_path / "sick", tmp_path / "other", "none.jinja", tmp_path)
    assert not (tmp_path / "other").exists()


def test_a_base_goes_on_beginning_with_bos_and_a_chat_model_keeps_its_habit(tmp_path: Path) -> None:
    base, chat = salamandra(), salamandra()
    base.template, chat.template = None, templates.CHATML
    _, well, repair = mended(tmp_path / "base", base, "chatml")
    assert own(well) == "{{ bos_token }}" + load_template("chatml", Path()).inference
    assert repair.left == ()
    assert fix(well, tmp_path / "again", "chatml").changes == ()
    sick, well, repair = mended(tmp_path / "chat", chat)
    assert own(well) == own(sick)
    assert [finding.id for finding in repair.left] == ["bos-not-in-template"]


REFUSES = "{%- if messages[0]['role'] == 'system' -%}{{- raise_exception('no system') -}}{%- endif -%}"


def test_folding_a_system_message_changes_no_other_conversation(tmp_path: Path) -> None:
    specimen = qwen()
    specimen.template = REFUSES + templates.CHATML
    sick, well, repair = mended(tmp_path, specimen)
    assert own(well) == FOLD + own(sick)
    assert repair.left == ()
    tokenizer = load_tokenizer(well)
    old, new = (ChatTemplate(folder.name, own(folder)) for folder in (sick, well))
    checked = 0
    for conversation in conversations(120, seed=3):
        if conversation.messages[0]["role"] == "system" or not _renders(tokenizer, old, conversation.messages):
            continue
        if any(message["role"] == "system" for message in conversation.messages):
            continue
        checked += 1
        assert render_text(tokenizer, new, conversation.messages) == render_text(tokenizer, old, conversation.messages)
    assert checked > 30
    talk: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Who?"}]
    said = "<|im_start|>user\nBe brief.\n\n Who?<|im_end|>\n<|im_start|>assistant\n"
    assert render_text(tokenizer, new, talk, add_generation_prompt=True) == said


def _renders(tokenizer: object, template: ChatTemplate, messages: list[Message]) -> bool:
    try:
        render_text(tokenizer, template, messages)  # type: ignore[arg-type]
    except ChatError:
        return False
    return True


def test_a_layout_with_words_between_tags_is_not_guessed_at(tmp_path: Path) -> None:
    specimen = qwen()
    specimen.template = templates.INDENTED.replace("{% endfor %}", "{% endfor %}Answer:\n")
    sick, well, repair = mended(tmp_path, specimen)
    assert own(well) == own(sick)
    assert "template-indented" in {finding.id for finding in repair.left}


# tokens and rows


def test_a_tokenizer_that_was_cut_short_is_built_again_from_its_other_files(tmp_path: Path, shared_dir: Path) -> None:
    source = shared_dir / "tokenizers" / "qwen2"
    (tmp_path / "sick").mkdir()
    for path in source.iterdir():
        (tmp_path / "sick" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "sick" / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    repair = fix(tmp_path / "sick", tmp_path / "well")
    assert "tokenizer.json: was damaged, built again from the tokenizer's other files" in repair.changes
    tokenizer = load_tokenizer(tmp_path / "well")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 151645
    assert tokenizer.decode(tokenizer("Zer da Euskadi?")["input_ids"]) == "Zer da Euskadi?"


def test_a_pad_token_takes_a_row_that_no_token_has(tmp_path: Path) -> None:
    specimen = salamandra()
    for entry in specimen.tokenizer["added_tokens"]:
        if entry["content"] == "<pad>":
            entry["content"] = "<|tool|>"
    vocabulary = specimen.tokenizer["model"]["vocab"]
    vocabulary["<|tool|>"] = vocabulary.pop("<pad>")
    specimen.tokenizer["model"]["byte_fallback"] = False  # so unk is written, and is no pad either
    specimen.tokenizer_config["pad_token"] = specimen.tokenizer_config["eos_token"]
    specimen.say(pad_token_id=specimen.id("<|im_end|>"))
    rows, tokens = specimen.tensors[EMBEDDING].shape[0], token_count(specimen.tokenizer)
    assert tokens < rows
    _, well, _ = mended(tmp_path, specimen)
    tokenizer = load_tokenizer(well)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|pad|>", tokens)
    assert json.loads((well / "config.json").read_text())["pad_token_id"] == tokens
    assert len(read_tensors(well)[EMBEDDING]) == rows
    assert read_new_tokens(well) == ()  # what pads needs no training


def test_rows_a_base_of_ours_never_saw_begin_anew(tmp_path: Path) -> None:
    """Its record knows them; by their looks they are as good as any row."""
    specimen = qwen()
    specimen.template = None
    specimen.write(tmp_path / "sick")
    ids = [specimen.id("<|im_start|>"), specimen.id("<|im_end|>")]
    summary = {"metrics": {"untrained_token_ids": [3, *ids]}}
    write_record(tmp_path / "sick", Record("base", "pretrain", 1, "f", {}, summary=summary))
    fix(tmp_path / "sick", tmp_path / "well")
    assert [token.id for token in read_new_tokens(tmp_path / "well")] == ids
    assert not (tmp_path / "well" / RECORD).exists()
    old, new = read_tensors(tmp_path / "sick")[EMBEDDING], read_tensors(tmp_path / "well")[EMBEDDING]
    assert (old != new).any(axis=1).nonzero()[0].tolist() == ids
    assert fix(tmp_path / "well", tmp_path / "again").changes == ()


def test_reserved_tokens_become_the_templates_before_any_row_is_added(tmp_path: Path) -> None:
    specimen = llama3()
    specimen.template = None
    _, well, repair = mended(tmp_path, specimen, "chatml")
    tokenizer, template = load_tokenizer(well), read_folder_template(well)
    assert template is not None
    reserved = {specimen.id(f"<|reserved_special_token_{number}|>") for number in range(4)}
    written = {token for text, token in control_tokens(tokenizer, template) if text.startswith("<|im_")}
    assert written < reserved
    assert {token.id for token in read_new_tokens(well)} == written
    assert len(tokenizer) == token_count(specimen.tokenizer)
    assert repair.left == ()


def test_what_the_diagnosis_says_of_the_copy_is_what_is_left(tmp_path: Path) -> None:
    specimen = llama3()
    specimen.tokenizer_config["model_max_length"] = 10**30
    specimen.template = templates.LLAMA3.replace("message['content']", "message['content'] | trim")
    _, well, repair = mended(tmp_path, specimen)
    assert repair.left == diagnose(well).findings
    assert {finding.id for finding in repair.left} == {"content-trimmed"}
