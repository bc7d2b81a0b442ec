"""The template a vocabulary fits, its free tokens, and what a new token's row begins as."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from zoo_tokenizers import Spec, byte_level, sentencepiece, token_id

from posttrain.chat.templates import load_template
from posttrain.chat.tokenizer import load_tokenizer
from posttrain.chat.turns import required_tokens_missing
from posttrain.doctor.vocabulary import add_token, new_row, rename_token, spare_tokens, suggest_template

GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
MISTRAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
SALAMANDRA = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]


def loaded(spec: Spec, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **names)


@pytest.mark.parametrize(
    ("spec", "names", "config", "expected"),
    [
        (byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]), {"eos_token": "<|endoftext|>"}, {}, "chatml"),
        (byte_level(LLAMA), {"bos_token": LLAMA[0], "eos_token": LLAMA[1]}, {}, "llama3"),
        (sentencepiece(GEMMA), {"bos_token": "<bos>", "eos_token": "<eos>"}, {}, "gemma3"),
        (sentencepiece(SALAMANDRA), {"bos_token": "<s>", "eos_token": "</s>"}, {"model_type": "llama"}, "salamandra"),
        (sentencepiece(SALAMANDRA), {"bos_token": "<s>", "eos_token": "</s>"}, {"model_type": "gpt2"}, "chatml"),
        (byte_level(["<|endoftext|>"]), {"eos_token": "<|endoftext|>"}, {}, "tulu"),
        (sentencepiece(["<unk>", "<s>", "</s>"]), {"bos_token": "<s>", "eos_token": "</s>"}, {}, "tulu"),
        (byte_level(["<|pad|>"]), {}, {}, "plain"),
    ],
)
def test_the_template_that_uses_most_of_the_vocabulary(
    spec: Spec, names: dict[str, str], config: dict[str, Any], expected: str
) -> None:
    assert suggest_template(loaded(spec, **names), config) == expected


@pytest.mark.parametrize(
    ("folder", "expected"), [("phi-2", "tulu"), ("mistral03", "mistral-v3"), ("phi-3-mini", "phi3")]
)
def test_the_template_of_real_vocabularies(shared_dir: Path, folder: str, expected: str) -> None:
    tokenizer = load_tokenizer(shared_dir / "tokenizers" / folder)
    assert suggest_template(tokenizer, {}) == expected


def test_what_is_suggested_fits(shared_dir: Path) -> None:
    for folder in ("phi-2", "mistral03", "phi-3-mini"):
        tokenizer = load_tokenizer(shared_dir / "tokenizers" / folder)
        template = load_template(suggest_template(tokenizer, {}), Path())
        assert required_tokens_missing(tokenizer, template) == []


def test_reserved_tokens_are_spare_unless_something_uses_them(shared_dir: Path) -> None:
    chatml = load_template("chatml", Path())
    spec = byte_level(["</s>", "<unused1>", "<unused0>", "<|reserved_special_token_3|>", "<|tool|>", "[control_8]"])
    tokenizer = loaded(spec, eos_token="</s>", pad_token="<unused0>")
    assert spare_tokens(tokenizer, chatml) == ["<unused1>", "<|reserved_special_token_3|>", "[control_8]"]
    mistral = load_tokenizer(shared_dir / "tokenizers" / "mistral03")
    assert spare_tokens(mistral, chatml)[:2] == ["[control_8]", "[control_9]"]


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_renaming_keeps_id_and_ordinary_text(make) -> None:
    spec = make(["<unk>", "</s>", "<unused7>"])
    number, plain = token_id(spec, "<unused7>"), loaded(spec)("What is it?")["input_ids"]
    assert rename_token(spec, "<unused7>", "<|im_end|>") == number
    tokenizer = loaded(spec)
    assert tokenizer("a<|im_end|>b")["input_ids"].count(number) == 1
    assert tokenizer("What is it?")["input_ids"] == plain
    assert "<unused7>" not in tokenizer.get_vocab()


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_an_added_token_has_the_id_it_was_promised(make) -> None:
    spec = make(["<unk>", "</s>"])
    first, second = add_token(spec, "<|im_start|>"), add_token(spec, "<|im_end|>")
    tokenizer = loaded(spec)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [first, second]
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [second]
    assert second == len(tokenizer) - 1


def test_rows_begin_as_what_tokens_mean() -> None:
    spec = byte_level(["</s>", "<|im_start|>", "<|im_end|>", "<|assistant|>", "<|1|>", "<start_of_turn>"])
    tokenizer = loaded(spec, eos_token="</s>")
    eos = tokenizer.eos_token_id

    def words(text: str) -> set[int]:
        return set(min((tokenizer(start + text)["input_ids"] for start in ("", " ")), key=len))

    assert new_row(tokenizer, "<|im_end|>", [eos], 10_000).sources == (eos,)
    assert set(new_row(tokenizer, "<|im_start|>", [], 10_000).sources) == words("start")
    assert set(new_row(tokenizer, "<|assistant|>", [], 10_000).sources) == words("assistant")
    assert set(new_row(tokenizer, "<start_of_turn>", [], 10_000).sources) == words("start of turn")
    assert new_row(tokenizer, "<|1|>", [], 10_000).sources == ()
    assert new_row(tokenizer, "</s>", [eos], 10_000).sources != (eos,)  # its own row is what is missing
    assert new_row(tokenizer, "<|im_start|>", [], 3).sources == ()  # rows that are not there have no values
