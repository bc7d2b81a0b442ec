"""A chain of two adapters that really learned something, on the genuine weights of stories260K."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from merging import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy, logsigmoid

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_LENGTH = 32


@dataclass(frozen=True)
class Chain:
    """An SFT adapter and a DPO adapter above it."""

    base: Path
    adapters: list[Path]
    in_use: PeftModel
    """Base and both adapters, as they were trained."""
    losses: tuple[float, float]
    """SFT loss before and after."""
    margins: tuple[float, float]
    """DPO reward margin (beta 0.1) before and after."""
    rows: list[list[int]]
    """Token ids that no adapter was trained on."""


def train_chain(shared: Path, folder: Path) -> Chain:
    """Trains in about a second: SFT on stories told backwards, DPO to prefer those to the usual direction."""
    base = shared / "data" / "stories260k"
    ids = json.loads((base / "greedy_ids_from_bos.json").read_text())
    rows = torch.tensor([ids[start : start + _LENGTH] for start in range(0, len(ids) - _LENGTH, _LENGTH // 2)])
    learned, held_out = rows[:12], rows[-3:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small only wait for one another in several
    torch.manual_seed(0)
    tuned = get_peft_model(tiny.load_base(base), LoraConfig(r=8, lora_alpha=16, target_modules=LINEAR), "sft")
    losses = _sft(tuned, learned.flip(1))
    tuned.add_adapter("dpo", LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    tuned.base_model.set_adapter(["sft", "dpo"])
    for name, parameter in tuned.named_parameters():
        parameter.requires_grad = ".dpo." in name
    margins = _dpo(tuned, learned.flip(1), learned)
    torch.set_num_threads(threads)
    tuned.eval().save_pretrained(folder, selected_adapters=["sft", "dpo"])
    return Chain(base, [folder / "sft", folder / "dpo"], tuned, losses, margins, held_out.tolist())


def _sft(model: PeftModel, rows: torch.Tensor, steps: int = 10) -> tuple[float, float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(steps):
        loss = cross_entropy(model(input_ids=rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def _dpo(model: PeftModel, chosen: torch.Tensor, rejected: torch.Tensor, steps: int = 10) -> tuple[float, float]:
    """The sigmoid loss of arXiv 2305.18290; before its first step the policy is its own reference."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    reference, margins = None, []
    for _ in range(steps):
        difference = _log_probability(model, chosen) - _log_probability(model, rejected)
        reference = difference.detach() if reference is None else reference
        margin = 0.1 * (difference - reference)
        optimizer.zero_grad()
        (-logsigmoid(margin).mean()).backward()
        optimizer.step()
        margins.append(margin.mean().item())
    return margins[0], margins[-1]


def _log_probability(model: PeftModel, rows: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=rows).logits[:, :-1].log_softmax(-1)
    return logits.gather(-1, rows[:, 1:, None]).sum((1, 2))
