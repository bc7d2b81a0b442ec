"""One training loop for every stage: our data order, our step pieces, our checkpoints, in a Trainer.

`Spine` is mixed in before a transformers or TRL trainer. One batch of the loop is one optimizer step:
its rows are fixed by seed and data, and the step is cut into pieces only for memory. The loss is
normalised by what the whole step holds (supervised tokens, or pairs), so the cut changes nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from posttrain.errors import StageError
from posttrain.models.gather import put_apart
from posttrain.pretraining import world
from posttrain.pretraining.checkpoint import load_trainable, save_trainable, write_checkpoint
from posttrain.pretraining.metrics import MetricsLog
from posttrain.pretraining.optimizer_state import load_optimizer, save_optimizer
from posttrain.pretraining.sharded import accept_as_cut, cpu_counts_as_gpu

if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object  # a mixin: the Trainer comes after it in the class that uses both

SCHEDULER = "scheduler.pt"
_NOISE = {"epoch", "num_tokens"}  # TRL counts the width of a batch as its tokens; ours stand beside


@dataclass(frozen=True)
class Piece:
    """Part of an optimizer step that fits one forward pass."""

    tensors: dict[str, Any]
    share: float
    """Part of the step's normaliser that it holds; the shares of a step, over all processes, add up to 1."""
    idle: bool = False
    """Counts for nothing: run because other processes have more pieces, and each forward is one of all of them."""


@dataclass(frozen=True)
class Step:
    """Everything one optimizer step is made of; all counts are over all processes."""

    pieces: list[Piece]
    """Those of this process."""
    rows: int
    tokens: int
    """Tokens that go through the model, padding left out."""
    supervised: int
    """Tokens that carry loss."""
    forwards: int = 0
    """Pieces that are not idle."""


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
        (value,) = world.total(self._run_pieces(model, inputs).item())
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
        return torch.tensor(value, device=self.args.device)

    def _run_pieces(self, model, step: Step) -> torch.Tensor:
        """Forward and backward over this process's pieces; returns its part of the step's loss (scalar)."""
        processes, own = self.accelerator.num_processes, torch.zeros((), device=self.args.device)
        before = {name: len(values) for name, values in self._metrics["train"].items()}
        for number, piece in enumerate(step.pieces):
            last = number == len(step.pieces) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)  # DeepSpeed steps with the last backward
            with self._unsynced(model, last):
                with self.compute_loss_context_manager(), self._own_figures():
                    loss = self.piece_loss(model, self._prepare_inputs(dict(piece.tensors)), piece.share, step)
                if piece.idle:
                    loss = loss * 0.0
                # Gradients are averaged over processes; the contributions of ours add up.
                self.accelerator.backward(loss * processes if processes > 1 else loss)
            own += loss.detach()
        self._join_figures(step, before)
        return own

    def _unsynced(self, model, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Leaves gradients apart until the last piece; sharded ones cannot wait: each device would hold them whole."""
        if last or self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    @contextlib.contextmanager
    def _own_figures(self) -> Iterator[None]:
        """Keeps TRL from gathering figures of pieces: those of the processes differ in rows, and come together once."""
        if self.accelerator.num_processes == 1:
            yield
            return
        gathering = {"gather": _as_it_is, "gather_for_metrics": _as_it_is}
        self.accelerator.__dict__.update(gathering)  # on the instance, before the methods of its class
        try:
            yield
        finally:
            for name in gathering:
                del self.accelerator.__dict__[name]

    def _join_figures(self, step: Step, before: dict[str, int]) -> None:
        """Makes one value of each figure that TRL noted for the pieces: their mean by share, over all processes."""
        if len(step.pieces) == 1 and self.accelerator.num_processes == 1:
            return
        shares = [0.0 if piece.idle else piece.share for piece in step.pieces]
        noted = self._metrics["train"]
        names = sorted(noted.keys() - _NOISE)
        own = [
            sum(value * share for value, share in zip(noted[name][before.get(name, 0) :], shares, strict=True))
            for name in names
        ]
        for name, value in zip(names, world.total(*own), strict=True):
            noted[name][before.get(name, 0) :] = [value]

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True):
        """Autocast wherever a piece runs: Accelerate brings it to a model that it has prepared, to none that is cut."""
        return self.accelerator.autocast()

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
        first = self.is_world_process_zero()

        def fill(folder: Path) -> None:
            if self.is_deepspeed_enabled:
                self._save_optimizer_and_scheduler(str(folder))  # in DeepSpeed's own form, each process its part
            else:
                model = self.accelerator.unwrap_model(self.model)
                save_trainable(model, folder)
                save_optimizer(model, self.optimizer, folder)
            if first:
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)
                self.state.save_to_json(str(folder / "trainer_state.json"))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))  # every process its own

        write_checkpoint(self.loop.checkpoints, self.state.global_step, self.loop.keep_checkpoints, fill, first)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        load_trainable(self.accelerator.unwrap_model(self.model), Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        load_optimizer(self.accelerator.unwrap_model(self.model), self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER, weights_only=True))

    def create_accelerator_and_postprocess(self) -> None:
        """Makes the Accelerator; on CPUs one that knows a model cut by FSDP2."""
        with cpu_counts_as_gpu(os.environ.get("ACCELERATE_USE_FSDP") == "true"):
            super().create_accelerator_and_postprocess()

    def _prepare_for_training(self, *args: Any, **kwargs: Any):
        if self.is_fsdp_enabled:
            put_apart(self.model)  # the proofs' forwards left some whole: the optimizer must not be made for those
            accept_as_cut(self.accelerator)
        return super()._prepare_for_training(*args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False) -> None:
        """Nothing: the stage saves what it leaves, once, at its end."""


def _as_it_is(tensor: Any, *_: Any, **__: Any) -> Any:
    return tensor


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
        asked = world.any_of(self.loop.should_stop())  # of any process: all stop after the same step
        if asked and state.global_step < state.max_steps:
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
