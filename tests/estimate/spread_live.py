"""What is alive in a step of rank 0 of eight, on a CPU: `python spread_live.py`; prints one JSON line for each case.

The process group is torch's fake one: no other rank exists, and memory is that of a real one.
"""

from __future__ import annotations

import json
import runpy
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORLD = 8
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "head_dim": 64, "vocab_size": 4096, "num_key_value_heads": 8}
CASES = [("full", False, 32), ("full", True, 512), ("lora", True, 32)]


class Live(TorchDispatchMode):
    """Follows the bytes of live storages, which FSDP2 empties and fills again; those that stay are left out."""

    def __init__(self, stays: list[torch.Tensor]) -> None:
        super().__init__()
        self.stays = {tensor.untyped_storage()._cdata for tensor in stays}
        self.held: dict[int, Any] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.held and storage._cdata not in self.stays:
                    self.held[storage._cdata] = weakref.ref(storage)
                    weakref.finalize(storage, self.held.pop, storage._cdata, None)
        alive = [made() for made in list(self.held.values())]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in alive if storage is not None))
        return made


def measured(script: dict[str, Any], config: dict[str, Any], method: str, again: bool, tokens: int) -> dict[str, int]:
    """Bytes of one rank: of its parts, and at the peak of a step beyond them."""
    torch.manual_seed(0)
    model = script["build"](config, method, "cpu")
    mesh = init_device_mesh("cpu", (WORLD,))
    for module in [one for one in model.modules() if type(one).__name__ == "LlamaDecoderLayer"]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.set_autocast_cache_enabled(False)  # as `posttrain.pretraining.sharded.shard` does
    model, optimizer = script["prepared"](model, "cpu")
    if again:
        script["recompute"](model)
    ids = torch.randint(0, config["vocab_size"], (1, tokens))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False)
        out.loss.backward()

    step()
    optimizer.step()
    weights = [param.to_local() for param in model.parameters()]
    grads = [param.grad.to_local() for param in model.parameters() if param.grad is not None]
    states = [one for state in optimizer.state.values() for one in state.values()]
    with Live([*weights, *grads]) as live:
        step()
    local = [one.to_local() if hasattr(one, "to_local") else one for one in states]
    found = {"gradients": grads, "optimizer": local, "weights": weights}
    return {name: sum(one.numel() * one.itemsize for one in many) for name, many in found.items()} | {"peak": live.peak}


if __name__ == "__main__":
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    told = runpy.run_path(str(Path(__file__).resolve().parents[2] / "scripts" / "gpu" / "measure_memory.py"))
    shape = told["config_of"]("1b", True) | SIZES | {"tie_word_embeddings": False}
    for case in CASES:
        print(json.dumps({"config": shape, "case": case, **measured(told, shape, *case)}))
