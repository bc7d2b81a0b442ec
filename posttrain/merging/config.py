"""What stands beside the weights: config, generation config, tokenizer files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError
from posttrain.merging.checkpoint import Checkpoint
from posttrain.merging.writer import write_file

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Files of a model folder that are neither weights nor config; `additional_chat_templates/` comes with them."""


def merged_config(base: dict[str, Any], dtype: str, tied: bool | None, vocabulary: int | None) -> dict[str, Any]:
    """The base's config as it holds for the merged weights.

    Args:
        dtype: of the merged weights, as transformers spells it.
        tied: whether embedding and output layer are one tensor; None leaves the config's word.
        vocabulary: rows of the embedding; None leaves the config's number.
    """
    config = copy.deepcopy(base)
    config.pop("quantization_config", None)
    parts = [config, *(config[key] for key in ("text_config",) if isinstance(config.get(key), dict))]
    config["dtype"] = dtype
    for part in parts:
        for key in ("dtype", "torch_dtype"):
            if key in part:
                part[key] = dtype
        if vocabulary is not None and "vocab_size" in part:
            part["vocab_size"] = vocabulary
        if tied is not None and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = tied
    if tied is not None:
        config["tie_word_embeddings"] = tied
    return config


def write_configs(
    folder: Path, base: Checkpoint, dtype: str, tied: bool | None, vocabulary: int | None
) -> dict[str, dict[str, Any]]:
    """Writes config.json, as `merged_config`, and the base's generation config where it has one.

    Returns:
        Name -> {"sha256", "bytes"} of the files written.
    """
    config = merged_config(base.config, dtype, tied, vocabulary)
    files = {"config.json": write_file(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")}
    generation = base.folder / "generation_config.json"
    if generation.is_file():
        files[generation.name] = write_file(folder / generation.name, _read(generation))
    return files


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copies tokenizer, templates and generation config where they exist; returns the names, sorted."""
    names = [name for name in SIDE_FILES if (source / name).is_file()]
    names += [
        f"additional_chat_templates/{path.name}" for path in (source / "additional_chat_templates").glob("*.jinja")
    ]
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        write_file(target / name, _read(source / name))  # contents only: modes follow the umask
    return sorted(names)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(str(file), f"cannot be read: {error.strerror}", "see that it may be read") from error
