"""Loading tokenizers: light, and with errors that say what to do."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from posttrain.chat.tokenizer import load_any_tokenizer, load_tokenizer
from posttrain.errors import ChatError

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
