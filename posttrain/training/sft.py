"""SFT (and pretraining) on TRL's SFTTrainer, fed with our own rows and steps."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from posttrain.pretraining.loop import Piece, Spine, Step
from posttrain.pretraining.packing import cut_step, stack
from posttrain.pretraining.ranks import ALONE, Rank, divide
from posttrain.pretraining.rows import Row
from posttrain.training.head import use_plain_head
from posttrain.training.limits import Limits


class SpineSftTrainer(Spine, SFTTrainer):
    """TRL's SFT loss (fused head, no full logits) under our loop; normalised by the step's supervised tokens."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loop's step inside TRL's context for offloaded activations, which TRL's own method would enter."""
        with self.maybe_activation_offload_context:
            return super().training_step(*args, **kwargs)

    def piece_loss(self, model, tensors: dict, share: float, step: Step) -> torch.Tensor:
        """Negative log-likelihood of the piece's supervised tokens over those of the whole step."""
        self.current_gradient_accumulation_steps = step.forwards  # TRL averages a router's loss over them
        count = torch.tensor(step.supervised, device=self.args.device)
        return self.compute_loss(model, tensors, num_items_in_batch=count)


def build_sft_trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]
) -> SpineSftTrainer:
    """Builds the trainer without letting TRL touch data, dtypes or tokenizer.

    Args:
        model: loaded and wrapped by us; trainable parameters keep the values and the dtype they come with
            (TRL would round adapters on a quantised base to bf16).
        arguments: from `posttrain.pretraining.arguments.trainer_arguments`.
    """
    weights = trainable_weights(model)
    show_head_bias(model)
    trainer = SpineSftTrainer(
        model=model,
        args=SFTConfig(**arguments, packing=False, padding_free=False, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=placeholder_dataset(),
        processing_class=tokenizer,
        data_collator=lambda batch: batch,
    )
    restore_weights(model, weights)
    use_plain_head(model)
    return trainer


def show_head_bias(model: torch.nn.Module) -> None:
    """Lets TRL's fused head read `lm_head.bias` through peft's wrapper of trained token rows.

    The wrapper answers for `weight` (trained rows included) and for nothing else of the layer it wraps.
    """
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        object.__setattr__(head, "bias", head.original_module.bias)  # past Module: no second parameter is registered


def placeholder_dataset() -> Dataset:
    """TRL asks for a dataset at construction; the rows come from the loop."""
    return Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]})


def trainable_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of all parameters that take a gradient, not copied."""
    return {name: param.data for name, param in model.named_parameters() if param.requires_grad}


def restore_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Gives back their tensors to parameters that a trainer has cast: casting back would not undo the rounding."""
    for name, param in model.named_parameters():
        if name in weights and param.dtype != weights[name].dtype:
            param.data = weights[name].to(param.device)


def sft_step(
    rows: list[Row],
    pad_id: int,
    row_tokens: int,
    tokens: int,
    documents: int | None,
    one_row: bool = False,
    rank: Rank = ALONE,
) -> Step:
    """Cuts one process's part of an optimizer step into packed pieces.

    Args:
        rows: of the whole step.
        row_tokens, tokens, documents, one_row: limits of a piece, see `posttrain.pretraining.packing.cut_step`.
    """
    supervised = sum(row.supervised for row in rows)
    lengths = [len(row) for row in rows]
    parts = [[rows[index] for index in mine] for mine in divide(lengths, rank.world)]
    cuts = [
        cut_step([len(row) for row in mine], row_tokens, tokens, documents, one_row) if mine else [] for mine in parts
    ]
    pieces = []
    for packed in cuts[rank.index]:
        chosen = [[parts[rank.index][index] for index in row] for row in packed]
        own = sum(row.supervised for group in chosen for row in group)
        pieces.append(Piece(_tensors(chosen, pad_id), own / max(supervised, 1)))
    for _ in range(max(map(len, cuts)) - len(pieces)):
        pieces.append(Piece(_tensors([[min(rows, key=len)]], pad_id), 0.0, idle=True))
    return Step(pieces, len(rows), sum(lengths), supervised, forwards=sum(map(len, cuts)))


def _tensors(rows: list[list[Row]], pad_id: int) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in stack(rows, pad_id).items()}


def sft_pieces(rows: list[Row], pad_id: int, limits: Limits, rank: Rank = ALONE) -> Step:
    """`sft_step` within the limits of a device."""
    return sft_step(rows, pad_id, limits.row_tokens, limits.tokens, limits.documents, limits.one_row, rank)
