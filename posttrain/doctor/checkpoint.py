"""A checkpoint as the doctor reads it: JSON files at once, headers and rows of the weights when asked for.

Nothing here imports torch where there is a `tokenizer.json`, and no file is read whole but the small ones.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.chat.templates import ChatTemplate, load_template, read_folder_template
from posttrain.chat.tokenizer import load_any_tokenizer
from posttrain.errors import ChatError, CheckpointError, UserError
from posttrain.models.files import model_headers, read_json
from posttrain.models.hub import LocalPath, StageRef, fetch_description, parse_reference, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
HEADS = ("lm_head.weight", "embed_out.weight", "output.weight")
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_MODEL_KEY = re.compile(r',\s*"model"\s*:\s*\{')
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies."""

    name: str
    file: Path
    dtype: str
    """As safetensors spells it: `BF16`, `F32`, ..."""
    shape: tuple[int, ...]
    begin: int
    """First byte in the file."""
    end: int
    """Byte after the last one."""

    @property
    def readable(self) -> bool:
        """Whether `read_rows` knows its dtype (quantized matrices are not read)."""
        return self.dtype in _DTYPES and len(self.shape) == 2


@dataclass(frozen=True)
class Checkpoint:
    """A model or tokenizer folder. Costly parts are read when first asked for, and kept.

    Everything but `tensors` tells a broken file from an absent one without raising: see the `..._error` fields.
    """

    folder: Path
    chosen: ChatTemplate | None = None
    """A template to judge instead of the folder's own."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`, or {} where there is none (a tokenizer-only folder); CheckpointError when damaged."""
        return self._json("config.json") or {}

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The part of the config that describes the language model."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @cached_property
    def generation(self) -> dict[str, Any] | None:
        """`generation_config.json`, or None where there is none; CheckpointError when damaged."""
        return self._json("generation_config.json")

    @cached_property
    def tokenizer_config(self) -> dict[str, Any]:
        """`tokenizer_config.json`, or {} where there is none or it is damaged (`tokenizer_error` says so)."""
        try:
            return self._json("tokenizer_config.json") or {}
        except CheckpointError:
            return {}

    @cached_property
    def tokenizer_json(self) -> dict[str, Any] | None:
        """`tokenizer.json` as it stands, or None where there is none or it is damaged."""
        try:
            return self._json("tokenizer.json")
        except CheckpointError:
            return None

    @cached_property
    def tokenizer_head(self) -> dict[str, Any]:
        """`tokenizer.json` without its model: added tokens, normalizer, post-processor, ...; {} where it is damaged.

        The model, nearly all of the file, comes last in files of the tokenizers library and is not parsed.
        """
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            return {}
        try:
            text = path.read_text(encoding="utf-8")
            head: dict[str, Any] = json.loads(_MODEL_KEY.split(text, maxsplit=1)[0] + "}")
        except ValueError:
            return self.tokenizer_json or {}
        return head if "added_tokens" in head else self.tokenizer_json or {}

    @property
    def has_model(self) -> bool:
        """Whether there is a `config.json`: what is said of models holds only then."""
        return (self.folder / "config.json").is_file()

    @cached_property
    def _tokenizer(self) -> tuple[PreTrainedTokenizerFast | None, ChatError | None]:
        try:
            loaded = load_any_tokenizer(self.folder)
        except ChatError as error:
            return None, error
        renumbered = self._renumbered(loaded)
        return (None, renumbered) if renumbered else (loaded, None)

    def _renumbered(self, loaded: PreTrainedTokenizerFast) -> ChatError | None:
        """An added token that loads under another id than tokenizer.json gives it: the library closes gaps silently."""
        for entry in self.tokenizer_head.get("added_tokens", []):
            token = loaded.backend_tokenizer.token_to_id(entry["content"])
            if token != entry["id"]:
                cause = f"{entry['content']!r} has id {entry['id']} there and {token} when it is loaded"
                return ChatError("tokenizer.json, added_tokens", cause, "download the file again: ids have gaps in it")
        return None

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """The loaded tokenizer, or None where its files do not load."""
        return self._tokenizer[0]

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token's text -> its id, added ones included; {} where the tokenizer does not load."""
        return {} if self.tokenizer is None else self.tokenizer.get_vocab()

    @property
    def tokenizer_error(self) -> ChatError | None:
        """Why the tokenizer does not load."""
        return self._tokenizer[1]

    @cached_property
    def _own_template(self) -> tuple[ChatTemplate | None, ChatError | None]:
        try:
            return read_folder_template(self.folder), None
        except ChatError as error:
            return None, error

    @property
    def own_template(self) -> ChatTemplate | None:
        """The folder's own template: the bundled one where it is recognised, else one of which nothing is known."""
        return self._own_template[0]

    @property
    def own_template_error(self) -> ChatError | None:
        """Why the folder's own template cannot be read."""
        return self._own_template[1]

    @cached_property
    def stops(self) -> list[int] | None:
        """Ids that end `generate()`: of the generation config, else of config.json; None where there is neither."""
        if self.generation is not None:
            return listed(self.generation.get("eos_token_id"))
        return listed(self.text_config.get("eos_token_id", self.config.get("eos_token_id"))) if self.has_model else None

    @cached_property
    def own_source(self) -> str | None:
        """Text of the folder's own template as it stands, marks included."""
        if self.own_template is None:
            return None
        path = self.folder / "chat_template.jinja"
        if path.is_file():
            return path.read_bytes().decode("utf-8")
        value = self.tokenizer_config["chat_template"]
        if isinstance(value, list):
            value = {entry["name"]: entry["template"] for entry in value}
        return str(value["default"] if isinstance(value, dict) else value)

    @property
    def template(self) -> ChatTemplate | None:
        """The template that is judged: the chosen one, else the folder's own."""
        return self.chosen or self.own_template

    @cached_property
    def tensors(self) -> dict[str, TensorPlace]:
        """Every tensor of the model, {} in a folder without weights.

        Raises:
            CheckpointError: a shard is missing or truncated, or the weights are not safetensors.
        """
        if not self.has_model or not any(self.folder.glob("*.safetensors*")):
            return {}
        return {
            name: TensorPlace(
                name,
                file,
                str(entry["dtype"]),
                tuple(entry["shape"]),
                start + entry["data_offsets"][0],
                start + entry["data_offsets"][1],
            )
            for name, (file, start, entry) in model_headers(self.folder).items()
        }

    def embedding(self) -> TensorPlace | None:
        """The input embedding matrix [rows, width], or None where there are no weights, or none of a known name."""
        return self._named(EMBEDDINGS)

    def head(self) -> TensorPlace | None:
        """The output matrix [rows, width], or None where it is not in the files (tied, or no weights)."""
        return self._named(HEADS)

    @cached_property
    def rows(self) -> int | None:
        """Rows of the embedding matrix: from the weights, else what config.json says, else None."""
        place = self.embedding()
        if place is not None:
            return place.shape[0]
        said = self.text_config.get("vocab_size")
        return said if isinstance(said, int) else None

    @property
    def tied(self) -> bool:
        """Whether config.json ties the output matrix to the embedding (transformers' own default: yes)."""
        said = self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings"))
        return bool(said) if said is not None else self.head() is None

    def _named(self, endings: tuple[str, ...]) -> TensorPlace | None:
        """The largest matrix of one of these names: vision and audio towers have smaller ones."""
        found = [
            place
            for name, place in self.tensors.items()
            if len(place.shape) == 2 and any(name == ending or name.endswith(f".{ending}") for ending in endings)
        ]
        return max(found, key=lambda place: place.shape[0], default=None)

    def _json(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        return read_json(path) if path.is_file() else None


def find_checkpoint(reference: str) -> Path:
    """Returns the folder of a path or hub id; of a repository that is not in the cache, all but its weights is fetched.

    Raises:
        UserError: neither a folder nor a hub id, or a repository that cannot be had.
    """
    if Path(reference).expanduser().is_dir():
        return Path(reference).expanduser()
    found = parse_reference(reference)
    if isinstance(found, LocalPath):
        raise CheckpointError(reference, "no such folder", "check the path")
    if isinstance(found, StageRef):
        raise UserError(reference, "is a stage of a recipe", "give its folder: runs/RECIPE/STAGE")
    folder = fetch_description(found)
    if folder is None:
        resolve(found)  # says what is wrong with the id
        raise UserError(reference, "has no config.json that can be fetched", "download it, and give its folder")
    return folder


def open_checkpoint(folder: Path, template: str | None = None, base_dir: Path = Path()) -> Checkpoint:
    """Opens a model or tokenizer folder for the doctor.

    Args:
        template: bundled name or file of a template to judge instead of the folder's own.
        base_dir: what a relative file of a template is relative to.

    Raises:
        UserError: no such folder, no tokenizer and no config in it, or no such template.
    """
    if not folder.is_dir():
        raise CheckpointError(str(folder), "no such folder", "check the path")
    if not any((folder / name).is_file() for name in (*_TOKENIZER_FILES, "config.json", "tokenizer_config.json")):
        adapter = (folder / "adapter_config.json").is_file()
        found = "an adapter without a tokenizer" if adapter else "neither config.json nor tokenizer files"
        raise UserError(str(folder), found, "give the folder of a model or tokenizer")
    chosen = None if template is None else load_template(template, base_dir)
    return Checkpoint(folder, chosen)


def read_rows(place: TensorPlace, ids: Sequence[int]) -> np.ndarray:
    """Reads single rows of a matrix in a safetensors file, and nothing else of it.

    Args:
        place: a `readable` matrix.
        ids: row numbers.

    Returns:
        float32 [len(ids), width].
    """
    width = place.shape[1]
    size = width * np.dtype(_DTYPES[place.dtype]).itemsize
    chosen = np.empty((len(ids), width), _DTYPES[place.dtype])
    with place.file.open("rb", buffering=0) as file:
        for index, row in enumerate(ids):
            chosen[index] = np.frombuffer(os.pread(file.fileno(), size, place.begin + row * size), chosen.dtype)
    if place.dtype == "BF16":
        return (chosen.astype("<u4") << 16).view("<f4")
    return chosen.astype(np.float32)


def listed(ids: Any) -> list[int]:
    """Spells an id of a configuration file (absent, one, or several) as a list."""
    if isinstance(ids, list):
        return [token for token in ids if isinstance(token, int)]
    return [ids] if isinstance(ids, int) else []
