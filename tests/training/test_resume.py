"""Resume is the same run: interrupted and gone on with = never interrupted, to the byte, in every way of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.artifact import sha256
from posttrain.errors import Interrupted
from posttrain.models.lineage import Lineage, Link, Quantization
from posttrain.models.load import Adapter, add_adapter, continue_adapter, load_base, load_policy
from posttrain.models.save import save_adapter, save_full
from posttrain.pretraining.checkpoint import checkpoint_steps
from posttrain.pretraining.loop import Step
from posttrain.pretraining.metrics import read_metrics
from posttrain.training.dpo import build_dpo_trainer, dpo_step
from posttrain.training.limits import Limits
from posttrain.training.reference import reference_logps
from posttrain.training.sft import build_sft_trainer, sft_step
from tests.training.spine_tiny import (
    PAD,
    arguments,
    make_pairs,
    make_rows,
    make_tokenizer,
    save_base,
    train,
)

STEPS, STOP = 4, 2
NF4 = Quantization("nf4", True, "float32")
ADAPTER = Adapter(r=4, lora_alpha=8, lora_dropout=0.2, target_modules="all-linear")
LIMITS = Limits(tokens=90, documents=3, row_tokens=64)


@dataclass
class Way:
    """One way of training, built from files each time as a new process would."""

    base: Path
    """A full model."""
    parent: Path
    """An SFT adapter on it, with trained token rows, on 4 bits where the way is."""
    objective: str
    method: str
    asked: list[int] = field(default_factory=list)
    """Every step that the loop asked for, in order."""

    def lineage(self) -> Lineage:
        quantization = NF4 if self.method == "qlora" else None
        base = Link(self.base, "base", None)
        if self.objective == "sft":
            return Lineage(base, (), quantization)
        return Lineage(base, (Link(self.parent, "sft", None),), quantization)

    def model(self, seed: int) -> Any:
        """`seed` fixes a new adapter's first weights: a resumed one must not depend on it."""
        if self.method == "full":
            return load_base(self.base, torch.float32, "cpu", "sdpa").requires_grad_(True)
        if self.objective == "continue":
            return continue_adapter(self.lineage(), torch.float32, "cpu", "sdpa")
        model = load_policy(self.lineage(), torch.float32, "cpu", "sdpa")
        torch.manual_seed(seed)
        return add_adapter(model.requires_grad_(False), ADAPTER, [256, 257] if self.objective == "sft" else [])

    def run(self, folder: Path, seed: int, stop_at: int | None = None, evaluate: bool = False) -> Any:
        """Trains in `folder` from wherever it stands; returns the model."""
        folder.mkdir(exist_ok=True)
        model = self.model(seed)
        if evaluate:
            look(model)
        given = arguments(folder, STEPS, save_steps=3, warmup_steps=1, max_grad_norm=0.5, beta=0.3)
        trainer, make_step = self.sft(model, given) if self.objective == "sft" else self.dpo(model, given, folder)
        seen = 0

        def logged(step: int) -> Step:
            nonlocal seen
            seen = step + 1
            self.asked.append(step)
            return make_step(step)

        train(trainer, folder, STEPS, logged, should_stop=lambda: seen == stop_at)
        return model

    def sft(self, model: Any, given: dict[str, Any]) -> tuple[Any, Callable[[int], Step]]:
        given.pop("beta")
        rows = make_rows(5 * STEPS)
        trainer = build_sft_trainer(model, make_tokenizer(), given)
        return trainer, lambda step: sft_step(rows[5 * step : 5 * step + 5], PAD, 64, 90, 3)

    def dpo(self, model: Any, given: dict[str, Any], folder: Path) -> tuple[Any, Callable[[int], Step]]:
        pairs = make_pairs(5 * STEPS)
        trainer = build_dpo_trainer(model, make_tokenizer(), given, LIMITS.row_tokens)
        references = reference_logps(
            trainer, pairs, PAD, LIMITS, folder / "refs.npy", lambda *_, **__: None, lambda: False
        )

        def make_step(step: int) -> Step:
            part = slice(5 * step, 5 * step + 5)
            return dpo_step(pairs[part], references[part], PAD, LIMITS.tokens, LIMITS.documents, ["sigmoid"])

        return trainer, make_step

    def saved(self, model: Any, folder: Path) -> str:
        """Digest of the weights as the stage would leave them."""
        if self.method == "full":
            save_full(model, folder / "model", torch.float32)
            return sha256(folder / "model" / "model.safetensors")
        trained = {param.dtype for param in model.parameters() if param.requires_grad}
        assert trained == {torch.float32}
        save_adapter(model, folder / "model")
        return sha256(folder / "model" / "adapter_model.safetensors")


