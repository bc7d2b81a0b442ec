"""What one process of `test_sharded.py` does: trains, saves and resumes tiny models cut by raw `fully_shard`.

Started by `torch.distributed.run` with a folder; also imported, for the same training on one process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.models.load import Adapter, add_adapter, load_base
from posttrain.models.save import save_adapter, save_full, verify_saved_adapter, verify_saved_model
from posttrain.pretraining.checkpoint import load_trainable, save_trainable
from posttrain.pretraining.optimizer_state import load_optimizer, save_optimizer
from tests.training.spine_tiny import make_model, make_tokenizer

STEPS, SHARD = 3, 20_000
EXPERTS = {
    "model_type": "olmoe",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "eos_token_id": 257,
    "pad_token_id": 0,
}


def make_experts() -> Any:
    torch.manual_seed(4)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**EXPERTS), dtype=torch.float32)


def make_adapted(folder: Path, dora: bool) -> Any:
    """An adapter of odd rank: LoRA with trained token rows on tied weights, or DoRA with a whole trained head."""
    torch.manual_seed(5)
    settings = Adapter(
        r=3,
        lora_alpha=6,
        lora_dropout=0.0,
        target_modules=["q_proj", "v_proj", "down_proj"],
        use_dora=dora,
        modules_to_save=["lm_head"] if dora else None,
    )
    base = load_base(folder / ("base-untied" if dora else "base"), torch.float32, "cpu", "sdpa")
    return add_adapter(base.requires_grad_(False), settings, [] if dora else [7, 256, 257])


def make_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW in two groups, as the Trainer makes them."""
    trained = [param for param in model.parameters() if param.requires_grad]
    flat = [param for param in trained if param.ndim < 2]
    wide = [param for param in trained if param.ndim >= 2]
    groups = [{"params": wide, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2)


def shard(model: torch.nn.Module) -> torch.nn.Module:
    """Cuts every decoder layer, and then what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = next(module for name, module in model.named_modules() if name.endswith("layers"))
    for layer in layers:  # type: ignore[union-attr]  # a ModuleList
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: Any, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step on two rows: a row each on two processes, both on one."""
    torch.manual_seed(100 + number)
    rows = torch.randint(0, 256, (2, 12))
    own = rows[dist.get_rank()][None] if dist.is_initialized() else rows
    model.train()
    model(input_ids=own, labels=own).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def save_checkpoint(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_trainable(model, folder)
    save_optimizer(model, optimizer, folder)


def go_on(model: Any, source: Path, out: Path) -> None:
    """One more step from a checkpoint."""
    optimizer = make_optimizer(model)
    load_trainable(model, source)
    load_optimizer(model, optimizer, source)
    step(model, optimizer, STEPS)
    save_checkpoint(model, optimizer, out)


def look(model: Any) -> None:
    """An eval forward: after it FSDP2 leaves the root's parameters whole."""
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])


def train(model: Any, folder: Path, name: str, save: Callable[[Any, Path], None]) -> None:
    """Trains, looks, saves, writes a checkpoint, and takes one more step."""
    optimizer = make_optimizer(model)
    for number in range(STEPS):
        step(model, optimizer, number)
    look(model)
    save(model, folder / name)
    save_checkpoint(model, optimizer, folder / f"{name}-{STEPS}")
    step(model, optimizer, STEPS)
    save_checkpoint(model, optimizer, folder / f"{name}-{STEPS + 1}")


def save_whole(model: Any, folder: Path) -> None:
    digests = save_full(model, folder, torch.float32, SHARD)
    if is_first():
        make_tokenizer().save_pretrained(folder)
        verify_saved_model(model, folder, digests)
        (folder.parent / f"{folder.name}.digests").write_text(json.dumps(digests))
    else:
        assert digests == {}


def save_part(model: Any, folder: Path) -> None:
    digests = save_adapter(model, folder)
    if is_first():
        assert digests
        verify_saved_adapter(folder, digests)
    else:
        assert digests == {}


def is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def make_full(tie: bool) -> Any:
    return make_model(seed=1, tie=tie, vocab_size=264)


CASES: dict[str, tuple[Callable[[Path], Any], Callable[[Any, Path], None]]] = {
    "tied": (lambda _: make_full(True), save_whole),
    "untied": (lambda _: make_full(False), save_whole),
    "lora": (lambda folder: make_adapted(folder, dora=False), save_part),
    "dora": (lambda folder: make_adapted(folder, dora=True), save_part),
}


def main(folder: Path) -> None:
    """All cases on this process, and what each resumes from: its own checkpoint, and one of a single process."""
    dist.init_process_group("gloo")
    for name, (make, save) in CASES.items():
        train(shard(make(folder)), folder / "two", name, save)
        go_on(shard(make(folder)), folder / "two" / f"{name}-{STEPS}", folder / "two" / f"{name}-again")
        go_on(shard(make(folder)), folder / "one" / f"{name}-{STEPS}", folder / "two" / f"{name}-from-one")
    model = shard(make_experts())
    look(model)
    save_full(model, folder / "two" / "experts", torch.bfloat16, SHARD)
    sizes = {name: param.to_local().numel() for name, param in model.named_parameters()}
    save_file({name: torch.tensor(size) for name, size in sizes.items()}, folder / f"sizes-{dist.get_rank()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
