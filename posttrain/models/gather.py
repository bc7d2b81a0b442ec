"""Tensors of a model that may be cut over processes: made whole one at a time, written by the first process alone.

A parameter is a DTensor (FSDP2's `fully_shard`), one of DeepSpeed's ZeRO-3, or whole on every process. What
gathers is a collective: every process calls it, for the same tensors in the same order.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from posttrain.merging.tensors import CODES, as_bytes
from posttrain.merging.writer import FileWriter, Slot, shard_header


def is_first() -> bool:
    """Whether this is the process that writes: the first of its group, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """Shape of a tensor over all processes."""
    return tuple(tensor.ds_shape if _in_zero3(tensor) else tensor.shape)  # type: ignore[attr-defined]


def slot_of(name: str, tensor: torch.Tensor) -> Slot:
    """A tensor's place in a file."""
    return Slot(name, CODES[tensor.dtype], whole_shape(tensor))


def put_apart(model: torch.nn.Module) -> None:
    """Makes FSDP2 parameters the parts that the optimizer moves: an eval forward may have left them whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """The whole of a tensor on the CPU of the first process; None on the others.

    Args:
        dtype: the result's, where the tensor is of floats; parts are cast before they travel.
    """
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if _in_zero3(tensor):
        return _gather_zero3(tensor, wanted)
    whole = tensor.detach()
    if isinstance(whole, DTensor):
        part = whole.to(wanted)
        device = part.device_mesh.device_type
        if part.device.type != device:  # offloaded: the processes talk over their devices
            part = part.to(device)
        whole = part.full_tensor()
    return whole.to(device="cpu", dtype=wanted) if is_first() else None


def cut_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, cut and placed as `like` is; nothing is sent."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    part = distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)
    return part.to(like.device)


def write_gathered(path: Path, slots: list[Slot], tensors: Iterable[torch.Tensor | None]) -> dict[str, int]:
    """Writes a safetensors file of tensors as they come, holding none of them after it is written.

    Args:
        tensors: those of the slots, in their order, as `gather` gives them.

    Returns:
        name -> `digest`, on the first process.

    Raises:
        CheckpointError: the disk is full, or does not take what is written; nothing is left of the file.
    """
    if not is_first():
        for _ in tensors:
            pass
        return {}
    digests = {}
    with FileWriter(path) as writer:
        writer.write(shard_header(slots))
        for slot, tensor in zip(slots, tensors, strict=True):
            assert tensor is not None
            assert (CODES[tensor.dtype], tuple(tensor.shape)) == (slot.dtype, slot.shape), slot
            writer.write_tensor(tensor)
            digests[slot.name] = digest(tensor)
    return digests


def digest(tensor: torch.Tensor) -> int:
    """CRC-32 of a CPU tensor's elements."""
    return zlib.crc32(as_bytes(tensor))


def _in_zero3(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "ds_id")  # what DeepSpeed marks its parameters with


def _gather_zero3(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    from deepspeed.zero import GatheredParameters

    with GatheredParameters([tensor]):
        return tensor.detach().to(device="cpu", dtype=dtype, copy=True) if is_first() else None
