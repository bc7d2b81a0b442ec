"""Models that never lie in memory whole: their decoder layers are filled from the files one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from posttrain.certify.logits import Logits
from posttrain.errors import CheckpointError, StageError
from posttrain.merging.checkpoint import Checkpoint, open_checkpoint
from posttrain.merging.tensors import read_tensor
from posttrain.models.lineage import Lineage, Quantization
from posttrain.models.load import put_adapters

_BATCH_TOKENS = 8192
"""Tokens, padding counted, that pass a layer at once; more rows than that read the files again."""
_WRAPPERS = re.compile(r"^base_model\.model\.|\.(?:base_layer|original_module|token_adapter)(?=\.)")
"""What peft puts into the names of a base's own parameters."""

Read = Callable[[str], torch.Tensor]
"""Name of a parameter in the base's files -> its values as the model computes with them."""


def layered_policy(
    lineage: Lineage, rows: list[list[int]], dtype: torch.dtype, device: str, attn_implementation: str
) -> Logits:
    """The logits of a base with its adapters in use, as `load_policy` would give them, one layer in memory.

    The adapters are peft's own, live. A 4-bit base is put on its grid by bitsandbytes, layer by layer, and
    computes with the numbers that its 4-bit layers would dequantise.
    """
    base = open_checkpoint(lineage.base.folder)
    model = _skeleton(lineage.base.folder, dtype, attn_implementation)
    gridded = _quantised_weights(model) if lineage.quantization else set()

    def read(name: str) -> torch.Tensor:
        values = read_tensor(base.tensors[name]).to(dtype).to(device)
        return _on_grid(values, lineage.quantization) if lineage.quantization and name in gridded else values

    return _layered(model, base, read, rows, device, lineage)


def layered_merged(
    folder: Path, rows: list[list[int]], dtype: torch.dtype, device: str, attn_implementation: str
) -> Logits:
    """The logits of a standalone model folder, one layer in memory."""
    files = open_checkpoint(folder)
    model = _skeleton(folder, dtype, attn_implementation)
    return _layered(model, files, lambda name: read_tensor(files.tensors[name]).to(dtype).to(device), rows, device)


def _skeleton(folder: Path, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """The architecture of a folder: buffers (rotary frequencies, say) real, parameters empty."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config._attn_implementation = attn_implementation
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
        )
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            module.register_parameter(leaf, _empty(parameter))
    return model.eval()


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    """One zero in the shape of a parameter: unlike a meta tensor it has a device, which peft moves adapters to."""
    return _frozen(torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape))


def _is_empty(parameter: nn.Parameter) -> bool:
    return parameter.untyped_storage().nbytes() < parameter.nbytes


def _quantised_weights(model: PreTrainedModel) -> set[str]:
    """Names of the weights that transformers would load in 4 bits, by the types of their layers."""
    skipped = get_keys_to_not_convert(model)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skipped)
    }


def _on_grid(weight: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """Through bitsandbytes itself, not through the merge's own arithmetic, which is to be proved."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(),
        blocksize=quantization.blocksize,
        compress_statistics=quantization.double_quant,
        quant_type=quantization.quant_type,
    )
    return dequantize_4bit(packed, state).view(weight.shape)


