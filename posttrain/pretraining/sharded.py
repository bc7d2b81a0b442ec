"""FSDP2: a model cut over processes before anything runs it, with the settings of the Accelerate config.

The Trainer would let Accelerate cut it at the first step, after our proofs; until then every GPU would hold
the whole of it. Accelerate takes a model that is cut already as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

_TIMEOUT = timedelta(minutes=30)
"""Of collectives; what the Trainer would set."""


def shard(model: torch.nn.Module, device: str) -> None:
    """Cuts a model in place, one group of parameters for each layer and one for the rest; all processes call it.

    Parameters are gathered in their own dtype: autocast computes what one process would, at twice the traffic of
    a gather in 16 bits.

    Args:
        model: on the CPU; its parts come to lie on the device, or stay where the config offloads them.
        device: `cpu` or `cuda`.
    """
    PartialState(cpu=device == "cpu", timeout=_TIMEOUT)  # makes the process group
    plugin = FullyShardedDataParallelPlugin()  # reads what the launcher set
    plugin.set_auto_wrap_policy(model)
    is_layer = fsdp2_prepare_auto_wrap_policy(plugin, model) or _never
    away = device != "cpu" and isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    offload = plugin.cpu_offload if away else OffloadPolicy()
    for module in [module for module in model.modules() if is_layer(module)]:
        fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, offload_policy=offload)
    fully_shard(model, offload_policy=offload)
    # Autocast would keep a 16-bit copy of every layer through the forward, on every process.
    torch.set_autocast_cache_enabled(False)


def _never(_: torch.nn.Module) -> bool:
    return False


@contextlib.contextmanager
def cpu_counts_as_gpu(wanted: bool) -> Iterator[None]:
    """Lets Accelerate apply an FSDP config on CPUs too, where it would train whole copies without a word.

    It switches from its kinds for accelerators alone; gloo does what FSDP2 needs.
    """
    state = PartialState._shared_state
    if not wanted or state.get("distributed_type") != DistributedType.MULTI_CPU:
        yield
        return
    state["distributed_type"] = DistributedType.MULTI_GPU
    try:
        yield
    finally:
        if state.get("distributed_type") == DistributedType.MULTI_GPU:
            state["distributed_type"] = DistributedType.MULTI_CPU


def accept_as_cut(accelerator: Any) -> None:
    """Has an Accelerator of FSDP2 take a model that `shard` cut, and leave its optimizer's parameters alone.

    Accelerate would look for layers by the names of their classes, which FSDP2 has changed, and find the optimizer's
    parameters again by the addresses of the old ones, which are the same for all empty parts.
    """
    accelerator.state.fsdp_plugin.auto_wrap_policy = None
    prepare = accelerator.prepare

    def keeping(*objects: Any, **more: Any) -> Any:
        held = [[list(group["params"]) for group in each.param_groups] for each in objects if _is_optimizer(each)]
        done = prepare(*objects, **more)
        found = [each for each in (done if len(objects) > 1 else [done]) if _is_optimizer(each)]
        for optimizer, groups in zip(found, held, strict=True):
            for group, params in zip(optimizer.param_groups, groups, strict=True):
                group["params"] = params
        return done

    accelerator.prepare = keeping


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, torch.optim.Optimizer)
