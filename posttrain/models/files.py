"""Proves that the files of a model or adapter folder are whole, without loading a weight. No torch here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "U8": 1, "I8": 1, "BOOL": 1}
_INDEX = "model.safetensors.index.json"
_AGAIN = "the folder is incomplete: copy, download or train it again"


def tensor_header(path: Path) -> dict[str, Any]:
    """Reads the header of a safetensors file: name -> {"dtype", "shape", "data_offsets"}.

    Raises:
        CheckpointError: no such file, no header, or fewer bytes than the header promises.
    """
    if not path.is_file():
        raise CheckpointError(str(path), "is missing", _AGAIN)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise CheckpointError(str(path), f"holds {size} bytes, less than its header", _AGAIN)
        try:
            header = json.loads(file.read(length))
        except (ValueError, UnicodeDecodeError):
            raise CheckpointError(str(path), "is not a safetensors file (no readable header)", _AGAIN) from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != 8 + length + end:
        raise CheckpointError(str(path), f"holds {size} bytes where its header promises {8 + length + end}", _AGAIN)
    for name, entry in header.items():
        wanted = math.prod(entry["shape"]) * _BYTES.get(entry["dtype"], 0)
        if wanted and wanted != entry["data_offsets"][1] - entry["data_offsets"][0]:
            raise CheckpointError(str(path), f"{name} does not have the bytes of its shape {entry['shape']}", _AGAIN)
    return header


def model_tensors(folder: Path) -> dict[str, list[int]]:
    """Returns name -> shape over all shards of a model folder.

    Raises:
        CheckpointError: no weights, a missing or truncated shard, a tensor that its shard does not hold.
    """
    index = folder / _INDEX
    if not index.exists():
        return {name: entry["shape"] for name, entry in tensor_header(folder / "model.safetensors").items()}
    weight_map: dict[str, str] = read_json(index).get("weight_map", {})
    headers = {name: tensor_header(folder / name) for name in sorted(set(weight_map.values()))}
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard]:
            raise CheckpointError(str(folder / shard), f"does not hold {tensor}, which the index promises", _AGAIN)
    return {tensor: headers[shard][tensor]["shape"] for tensor, shard in weight_map.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a checkpoint folder; CheckpointError where that cannot be."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(str(path), "is missing", _AGAIN) from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(str(path), f"is not JSON ({error})", _AGAIN) from None
    if not isinstance(value, dict):
        raise CheckpointError(str(path), f"holds a {type(value).__name__}, not an object", _AGAIN)
    return value


def verify_model_files(folder: Path) -> None:
    """Checks config, shards and tokenizer of a standalone model folder.

    Raises:
        CheckpointError: naming the file.
    """
    if not folder.is_dir():
        raise CheckpointError(str(folder), "no such folder", "check the path")
    config = read_json(folder / "config.json")
    if "model_type" not in config:
        raise CheckpointError(str(folder / "config.json"), "has no model_type", "give a transformers checkpoint")
    shapes = model_tensors(folder)
    for name, shape in shapes.items():
        if math.prod(shape) == 0:
            raise CheckpointError(str(folder), f"{name} is empty ({shape})", _AGAIN)
    verify_tokenizer_files(folder)


def verify_tokenizer_files(folder: Path) -> None:
    """Checks that a tokenizer lies in the folder and that its JSON can be read."""
    if (folder / "tokenizer.json").exists():
        read_json(folder / "tokenizer.json")
        return
    spm = [name for name in ("tokenizer.model", "spiece.model", "vocab.json") if (folder / name).exists()]
    if not spm:
        raise CheckpointError(str(folder / "tokenizer.json"), "is missing", "copy the model's tokenizer files into it")


def verify_adapter_files(folder: Path) -> None:
    """Checks config and weights of an adapter folder: readable, not empty."""
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        found = f"peft_type {config.get('peft_type')!r}"
        raise CheckpointError(
            str(folder / "adapter_config.json"), found, "only LoRA adapters can be continued or merged"
        )
    if not tensor_header(folder / "adapter_model.safetensors"):
        raise CheckpointError(str(folder / "adapter_model.safetensors"), "holds no tensor", _AGAIN)


def verify_adapter_fits(adapter: Path, base: Path) -> None:
    """Checks that every LoRA factor has the shape its base tensor asks for.

    Raises:
        CheckpointError: the adapter was made for another base; names the first module that differs.
    """
    shapes = model_tensors(base)
    for name, entry in tensor_header(adapter / "adapter_model.safetensors").items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        weight = shapes.get(f"{module}.weight")
        if weight is None:
            raise CheckpointError(str(adapter), f"changes {module}, which {base} does not have", "give its own base")
        axis = 1 if part == "A.weight" else 0
        if len(weight) == 2 and entry["shape"][axis] != weight[axis]:
            found = f"{name} is {entry['shape']}, the base's weight {weight}"
            raise CheckpointError(str(adapter), f"was made for another base: {found}", f"give the base of {adapter}")