def _layered(
    model: PreTrainedModel,
    files: Checkpoint,
    read: Read,
    rows: list[list[int]],
    device: str,
    lineage: Lineage | None = None,
) -> Logits:
    """Runs all rows through the layers and keeps their last hidden states; logits are made of them row by row.

    Embedding, last norm and head stay in memory. Adapters of a lineage are put on after these are filled,
    since an adapter's file may hold its own copy of an embedding.
    """
    layers = max(
        (module for module in model.modules() if isinstance(module, nn.ModuleList)),
        key=lambda module: sum(parameter.numel() for parameter in module.parameters()),
    )
    of_layers = {id(module) for module in layers.modules()}
    names, shared = _names_in_files(model, model, files), dict[str, nn.Parameter]()
    for module in model.modules():
        if id(module) not in of_layers:
            _fill(module, names, lambda name: _once(name, shared, read))
    whole = put_adapters(model, lineage) if lineage else model
    _place(whole, device)
    names = _names_in_files(model, whole, files)
    for layer in layers:
        _stream(layer, names, lambda name: _frozen(read(name)))
    decoder: Any = model.base_model
    hidden: dict[tuple[int, ...], torch.Tensor] = {}
    for batch in _batches(rows):
        longest = max(map(len, batch))
        # Padding stands on the right: under a causal mask no token of a row sees it.
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch], device=device)
        with torch.no_grad():
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state
        hidden |= {tuple(row): states[number, : len(row)].clone() for number, row in enumerate(batch)}

    def logits(ids: list[int]) -> torch.Tensor:
        states = hidden[tuple(ids)]
        # The model's own head, with all that its architecture does after it (scaling, capping).
        decoder.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=states[None])
        try:
            with torch.no_grad():
                return model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
        finally:
            del decoder.forward  # the class's own again

    return logits


def _once(name: str, shared: dict[str, nn.Parameter], read: Read) -> nn.Parameter:
    """A tied embedding is one parameter, here too."""
    if name not in shared:
        shared[name] = _frozen(read(name))
    return shared[name]


def _batches(rows: list[list[int]]) -> list[list[list[int]]]:
    """Rows of like length together, at most `_BATCH_TOKENS` a batch."""
    batches: list[list[list[int]]] = []
    for row in sorted(rows, key=len, reverse=True):
        if not batches or (len(batches[-1]) + 1) * len(batches[-1][0]) > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches


def _names_in_files(model: PreTrainedModel, whole: nn.Module, files: Checkpoint) -> dict[int, dict[str, str]]:
    """id of a module -> its parameters that are still to be filled -> their names in the files.

    Raises:
        CheckpointError: the files do not have a parameter under its own name.
        StageError: a part of an adapter was not loaded.
    """
    ties = {str(tied): str(source) for tied, source in model.all_tied_weights_keys.items()}
    found: dict[int, dict[str, str]] = {}
    for path, module in whole.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not _is_empty(parameter):
                continue
            name = _WRAPPERS.sub("", f"{path}.{leaf}")
            if ".lora_" in name or ".modules_to_save." in name or "trainable_tokens" in name:
                raise StageError("certificate", f"{path}.{leaf} was not loaded", "report this")
            stored = name if name in files.tensors else ties.get(name, name)
            if stored not in files.tensors:
                raise CheckpointError(
                    str(files.folder),
                    f"has no {stored}: its architecture is stored under other names than it has in memory",
                    "set certificate.mode: whole",
                )
            found.setdefault(id(module), {})[leaf] = stored
    return found


def _place(whole: nn.Module, device: str) -> None:
    """Moves what is loaded already, adapters and buffers, to the device."""
    for module in whole.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not _is_empty(parameter):
                module.register_parameter(leaf, _frozen(parameter.data.to(device)))
        for leaf, buffer in module.named_buffers(recurse=False):
            module._buffers[leaf] = buffer.to(device)


def _frozen(values: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _fill(module: nn.Module, names: dict[int, dict[str, str]], make: Callable[[str], nn.Parameter]) -> None:
    for leaf, name in names.get(id(module), {}).items():
        module.register_parameter(leaf, make(name))


def _stream(layer: nn.Module, names: dict[int, dict[str, str]], make: Callable[[str], nn.Parameter]) -> None:
    """Fills a layer's parameters just before it computes, and lets go of them after it."""
    empty = {id(module): dict(module.named_parameters(recurse=False)) for module in layer.modules()}

    def before(*_: Any) -> None:
        for module in layer.modules():
            _fill(module, names, make)

    def after(*_: Any) -> None:
        for module in layer.modules():
            for leaf in names.get(id(module), {}):
                module.register_parameter(leaf, empty[id(module)][leaf])

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)