@torch.no_grad()
def look(model: Any) -> None:
    """An evaluation in the middle of things: a forward pass in eval mode."""
    model.eval()
    model(input_ids=torch.arange(20)[None])
    model.train()


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and for each method an SFT adapter on it whose weights have moved."""
    folder = tmp_path_factory.mktemp("parents")
    save_base(folder / "base")
    for method, quantization in (("lora", None), ("qlora", NF4)):
        lineage = Lineage(Link(folder / "base", "base", None), (), quantization)
        model = load_policy(lineage, torch.float32, "cpu", "sdpa").requires_grad_(False)
        torch.manual_seed(5)
        adapted = add_adapter(model, ADAPTER, [256, 257])
        with torch.no_grad():
            for param in adapted.parameters():
                if param.requires_grad:
                    param.add_(0.05 * torch.randn_like(param))
        save_adapter(adapted, folder / method)
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl")]


WAYS = [
    ("sft", "full"),
    ("sft", "lora"),
    ("sft", "qlora"),
    ("dpo", "full"),
    ("dpo", "lora"),
    ("dpo", "qlora"),
    ("continue", "lora"),
    ("continue", "qlora"),
]


@pytest.mark.contract(number=4)
@pytest.mark.parametrize(
    ("objective", "method", "evaluate"),
    [(*way, evaluate) for way in WAYS for evaluate in ([False, True] if "qlora" in way else [False])],
)
def test_interrupted_and_resumed_is_never_interrupted(
    parents: Path, tmp_path: Path, objective: str, method: str, evaluate: bool
) -> None:
    way = Way(parents / "base", parents / method, objective, method)
    whole = way.saved(way.run(tmp_path / "whole", seed=1), tmp_path / "whole")
    assert way.asked == list(range(STEPS))
    way.asked.clear()
    with pytest.raises(Interrupted, match=f"step {STOP} of {STEPS}"):
        way.run(tmp_path / "torn", seed=1, stop_at=STOP, evaluate=evaluate)
    assert checkpoint_steps(tmp_path / "torn" / "checkpoints") == [STOP]
    torch.manual_seed(99)
    model = way.run(tmp_path / "torn", seed=2, evaluate=evaluate)
    if evaluate:
        look(model)
    assert way.saved(model, tmp_path / "torn") == whole
    assert way.asked == list(range(STEPS))  # no step twice, none skipped
    assert losses(tmp_path / "torn") == losses(tmp_path / "whole")


@pytest.mark.contract(number=4)
def test_an_evaluation_does_not_change_four_bit_training(parents: Path, tmp_path: Path) -> None:
    way = Way(parents / "base", parents / "qlora", "sft", "qlora")
    quiet = way.saved(way.run(tmp_path / "quiet", seed=1), tmp_path / "quiet")
    looked = way.saved(way.run(tmp_path / "looked", seed=1, evaluate=True), tmp_path / "looked")
    assert looked == quiet


def test_a_finished_run_is_not_trained_again(parents: Path, tmp_path: Path) -> None:
    way = Way(parents / "base", parents / "lora", "sft", "full")
    first = way.run(tmp_path / "run", seed=1)
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [3, STEPS]
    done = way.saved(first, tmp_path / "run")
    way.asked.clear()
    again = way.run(tmp_path / "run", seed=2)
    assert way.asked == []
    assert way.saved(again, tmp_path / "run") == done


def test_the_saved_bytes_would_show_a_difference(parents: Path, tmp_path: Path) -> None:
    way = Way(parents / "base", parents / "lora", "sft", "lora")
    one, other = (way.saved(way.run(tmp_path / str(seed), seed), tmp_path / str(seed)) for seed in (1, 2))
    assert one != other
