"""Tokenizers from a folder, without torch wherever there is a `tokenizer.json`."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from posttrain.errors import ChatError, missing_extra

_TEKKEN = "tekken.json"
_RANK = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s*")
"""A line of a tiktoken file: a token in base64 and its rank."""


class _Form(NamedTuple):
    """A form of tokenizer that has to be converted: what it is, and which extra brings which modules."""

    what: str
    extra: str
    modules: tuple[str, ...]


_SENTENCEPIECE = _Form("a SentencePiece model", "sentencepiece", ("sentencepiece", "google.protobuf"))
_TIKTOKEN = _Form("a tiktoken file", "tiktoken", ("tiktoken",))
_OLD_TEKKEN = _Form("a Mistral tekken file without its special tokens", "mistral", ("mistral_common",))
_PACKAGES = {"google.protobuf": "protobuf", "mistral_common": "mistral-common"}


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


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (hex) of everything that decides a tokenizer's ids, and of the special tokens that templates write."""
    named = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()}\0{named}".encode()).hexdigest()


def load_any_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Loads a folder's tokenizer in whatever form it has; may import torch, never runs code of the folder.

    Raises:
        UserError: its form needs an extra that is not installed (names it).
        ChatError: it needs its own code, is damaged, or is no fast tokenizer.
    """
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    form = _form(folder)
    for module in form.modules if form else ():
        if not _is_installed(module):
            raise missing_extra(_PACKAGES.get(module, module), form.extra if form else "")
    try:
        tokenizer = _converted(folder)
    except Exception as error:  # conversions fail with every kind of exception; all mean the same to a user
        raise ChatError(str(folder), f"tokenizer does not load ({_first_line(error)})", _remedy(folder)) from None
    if not tokenizer.is_fast:
        raise ChatError(str(folder), f"{type(tokenizer).__name__} is no fast tokenizer", "provide a tokenizer.json")
    return _plain(tokenizer)


def _converted(folder: Path) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer
    from transformers.integrations.mistral import convert_tekken_tokenizer

    if _is_tekken(folder):  # AutoTokenizer would give mistral-common's own class, or none of the special tokens
        return convert_tekken_tokenizer(str(folder / _TEKKEN))
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def _plain(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    if not isinstance(tokenizer.model_max_length, (int, float)):
        found = f"model_max_length is {tokenizer.model_max_length!r}, not a number"
        raise ChatError("tokenizer_config.json", found, "write a number there")
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _form(folder: Path) -> _Form | None:
    """The form of a folder's tokenizer where it takes a library to read it; None = none, or what needs none."""
    if _is_tekken(folder):
        return None if _names_special_tokens(folder / _TEKKEN) else _OLD_TEKKEN
    for name in ("tokenizer.model", "tiktoken.model", "spiece.model", "sentencepiece.bpe.model"):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                return _TIKTOKEN if _RANK.fullmatch(file.readline(4096)) else _SENTENCEPIECE
    return None


def _is_tekken(folder: Path) -> bool:
    return (folder / _TEKKEN).is_file() and not (folder / "tokenizer.model").is_file()


def _names_special_tokens(path: Path) -> bool:
    """Whether a tekken file holds its special tokens; older ones leave them to mistral-common."""
    try:
        return "special_tokens" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return True  # damaged: loading says so


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a dotted name, the parent
        return False


def _instead(folder: Path) -> str:
    names = ("tokenizer.model", "tiktoken.model", "spiece.model", _TEKKEN, "vocab.json")
    found = [name for name in names if (folder / name).is_file()]
    return f" (there is {', '.join(found)})" if found else ""


def _remedy(folder: Path) -> str:
    form = _form(folder)
    convert = "convert it: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    if form is not None:
        return f"it is {form.what}: pip install 'posttrain[{form.extra}]', then {convert}"
    return convert if _instead(folder) else "use a folder with the model's tokenizer files"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
