"""Tokenizers that the tests of the chat contract share."""

from __future__ import annotations

import pytest
from chat_tiny import LLAMA3, SPECIAL, make_tokenizer
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML tokens, `</s>` as eos, and `<think>` as a token that is not special."""
    return make_tokenizer(SPECIAL, ("<think>", "</think>"), eos_token="</s>", pad_token="<|pad|>")


@pytest.fixture
def rich_tokenizer() -> PreTrainedTokenizerFast:
    """As `tokenizer`, with a bos and Llama-3's tokens: every bundled template fits it."""
    return make_tokenizer(SPECIAL + LLAMA3, bos_token="<s>", eos_token="</s>", pad_token="<|pad|>")
