"""Loading tokenizers: light, and with errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from base64 import b64encode

import pytest

from posttrain.chat.tokenizer import load_any_tokenizer, load_tokenizer
from posttrain.errors import ChatError, UserError

NO_TORCH = """
import sys
from pathlib import Path
from posttrain.chat import contract, encode, files, jinja, render, templates, tokenizer, turns
loaded = tokenizer.load_tokenizer(Path(sys.argv[1]))
template = templates.load_template("chatml", Path())
chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
assert render.render_conversation(loaded, template, chat).input_ids
print([name for name in ("torch", "datasets", "trl", "peft") if name in sys.modules])
"""


def test_rendering_imports_no_torch(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    done = subprocess.run([sys.executable, "-c", NO_TORCH, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_missing_tokenizer_json_says_what_is_there(tmp_path):
    with pytest.raises(ChatError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ChatError, match=r"posttrain\[sentencepiece\]"):
        load_tokenizer(tmp_path)


def test_damaged_tokenizer_json(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ChatError, match="does not load"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ChatError, match="does not load"):
        load_tokenizer(tmp_path)


def test_truncation_baked_into_the_file_is_off(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(spec))
    loaded = load_tokenizer(tmp_path)
    assert len(loaded("What is the capital of Spain?")["input_ids"]) > 3


def test_code_in_the_folder_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", None]}})
    )
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T: pass\nclass C: pass\n")
    with pytest.raises(ChatError, match="does not load"):
        load_any_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_vocabulary_and_merges_are_converted(shared_dir):
    folder = shared_dir / "tokenizers" / "qwen2"
    with pytest.raises(ChatError, match=r"vocab\.json"):
        load_tokenizer(folder)
    assert load_any_tokenizer(folder).convert_tokens_to_ids("<|im_end|>") == 151645


@pytest.mark.parametrize(
    ("missing", "package", "extra"),
    [("sentencepiece", "sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf", "sentencepiece")],
)
def test_a_sentencepiece_model_names_its_extra(tmp_path, monkeypatch, missing, package, extra):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError) as caught:
        load_any_tokenizer(tmp_path)
    assert str(caught.value) == f"{package}: is not installed\n  -> install it with: pip install 'posttrain[{extra}]'"


def test_a_tiktoken_file_names_its_extra(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError) as caught:
        load_any_tokenizer(tmp_path)
    assert str(caught.value) == "tiktoken: is not installed\n  -> install it with: pip install 'posttrain[tiktoken]'"


def test_a_tekken_file_needs_mistral_common_only_without_its_special_tokens(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mistral_common", None)
    special = [{"rank": rank, "token_str": text} for rank, text in enumerate(["<unk>", "<s>", "</s>", "[INST]"])]
    ranks = [{"token_bytes": b64encode(bytes([byte])).decode()} for byte in range(256)]
    config = {"pattern": r"\s+|\S+", "default_vocab_size": 260, "default_num_special_tokens": 4}
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": ranks, "special_tokens": special}))
    loaded = load_any_tokenizer(tmp_path)
    assert loaded("[INST]a", add_special_tokens=False)["input_ids"] == [3, 4 + ord("a")]
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")
    (tmp_path / "tekken.json").write_text(json.dumps({"config": config, "vocab": ranks}))
    with pytest.raises(UserError) as caught:
        load_any_tokenizer(tmp_path)
    assert str(caught.value).endswith("pip install 'posttrain[mistral]'")
    assert caught.value.where == "mistral-common"


def test_a_tiktoken_file_is_converted(shared_dir):
    loaded = load_any_tokenizer(shared_dir / "tokenizers" / "llama3")
    assert len(loaded) == 128_000  # the file holds ranks only, no special tokens
    assert loaded.decode(loaded("Herri bat da.")["input_ids"]) == "Herri bat da."
