"""The heaviest piece first, before the first step: a lack of memory shows in the first minute or never."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from posttrain.errors import StageError
from posttrain.pretraining import world
from posttrain.pretraining.loop import Piece, Step
from posttrain.training.limits import Limits


@dataclass(frozen=True)
class Trial:
    """What the trial found."""

    limits: Limits
    """Limits that fit."""
    refused: list[int] = field(default_factory=list)
    """Piece limits, in tokens, that did not."""


def try_limits(
    trainer: Any,
    limits: Limits,
    heaviest: Callable[[Limits], Step],
    longest: int,
    reserve: int,
    events: Callable[..., None],
) -> Trial:
    """Runs forward and backward of the heaviest pieces, with smaller limits until they fit.

    Nothing is left behind: random state, gradients, metrics and counters are as before.

    Args:
        heaviest: limits -> a step at least as heavy as any of the schedule.
        longest: tokens of the longest row or pair: no piece can be smaller.
        reserve: bytes that the optimizer's first step will allocate.

    Raises:
        StageError: not even one row or pair fits.
    """
    refused: list[int] = []
    while True:
        if _fits(trainer, heaviest(limits), reserve):
            return Trial(limits, refused)
        refused.append(limits.tokens)
        smaller = limits.halved(longest)
        if smaller is None:
            raise StageError(
                "memory",
                f"one row or pair of {longest} tokens does not fit the device beside the model and its optimizer",
                "set trainer.gradient_checkpointing: true, a smaller data.max_length, method lora or qlora,"
                " or an 8-bit optim; loss types that compare the pairs of a step need all of it at once",
            )
        text = f"out of memory with {limits.tokens} tokens in a piece; trying {smaller.tokens}"
        events("note", text=text)
        limits = smaller


def _fits(trainer: Any, step: Step, reserve: int) -> bool:
    """Whether the step's heaviest pieces run, with gradients in place and room for the optimizer, on every process."""
    short = False
    with _undisturbed(trainer):
        try:
            _run(trainer, step, reserve)
        except torch.OutOfMemoryError:
            short = True
    return not world.any_of(short)


def _run(trainer: Any, step: Step, reserve: int) -> None:
    device = trainer.args.device
    room = torch.empty(reserve, dtype=torch.uint8, device=device)
    for param in trainer.model.parameters():
        if param.requires_grad:
            param.grad = torch.zeros_like(param)  # pieces after the first find them in place
    trainer.model.train()
    for piece in _heaviest(step.pieces):
        with trainer.maybe_activation_offload_context:
            with trainer.compute_loss_context_manager():
                loss = trainer.piece_loss(
                    trainer.model, trainer._prepare_inputs(dict(piece.tensors)), piece.share, step
                )
            loss.backward()
    del room


def _heaviest(pieces: list[Piece]) -> list[Piece]:
    """The piece with the longest row, which is the first, and the one with most tokens."""
    largest = max(pieces, key=lambda piece: piece.tensors["input_ids"].numel())
    return [pieces[0]] if largest is pieces[0] else [pieces[0], largest]


@contextmanager
def _undisturbed(trainer: Any) -> Iterator[None]:
    """Puts back everything that a trial step touches, whether it fits or not."""
    cuda = torch.cuda.is_available()
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if cuda else []
    metrics = {mode: {name: list(values) for name, values in found.items()} for mode, found in trainer._metrics.items()}
    counted = trainer._total_train_tokens
    if trainer.args.gradient_checkpointing:  # the Trainer would switch it on in `train`
        trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
    try:
        yield
    finally:
        trainer.model.zero_grad(set_to_none=True)
        for mode, found in trainer._metrics.items():
            found.clear()
            found.update(metrics[mode])
        trainer._total_train_tokens = counted
        torch.set_rng_state(cpu_state)
        if cuda:
            torch.cuda.set_rng_state_all(cuda_states)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
