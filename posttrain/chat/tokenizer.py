"""Tokenizers from a folder, without torch wherever there is a `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from posttrain.errors import ChatError

_CONVERSIONS = {
    "tokenizer.model": "a SentencePiece or tiktoken model; install 'posttrain[sentencepiece]' or 'posttrain[tiktoken]'",
    "tekken.json": "a Mistral tekken file; install 'mistral-common'",
    "vocab.json": "vocabulary and merges",
}


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Loads `tokenizer.json` of a folder; imports no torch, runs no code of the folder, asks no network.

    Truncation and padding that were baked into the file are switched off: they cut rows silently.

    Raises:
        ChatError: there is no `tokenizer.json` (says what is there instead), or a file is damaged.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ChatError(str(folder), f"no tokenizer.json{_instead(folder)}", _remedy(folder))
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    except Exception as error:  # the tokenizers library raises bare Exceptions for a damaged file
        raise ChatError(str(folder), f"tokenizer does not load ({_first_line(error)})", "download it again") from None
    return _plain(tokenizer)


def load_any_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Loads a folder's tokenizer in whatever form it has; may import torch, never runs code of the folder.

    Raises:
        ChatError: it needs an extra, its own code, or is no fast tokenizer.
    """
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # conversions fail with every kind of exception; all mean the same to a user
        raise ChatError(str(folder), f"tokenizer does not load ({_first_line(error)})", _remedy(folder)) from None
    if not tokenizer.is_fast:
        raise ChatError(str(folder), f"{type(tokenizer).__name__} is no fast tokenizer", "provide a tokenizer.json")
    return _plain(tokenizer)


def _plain(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _instead(folder: Path) -> str:
    found = [name for name in _CONVERSIONS if (folder / name).is_file()]
    return f" (there is {', '.join(found)})" if found else ""


def _remedy(folder: Path) -> str:
    for name, what in _CONVERSIONS.items():
        if (folder / name).is_file():
            return f"{name} is {what}, then convert it: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    return "use a folder with the model's tokenizer files"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
