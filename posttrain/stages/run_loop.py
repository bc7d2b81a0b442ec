"""Runs the spine's loop for a training stage and turns what came out into figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain.artifact import publish_folder
from posttrain.errors import CheckpointError
from posttrain.pretraining import world
from posttrain.pretraining.arguments import trainer_arguments
from posttrain.pretraining.checkpoint import last_checkpoint
from posttrain.pretraining.fit import Fit, fit, resume_step
from posttrain.pretraining.loop import Loop, Step
from posttrain.pretraining.metrics import FILE, MetricsLog
from posttrain.pretraining.order import save_order
from posttrain.pretraining.schedule import snapshot_steps
from posttrain.recipe.schema import Snapshots
from posttrain.stages.context import Context
from posttrain.stages.prepare import Prepared
from posttrain.stages.schedule import Schedule
from posttrain.stages.setup import Machine, assert_gradients

CHECKPOINTS = "checkpoints"
SNAPSHOTS = "snapshots"


def stage_arguments(context: Context, machine: Machine, steps: int) -> dict[str, Any]:
    """Arguments of TRL's config for a training stage of `steps` optimizer steps."""
    return trainer_arguments(
        context.trainer,
        folder=context.folder,
        steps=steps,
        seed=context.seed,
        precision=context.precision,
        device=machine.device,
        report_to=context.runtime.report_to,
    )


def run_loop(
    trainer: Any,
    machine: Machine,
    context: Context,
    prepared: Prepared[Any],
    schedule: Schedule[Any],
    make_step: Callable[[int], Step],
    snapshots: Snapshots | None = None,
    save_snapshot: Callable[[Path], object] | None = None,
) -> Fit:
    """Trains to the end of the schedule, from the last complete checkpoint if there is one.

    Args:
        make_step: step number (from 0) -> its pieces.
        save_snapshot: writes a model-only snapshot into a folder.
    """
    checkpoints = context.folder / CHECKPOINTS
    begun = None
    if context.rank.first:
        save_order(context.folder, schedule.order, prepared.names, prepared.files, prepared.places)
        begun = resume_step(checkpoints)  # removes what is torn, before another process looks
        _check_count(checkpoints, machine, context)
    world.wait()
    kept = snapshots or Snapshots()
    loop = Loop(
        steps=schedule.steps,
        make_step=make_step,
        checkpoints=checkpoints,
        metrics=MetricsLog(context.folder / FILE, begun),
        keep_checkpoints=context.trainer.get("save_total_limit", 2),
        events=context.events,
        should_stop=context.should_stop,
        snapshots=frozenset(snapshot_steps(schedule.steps, kept.every, kept.step_zero, kept.powers_of_two)),
        save_snapshot=_snapshot_writer(context, save_snapshot) if save_snapshot else None,
        on_first_gradient=assert_gradients,
    )
    context.events("phase", text="training")
    context.clock.enter("training")
    return fit(trainer, loop)


def _check_count(checkpoints: Path, machine: Machine, context: Context) -> None:
    """Says what a change of the number of processes means for a resumed run: only the draws of dropout.

    Raises:
        CheckpointError: DeepSpeed's checkpoints hold the parts of its processes, and fit their number alone.
    """
    last = last_checkpoint(checkpoints)
    if last is None:
        return
    before, now = max(1, len(list(last.glob("rng_state_*.pth")))), context.rank.world
    if before == now:
        return
    if machine.spread == "deepspeed":
        found = f"was written by {before} processes with DeepSpeed, and {now} were started"
        raise CheckpointError(str(last), found, f"go on with num_processes: {before}, or remove it")
    text = f"checkpoint of {before} processes, resumed by {now}: same rows, same order; other draws of dropout"
    context.events("note", text=text)


def _snapshot_writer(context: Context, save: Callable[[Path], object]) -> Callable[[int], None]:
    """Makes snapshots atomic: written under a hidden name, then renamed."""
    folder = context.folder / SNAPSHOTS

    def write(step: int) -> None:
        final, partial = folder / f"step-{step}", folder / f".step-{step}"
        if world.any_of(context.rank.first and final.exists()):
            return  # of the run before it was interrupted: the same step, the same bytes
        partial.mkdir(parents=True, exist_ok=True)
        save(partial)
        if context.rank.first:
            publish_folder(partial, final)
        world.wait()

    return write


def training_metrics(run: Fit, trained: int, total: int, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Figures of a training stage for its record."""
    return {
        "steps": run.steps,
        "resumed_from": run.resumed_from,
        "training_seconds": round(run.seconds, 3),
        "first_loss": run.first_loss,
        "last_loss": run.last_loss,
        "trainable_parameters": trained,
        "parameters": total,
        **(extra or {}),
    }
