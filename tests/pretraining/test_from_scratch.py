"""A tokenizer and a model from nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from posttrain.chat.tokenizer import load_tokenizer
from posttrain.errors import RecipeError
from posttrain.pretraining.init import init_model
from posttrain.pretraining.tokenizer import train_tokenizer

TEXTS = ["Kaixo mundua! Què és això? Que é Galicia? ¿Qué es España?\n\n  bat 123 4567"] * 20
RESERVED = ["<|im_start|>", "<|im_end|>"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 320, RESERVED, 128, folder)
    return load_tokenizer(folder)


def test_special_tokens_come_first(tokenizer: PreTrainedTokenizerFast) -> None:
    names = ["<|endoftext|>", "<|pad|>", *RESERVED]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (0, 1, 128)
    assert len(tokenizer) <= 320
    assert not {0, 1, 2, 3} & set(tokenizer(TEXTS[0])["input_ids"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.text())
def test_every_text_survives(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    ids = backend.encode(text, add_special_tokens=False).ids
    assert backend.decode(ids, skip_special_tokens=False) == text
    assert not {0, 1, 2, 3} & set(ids)


def test_the_same_texts_give_the_same_tokenizer(tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_tokenizer(TEXTS, 300, RESERVED, 128, tmp_path / name)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()


def test_a_vocabulary_without_room_for_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tokenizer.vocab_size: 259\n  -> 256 bytes and 4 tokens need 260"):
        train_tokenizer(TEXTS, 259, RESERVED, 128, tmp_path)


def test_a_model_takes_its_ids_from_the_tokenizer_and_its_weights_from_the_seed(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    model = init_model(SIZE, tokenizer, seed=4)
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows % 8 == 0
    assert len(tokenizer) <= rows < len(tokenizer) + 8
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert (model.config.eos_token_id, model.config.pad_token_id) == (0, 1)
    assert model.generation_config.eos_token_id == [0]
    torch.manual_seed(9)
    same, other = init_model(SIZE, tokenizer, seed=4), init_model(SIZE, tokenizer, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
