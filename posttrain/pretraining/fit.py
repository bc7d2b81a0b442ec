"""`fit`: train from wherever the last complete checkpoint left off."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from posttrain.errors import Interrupted
from posttrain.pretraining.checkpoint import last_checkpoint
from posttrain.pretraining.loop import Loop, SpineCallback
from posttrain.pretraining.metrics import read_metrics


@dataclass(frozen=True)
class Fit:
    """What a training run came to."""

    steps: int
    resumed_from: int
    """Step of the checkpoint this process started from; 0 for a fresh start."""
    seconds: float
    """Wall time inside the loop, of this process only."""
    first_loss: float | None
    last_loss: float | None


def resume_step(loop_checkpoints) -> int:
    """Step that a rerun would start from: 0 without a complete checkpoint."""
    found = last_checkpoint(loop_checkpoints)
    return int(found.name.rpartition("-")[2]) if found else 0


def fit(trainer: Any, loop: Loop) -> Fit:
    """Runs the loop to its end.

    Args:
        trainer: a transformers Trainer with `Spine` mixed in.

    Raises:
        Interrupted: `loop.should_stop` said so; a checkpoint of the last finished step is saved.
        StageError: a loss or gradient that is not finite.
    """
    trainer.loop = loop
    trainer.pop_callback(PrinterCallback)
    trainer.pop_callback(ProgressCallback)
    trainer.add_callback(SpineCallback(trainer, loop))
    checkpoint = last_checkpoint(loop.checkpoints)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    done = trainer.state.global_step
    if done < loop.steps:
        raise Interrupted(
            f"step {done} of {loop.steps}", "stopped as asked; a checkpoint is saved", "rerun the same command to go on"
        )
    losses = [line["loss"] for line in read_metrics(loop.metrics.path)]
    return Fit(
        steps=done,
        resumed_from=int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0,
        seconds=time.perf_counter() - start,
        first_loss=losses[0] if losses else None,
        last_loss=sum(losses[-10:]) / len(losses[-10:]) if losses else None,
    )
