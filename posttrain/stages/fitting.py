"""How a training stage runs on its machine: attention backend, size of a piece, and the proof that it fits."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from posttrain.models.attention import Attention, choose_attention
from posttrain.models.lineage import Quantization
from posttrain.pretraining.loop import Step
from posttrain.pretraining.ranks import divide
from posttrain.pretraining.rows import Row
from posttrain.pretraining.world import least
from posttrain.stages.context import Context
from posttrain.stages.prediction import device_room, predict_stage
from posttrain.stages.run_loop import stage_arguments
from posttrain.stages.setup import Machine, assert_spread
from posttrain.stages.spread import spread_of
from posttrain.stages.trainable import Policy
from posttrain.training.dpo import build_dpo_trainer, dpo_step
from posttrain.training.limits import Limits, piece_limits
from posttrain.training.memory import measured_peak
from posttrain.training.pairs import Pair
from posttrain.training.sft import build_sft_trainer, sft_pieces
from posttrain.training.sharing import Sharing, choose_sharing, sharing_backend, survey
from posttrain.training.trial import Trial, try_limits

T = TypeVar("T")


@dataclass(frozen=True)
class Fitted:
    """A trainer that is set to its machine."""

    trainer: Any
    machine: Machine
    attention: Attention
    trial: Trial
    predicted_bytes: int
    """Peak of memory, as the estimate has it for these limits."""

    def metrics(self) -> dict[str, Any]:
        """How the stage ran, for its record: attention, pieces, predicted and (so far) measured memory."""
        limits = self.trial.limits
        memory = {
            "predicted_bytes": self.predicted_bytes,
            **measured_peak(self.machine.device),
            "piece_tokens": limits.tokens,
            "row_tokens": limits.row_tokens,
            "out_of_memory_at": self.trial.refused,
        }
        return {"attention": self.attention.as_dict(), "memory": memory}


def fit_sft(
    model: Any,
    quantization: Quantization | None,
    tokenizer: Any,
    machine: Machine,
    context: Context,
    steps: int,
    rows_of: Callable[[int], list[Row]],
    largest: Callable[[int], list[Row]],
) -> tuple[Fitted, Callable[[int], Step]]:
    """Builds the trainer of rows of tokens; returns it with what makes the pieces of each step.

    Args:
        rows_of: step (from 0) -> its rows.
        largest: so many -> the longest rows of all steps.
    """
    context.clock.enter("proofs")
    attention = settle_attention(model, machine, context, len(tokenizer))
    context.clock.enter("loading")
    trainer = build_sft_trainer(model, tokenizer, stage_arguments(context, machine, steps))
    assert_spread(trainer, context)
    pad = tokenizer.pad_token_id or 0
    fitted = settle_limits(
        trainer,
        quantization,
        attention,
        machine,
        context,
        largest,
        len,
        lambda rows, limits: sft_pieces(rows, pad, limits, context.rank),
    )
    return fitted, lambda step: sft_pieces(rows_of(step), pad, fitted.trial.limits, context.rank)


def fit_dpo(
    policy: Policy, tokenizer: Any, machine: Machine, context: Context, pairs: Sequence[Pair], steps: int
) -> tuple[Fitted, Sharing, Callable[[list[Pair], torch.Tensor], Step]]:
    """Builds the trainer of pairs; returns it, how pairs run, and what cuts (pairs, references) into pieces."""
    context.clock.enter("proofs")
    vocabulary, wanted = len(tokenizer), context.runtime.share_prefix
    lengths = survey(pairs)
    first = sharing_backend(wanted, machine.device, lengths)
    attention = settle_attention(policy.model, machine, context, vocabulary, first)
    context.clock.enter("loading")
    row_tokens = piece_limits(machine.device, None, None, attention.backend).packed_row
    trainer = build_dpo_trainer(policy.model, tokenizer, stage_arguments(context, machine, steps), row_tokens)
    assert_spread(trainer, context)
    context.clock.enter("proofs")
    sharing = choose_sharing(trainer, wanted, lengths, vocabulary)
    if first is not None and sharing.mask is None:  # taken for its masks alone
        attention = settle_attention(policy.model, machine, context, vocabulary)
    context.events("note", text=sharing.note)
    losses, pad, share = list(trainer.loss_types), tokenizer.pad_token_id, trainer.shares

    def cut(pairs: list[Pair], known: torch.Tensor, limits: Limits) -> Step:
        return dpo_step(pairs, known, pad, limits.tokens, limits.documents, losses, share, context.rank)

    fitted = settle_limits(
        trainer,
        policy.quantization,
        attention,
        machine,
        context,
        lambda count: heapq.nlargest(count, pairs, key=lambda pair: pair.cost(share)),
        lambda pair: pair.cost(share),
        lambda pairs, limits: cut(pairs, torch.zeros(len(pairs), 2), limits),
    )
    return fitted, sharing, lambda pairs, known: cut(pairs, known, fitted.trial.limits)


def settle_attention(
    model: Any, machine: Machine, context: Context, vocabulary: int, first: str | None = None
) -> Attention:
    """Sets the model to the backend that the recipe asks for, or to the fastest that does, and says which.

    Args:
        first: a backend that `auto` tries before all others.
    """
    asked = context.runtime.attn_implementation
    found = choose_attention(model, asked, machine.device, machine.dtype, vocabulary, first)
    why = "".join(f"; {backend} {reason}" for backend, reason in found.skipped.items())
    mask = " with a mask of documents" if found.masked else ""
    context.events("note", text=f"attention: {found.backend}{mask}{why}")
    return found


def settle_limits(
    trainer: Any,
    quantization: Quantization | None,
    attention: Attention,
    machine: Machine,
    context: Context,
    largest: Callable[[int], list[T]],
    size: Callable[[T], int],
    make_step: Callable[[list[T], Limits], Step],
) -> Fitted:
    """Chooses the size of a piece; on a GPU the heaviest pieces then run once, with smaller ones until they fit.

    Args:
        largest: so many -> the largest of all rows; they make a step that no other outweighs.
        size: tokens of a row or pair.
        make_step: rows and limits -> the pieces of one step.

    Raises:
        StageError: not even one row or pair fits.
    """
    runtime, rows = context.runtime, largest(context.trainer["global_batch_size"])
    sizes = list(map(size, rows))
    longest = max(sizes)
    most = sum(sizes[index] for index in divide(sizes, context.rank.world)[context.rank.index])
    optim, recompute = str(context.trainer.get("optim", "adamw_torch")), bool(trainer.args.gradient_checkpointing)
    prediction = predict_stage(
        trainer.model,
        quantization,
        machine,
        attention.backend,
        context.precision,
        optim,
        recompute,
        spread_of(runtime.model_dump(mode="json")),
    )
    limits = piece_limits(
        machine.device,
        runtime.micro_batch_tokens,
        runtime.micro_batch_size,
        attention.backend,
        lambda row_tokens: least(prediction.largest(device_room(), longest, row_tokens) or longest),
    )
    trial = Trial(limits)
    if machine.device == "cuda":
        context.events("phase", text="trying the heaviest piece")
        trial = try_limits(
            trainer, limits, lambda limits: make_step(rows, limits), longest, prediction.optimizer_bytes, context.events
        )
        context.events("note", text=f"pieces of at most {trial.limits.tokens} tokens")
    return Fitted(trainer, machine, attention, trial, prediction.peak(trial.limits, most))
