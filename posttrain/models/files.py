"""Proves that the files of a model or adapter folder are whole, without loading a weight. No torch here."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError
from posttrain.merging.checkpoint import open_checkpoint
from posttrain.merging.experts import stored_tensors
from posttrain.merging.header import read_entries

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules")
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack")
_MODEL_SUFFIXES = {".json", ".safetensors", ".model", ".txt", ".jinja"}
_STACKED = re.compile(r"\.experts(\.base_layer)*$")
_OURS = ("stage.json", "job.json", "log.txt")
_AGAIN = "the folder is incomplete: copy, download or train it again"


def files_of_model(folder: Path) -> list[Path]:
    """The files at the top of a folder that make it a model, by name: config, tokenizer, weights, template."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.suffix in _MODEL_SUFFIXES and path.name not in _OURS
    ]


def tensor_header(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the header of a safetensors file: name -> {"dtype", "shape", "data_offsets"}; raises as `read_entries`."""
    return read_entries(path)[1]


def model_headers(folder: Path) -> dict[str, tuple[Path, int, dict[str, Any]]]:
    """Returns name -> (file, first byte of its data, header entry) over all shards of a model folder.

    Raises:
        CheckpointError: no weights, a missing or truncated shard, a tensor that its shard does not hold.
    """
    weights, index = folder / _WEIGHTS, folder / _INDEX
    if weights.exists() or not index.exists():  # as transformers: a single file goes before an index
        _refuse_other_formats(weights)
        start, header = read_entries(weights)
        return {name: (weights, start, entry) for name, entry in header.items()}
    weight_map = _weight_map(index)
    headers = {name: read_entries(folder / name) for name in sorted(set(weight_map.values()))}
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard][1]:
            raise CheckpointError(str(folder / shard), f"does not hold {tensor}, which the index promises", _AGAIN)
    return {name: (folder / shard, headers[shard][0], headers[shard][1][name]) for name, shard in weight_map.items()}


def model_tensors(folder: Path) -> dict[str, list[int]]:
    """Returns name -> shape over all shards of a model folder; raises as `model_headers`."""
    return {name: entry["shape"] for name, (_, _, entry) in model_headers(folder).items()}


def _refuse_other_formats(weights: Path) -> None:
    """Says so where weights lie in the folder, but not as safetensors."""
    found = sorted(path.name for pattern in _OTHER_FORMATS for path in weights.parent.glob(pattern))
    if found and not weights.exists():
        todo = "convert it with transformers: from_pretrained(...).save_pretrained(...) writes safetensors"
        raise CheckpointError(str(weights), f"is missing, there is only {found[0]}, which is never read", todo)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(index), "has no weight_map", _AGAIN)
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:  # an index must not point out of its folder
            raise CheckpointError(str(index), f"{name!r} is no file name", _AGAIN)
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a checkpoint folder; CheckpointError where that cannot be."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(str(path), "is missing", _AGAIN) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"is not JSON ({error})", _AGAIN) from None
    if not isinstance(value, dict):
        raise CheckpointError(str(path), f"holds a {type(value).__name__}, not an object", _AGAIN)
    return value


def verify_model_files(folder: Path) -> None:
    """Checks config, shards and tokenizer of a standalone model folder.

    Raises:
        CheckpointError: naming the file.
    """
    verify_weight_files(folder)
    verify_tokenizer_files(folder)


def verify_weight_files(folder: Path) -> None:
    """Checks config and shards of a model folder: what can be merged and loaded, if not talked to.

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
    config = read_json(folder / _ADAPTER)
    where = str(folder / _ADAPTER)
    if config.get("peft_type") != "LORA":
        found = f"peft_type {config.get('peft_type')!r}"
        raise CheckpointError(where, found, "only LoRA adapters can be continued or merged")
    if missing := [name for name in _SETTINGS if name not in config]:
        raise CheckpointError(where, f"lacks {', '.join(missing)}", _AGAIN)
    if not tensor_header(folder / _ADAPTER_WEIGHTS):
        raise CheckpointError(str(folder / _ADAPTER_WEIGHTS), "holds no tensor", _AGAIN)


def _renamed(name: str, base: Path) -> list[int] | None:
    """The shape of what a mixture of experts holds under another name in its files (Mixtral's router)."""
    found = stored_tensors(name, open_checkpoint(base))
    return list(found[0][0].shape) if found else None


def verify_adapter_fits(adapter: Path, base: Path) -> None:
    """Checks that every LoRA factor has the shape its base tensor asks for.

    Raises:
        CheckpointError: the adapter was made for another base; names the first module that differs.
    """
    shapes = model_tensors(base)
    transposed = bool(read_json(adapter / _ADAPTER).get("fan_in_fan_out"))  # Conv1D stores (in, out)
    file = adapter / _ADAPTER_WEIGHTS
    factors = tensor_header(file)
    for name, entry in factors.items():
        module, _, part = name.removeprefix("base_model.model.").rpartition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        if _STACKED.search(module):  # one parameter of all experts, which files hold apart: the merge fits them
            continue
        weight = shapes.get(f"{module}.weight") or _renamed(f"{module}.weight", base)
        if weight is None:
            raise CheckpointError(str(file), f"changes {module}, which {base} does not have", "give its own base")
        axis = 1 if part == "A.weight" else 0
        shape = entry["shape"]
        if len(weight) == len(shape) == 2 and shape[axis] != weight[1 - axis if transposed else axis]:
            found = f"{name} is {shape}, the base's weight {weight}"
            raise CheckpointError(str(file), f"was made for another base: {found}", f"give the base of {adapter}")
        other = name.replace(".lora_A.", ".lora_B.") if axis else name.replace(".lora_B.", ".lora_A.")
        if other not in factors:
            raise CheckpointError(str(file), f"holds {name} without {other}", _AGAIN)
