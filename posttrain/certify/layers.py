"""Models that never lie in memory whole: their decoder layers are filled from the files one after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from posttrain.certify.logits import Logits
from posttrain.certify.weights import Unit, units
from posttrain.errors import CheckpointError, StageError
from posttrain.merging.checkpoint import Checkpoint, open_checkpoint
from posttrain.merging.experts import stored_tensors
from posttrain.merging.quantization import torch_dtype
from posttrain.merging.tensors import read_tensor
from posttrain.models.lineage import Lineage, Quantization
from posttrain.models.load import put_adapters

_BATCH_TOKENS = 8192
"""Tokens, padding counted, that pass a layer at once; more rows than that read the files again."""
_WRAPPERS = re.compile(r"^base_model\.model\.|\.(?:base_layer|original_module|token_adapter)(?=\.)")
"""What peft puts into the names of a base's own parameters."""

Read = Callable[[str], torch.Tensor]
"""Name of a parameter -> its values as the model computes with them, in fp32."""


@dataclass(frozen=True)
class Streamed:
    """A model of which embedding, last norm and head are in memory, and one decoder layer at a time."""

    model: PreTrainedModel
    """With the adapters of a lineage in it; all parameters of its decoder layers are empty."""
    layers: nn.ModuleList
    names: dict[int, dict[str, str]]
    """id of a module -> its parameters that are still to be filled -> their names."""
    read: Read
    device: str


def stream_policy(lineage: Lineage, device: str, attn_implementation: str) -> Streamed:
    """A base with its adapters in use, as `load_exact` would give it.

    The adapters are peft's own, live. A 4-bit base is put on its grid by bitsandbytes, layer by layer, and not by
    the merge's own arithmetic, which is to be proved.
    """
    base, quantization = open_checkpoint(lineage.base.folder), lineage.quantization
    model = _skeleton(lineage.base.folder, attn_implementation)
    gridded = _quantised_weights(model) if quantization else set()

    def read(name: str) -> torch.Tensor:
        values = read_parameter(base, name).to(device)
        if quantization is None:
            return values.float()
        values = values.to(torch_dtype(quantization.source_dtype))
        return (_on_grid(values, quantization) if name in gridded else values).float()

    return _open(model, base, read, device, lineage)


def stream_merged(folder: Path, device: str, attn_implementation: str) -> Streamed:
    """A standalone model folder."""
    files = open_checkpoint(folder)
    model = _skeleton(folder, attn_implementation)
    return _open(model, files, lambda name: read_parameter(files, name).to(device).float(), device)


def read_parameter(files: Checkpoint, name: str) -> torch.Tensor:
    """A parameter of the runtime: one tensor of the files, or those of all experts of a layer, stacked."""
    experts = stored_tensors(name, files)
    if len(experts) == 1 == len(experts[0]):
        return read_tensor(experts[0][0])
    return torch.stack([torch.cat([read_tensor(part) for part in parts]) for parts in experts])


def streamed_units(in_use: Streamed, merged: Streamed) -> Iterator[Unit]:
    """The units of two streamed models, each layer filled while it is looked at."""
    yield from units(in_use.model, merged.model, without=frozenset({id(in_use.layers)}))
    place = next(path for path, module in in_use.model.named_modules() if module is in_use.layers)
    for number, pair in enumerate(zip(in_use.layers, merged.layers, strict=True)):
        for layer, of in zip(pair, (in_use, merged), strict=True):
            for module in layer.modules():
                _fill(module, of.names, lambda name, of=of: _frozen(of.read(name)))  # type: ignore[misc]
        yield from units(*pair, path=f"{place}.{number}")
        for layer, of in zip(pair, (in_use, merged), strict=True):
            for module in layer.modules():
                _empty_again(module, of.names)


def _skeleton(folder: Path, attn_implementation: str) -> PreTrainedModel:
    """The architecture of a folder, in fp32: buffers (rotary frequencies, say) real, parameters empty."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config._attn_implementation = attn_implementation
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attn_implementation, trust_remote_code=False
        )
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            module.register_parameter(leaf, _empty(parameter))
    return model.eval()


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    """One zero in the shape of a parameter: unlike a meta tensor it has a device, which peft moves adapters to."""
    return _frozen(torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape))


def _is_empty(parameter: nn.Parameter) -> bool:
    """Whether a parameter is still to be filled; of one number that cannot be told, so it is filled again."""
    return parameter.numel() == 1 or parameter.untyped_storage().nbytes() < parameter.nbytes


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


def _open(
    model: PreTrainedModel, files: Checkpoint, read: Read, device: str, lineage: Lineage | None = None
) -> Streamed:
    """Fills all but the decoder layers, then puts the adapters on, whose files may hold an embedding of their own."""
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
    return Streamed(model, layers, _names_in_files(model, whole, files), read, device)


def streamed_logits(streamed: Streamed, rows: list[list[int]]) -> Logits:
    """Runs all rows through the layers and keeps their last hidden states; logits are made of them row by row."""
    model, device = streamed.model, streamed.device
    hooks = [handle for layer in streamed.layers for handle in _stream(layer, streamed)]
    decoder: Any = model.base_model
    hidden: dict[tuple[int, ...], torch.Tensor] = {}
    for batch in _batches(rows):
        longest = max(map(len, batch))
        # Padding stands on the right: under a causal mask no token of a row sees it.
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch], device=device)
        with torch.no_grad():
            states = decoder(input_ids=ids, use_cache=False).last_hidden_state
        hidden |= {tuple(row): states[number, : len(row)].clone() for number, row in enumerate(batch)}
    for hook in hooks:
        hook.remove()

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
            stored = name if stored_tensors(name, files) else ties.get(name, name)
            if not stored_tensors(stored, files):
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


def _empty_again(module: nn.Module, names: dict[int, dict[str, str]]) -> None:
    for leaf in names.get(id(module), {}):
        module.register_parameter(leaf, _empty(module.get_parameter(leaf)))


def _stream(layer: nn.Module, streamed: Streamed) -> list[RemovableHandle]:
    """Fills a layer's parameters just before it computes, and lets go of them after it."""

    def before(*_: Any) -> None:
        for module in layer.modules():
            _fill(module, streamed.names, lambda name: _frozen(streamed.read(name)))

    def after(*_: Any) -> None:
        for module in layer.modules():
            _empty_again(module, streamed.names)

    return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
