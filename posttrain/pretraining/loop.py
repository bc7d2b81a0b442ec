"""One training loop for every stage: our data order, our step pieces, our checkpoints, in a Trainer.

`Spine` is mixed in before a transformers or TRL trainer. One batch of the loop is one optimizer step:
its rows are fixed by seed and data, and the step is cut into pieces only for memory. The loss is
normalised by what the whole step holds (supervised tokens, or pairs), so the cut changes nothing.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from posttrain.errors import StageError
from posttrain.pretraining.checkpoint import load_trainable, save_trainable, write_checkpoint
from posttrain.pretraining.metrics import MetricsLog

if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object  # a mixin: the Trainer comes after it in the class that uses both

_NOISE = {"epoch", "num_tokens"}  # TRL counts the width of a batch as its tokens; ours stand beside


@dataclass(frozen=True)
class Piece:
    """Part of an optimizer step that fits one forward pass."""

    tensors: dict[str, Any]
    share: float
    """Part of the step's normaliser that it holds; the shares of a step add up to 1."""


@dataclass(frozen=True)
class Step:
    """Everything one optimizer step is made of."""

    pieces: list[Piece]
    rows: int
    tokens: int
    """Tokens that go through the model, padding left out."""
    supervised: int
    """Tokens that carry loss."""


@dataclass(frozen=True)
class Loop:
    """What the loop needs to know besides the trainer's own arguments."""

    steps: int
    make_step: Callable[[int], Step]
    """Step number (from 0) -> its pieces; must not depend on anything else."""
    checkpoints: Path
    metrics: MetricsLog
    keep_checkpoints: int | None = 2
    events: Callable[..., None] = lambda *_args, **_fields: None
    should_stop: Callable[[], bool] = lambda: False
    snapshots: frozenset[int] = frozenset()
    save_snapshot: Callable[[int], None] | None = None
    on_first_gradient: Callable[[torch.nn.Module], None] | None = None
    """Called once, after the first backward of this process, before the optimizer moves."""


class _Steps(Dataset):
    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def __len__(self) -> int:
        return self.loop.steps

    def __getitem__(self, index: int) -> Step:
        return self.loop.make_step(index)


@dataclass
class _Window:
    """Figures gathered since the last log."""

    tokens: int = 0
    supervised: int = 0
    rows: int = 0
    steps: int = 0
    started: float = field(default_factory=time.perf_counter)


class Spine(_Host):
    """Mixin for a transformers Trainer that runs a `Loop`; set `loop` before `train`."""

    loop: Loop
    _window: _Window
    _gradients_checked = False

    def get_train_dataloader(self) -> DataLoader:
        """One item per optimizer step, in order; not prepared by accelerate, since a step is whole on its own."""
        own = torch.Generator()  # starting an iterator draws a number: not from the model's stream
        return DataLoader(_Steps(self.loop), batch_size=1, shuffle=False, collate_fn=lambda b: b[0], generator=own)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device):
        """Hands over one step; what it holds is counted by us, not by the Trainer."""
        return [next(epoch_iterator)], None

    def floating_point_ops(self, inputs) -> int:
        """Zero: the Trainer's count does not know packed rows."""
        return 0

    def training_step(self, model, inputs: Step, num_items_in_batch=None) -> torch.Tensor:
        """Runs forward and backward over the pieces of one step and returns its loss (scalar)."""
        model.train()
        if not self._gradients_checked:
            self._window = _Window()
        total = torch.zeros((), device=self.args.device)
        for number, piece in enumerate(inputs.pieces):
            last = number == len(inputs.pieces) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    loss = self.piece_loss(model, self._prepare_inputs(dict(piece.tensors)), piece.share, inputs)
                self.accelerator.backward(loss)
            total += loss.detach()
        value = total.item()
        if not math.isfinite(value):
            raise StageError(
                f"step {self.state.global_step + 1}",
                f"the loss is {value}; the optimizer has not moved",
                "lower the learning rate, or use precision bf16 or fp32; the last checkpoint is intact",
            )
        if not self._gradients_checked:
            self._gradients_checked = True
            if self.loop.on_first_gradient:
                self.loop.on_first_gradient(self.accelerator.unwrap_model(model))
        window = self._window
        window.tokens += inputs.tokens
        window.supervised += inputs.supervised
        window.rows += inputs.rows
        window.steps += 1
        return total

    def piece_loss(self, model, tensors: dict, share: float, step: Step) -> torch.Tensor:
        """The piece's contribution to the step's loss; the contributions of all pieces add up."""
        raise NotImplementedError

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = norm.item() if isinstance(norm, torch.Tensor) else norm
        if value is not None and not math.isfinite(value) and self.accelerator.scaler is None:
            raise StageError(
                f"step {self.state.global_step + 1}",
                f"the gradient norm is {value}; the optimizer has not moved",
                "lower the learning rate, or use precision bf16 or fp32; the last checkpoint is intact",
            )
        return norm

    def take_window(self) -> dict[str, float]:
        """Throughput since the last call: tokens, supervised tokens and rows per step, tokens per second."""
        window, self._window = self._window, _Window()
        seconds, steps = max(time.perf_counter() - window.started, 1e-9), max(window.steps, 1)
        return {
            "tokens": window.tokens / steps,
            "supervised_tokens": window.supervised / steps,
            "rows": window.rows / steps,
            "seconds": seconds,
            "tokens_per_second": window.tokens / seconds,
        }

    def _save_checkpoint(self, model, trial) -> None:
        """Writes an exact, atomic checkpoint instead of the Trainer's, which is written in place."""

        def fill(folder: Path) -> None:
            save_trainable(self.accelerator.unwrap_model(self.model), folder)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            self.state.save_to_json(str(folder / "trainer_state.json"))

        write_checkpoint(self.loop.checkpoints, self.state.global_step, self.loop.keep_checkpoints, fill)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        load_trainable(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """Nothing: the stage saves what it leaves, once, at its end."""


class SpineCallback(TrainerCallback):
    """Reports steps, keeps snapshots, and turns a request to stop into a checkpoint and a clean end."""

    def __init__(self, trainer: Any, loop: Loop) -> None:
        self.trainer, self.loop = trainer, loop

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._window = _Window()
        if state.global_step == 0:
            self._snapshot(0)

    def on_step_end(self, args, state, control, **kwargs):
        self._snapshot(state.global_step)
        # A short run has a line too; and a run resumed from a checkpoint averages over the same steps.
        if control.should_save or state.global_step in (1, state.max_steps):
            control.should_log = True
        if self.loop.should_stop() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        line = {"step": state.global_step, **{key: value for key, value in logs.items() if key not in _NOISE}}
        line |= self.trainer.take_window()
        if state.is_world_process_zero:
            self.loop.metrics.write(line)
            self.loop.events("step", total=state.max_steps, **line)

    def _snapshot(self, step: int) -> None:
        if step in self.loop.snapshots and self.loop.save_snapshot:
            self.loop.save_snapshot(step)
