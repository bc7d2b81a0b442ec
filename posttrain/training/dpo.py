"""DPO on TRL's DPOTrainer: packed, with reference log-probs taken from the policy before its first step."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from posttrain.errors import StageError
from posttrain.pretraining import world
from posttrain.pretraining.loop import Piece, Spine, Step
from posttrain.pretraining.ranks import ALONE, Rank, divide
from posttrain.training.head import use_plain_head
from posttrain.training.packed_view import MaskMaker, PackedView
from posttrain.training.pairs import Pair, cut_pairs, pad_pairs
from posttrain.training.sft import placeholder_dataset, restore_weights, show_head_bias, trainable_weights

COUPLED = frozenset({"aot", "aot_unpaired", "sft"})
"""Loss types in which the pairs of a batch act on one another: a step with one of them is never cut."""


class NoReference(torch.nn.Module):
    """Stands where TRL wants a reference model.

    The reference log-probs come with every batch, so nothing may ever call it. Given explicitly, it
    keeps TRL from copying the adapter, from loading a second model, and from switching off the frozen
    adapters below the one in training.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: there is no reference model."""
        raise StageError("dpo", "TRL asked for a reference model", "report this: references are precomputed")


class SpineDpoTrainer(Spine, DPOTrainer):
    """TRL's DPO losses under our loop; the mean over the pairs of the whole step."""

    row_tokens: int
    """Capacity of a packed row."""
    mask: MaskMaker | None = None
    """Set where the two sequences of a pair share the forward of what both begin with."""

    @property
    def shares(self) -> bool:
        """Whether a pair's common prefix goes through the model once."""
        return self.mask is not None

    def view(self, mask: MaskMaker | None) -> PackedView:
        """The live model on packed rows, plain or sharing."""
        return PackedView(self.model, self.row_tokens, mask)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset  # rows come from the loop, tokenised by us

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loop's step inside TRL's context for offloaded activations, which TRL's own method would enter."""
        with self.maybe_activation_offload_context:
            return super().training_step(*args, **kwargs)

    def piece_loss(self, model, tensors: dict, share: float, step: Step) -> torch.Tensor:
        """Mean loss of the piece's pairs, weighted by its share of the step's pairs."""
        return self.compute_loss(model, tensors) * share

    def _compute_loss(self, model, inputs, return_outputs):
        return super()._compute_loss(PackedView(model, self.row_tokens, self.mask), inputs, return_outputs)

    def policy_logps(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probs of both answers under the live policy, by the very path that trains.

        Args:
            tensors: from `pad_pairs`.

        Returns:
            [B, 2] fp32 on the CPU: chosen, rejected; TRL's `ld_alpha` weighting included.
        """
        self.model.train()  # the mode of training, which 4-bit kernels depend on; every dropout is off
        both = self.compute_ref_log_probs(self.view(self.mask), self._prepare_inputs(dict(tensors)))
        return torch.stack(both, dim=1).float().cpu()

    @torch.no_grad()
    def loss_before_training(self, step: Step) -> float:
        """The loss of a step as the model stands, without gradients; TRL's metrics are left as they were."""
        self.model.train()
        loss = 0.0
        for piece in step.pieces:
            with self.compute_loss_context_manager(), self._own_figures():
                inputs = self._prepare_inputs(dict(piece.tensors))
                loss += self.piece_loss(self.model, inputs, piece.share, step).item()
        self._metrics["train"].clear()
        self._total_train_tokens = 0
        return world.total(loss)[0]


def build_dpo_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: dict[str, Any],
    row_tokens: int,
) -> SpineDpoTrainer:
    """Builds the trainer without letting TRL touch data, dtypes, adapters or the reference.

    Args:
        model: loaded and wrapped by us; which parameters train, and their dtypes, stay as they are.
        arguments: from `posttrain.pretraining.arguments.trainer_arguments`.
        row_tokens: capacity of a packed row.
    """
    weights = trainable_weights(model)
    show_head_bias(model)
    args = DPOConfig(**arguments | {"disable_dropout": True, "precompute_ref_log_probs": False})
    trainer = SpineDpoTrainer(
        model=model,
        ref_model=NoReference(model.config),
        args=args,
        train_dataset=placeholder_dataset(),
        processing_class=tokenizer,
        data_collator=lambda batch: batch,
    )
    restore_weights(model, weights)
    use_plain_head(model, squares=trainer.use_weighting)
    _silence_attention(model)
    trainer.precompute_ref_logps = True  # read the reference from the batch
    trainer.row_tokens = row_tokens
    return trainer


def _silence_attention(model: torch.nn.Module) -> None:
    """Switches off the dropout that attention applies by a number: TRL's `disable_dropout` looks for modules only."""
    for module in model.modules():
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.0


def dpo_step(
    pairs: list[Pair],
    references: torch.Tensor,
    pad_id: int,
    tokens: int,
    most_pairs: int | None,
    loss_types: list[str],
    share: bool = False,
    rank: Rank = ALONE,
) -> Step:
    """Cuts one process's part of an optimizer step into pieces.

    Args:
        pairs: of the whole step.
        references: [N, 2] fp32 log-probs of chosen and rejected under the reference.
        tokens: most tokens of a piece; a pair counts both its sequences, what they share once with `share`.
        most_pairs: most pairs of a piece.
        loss_types: the losses; a coupled one keeps the step in one piece, which the first process runs.
    """
    costs = [pair.cost(share) for pair in pairs]
    if COUPLED & set(loss_types):
        cuts = [[list(range(len(pairs)))], *([] for _ in range(1, rank.world))]
    else:
        parts = divide(costs, rank.world)
        cuts = [
            [[mine[index] for index in piece] for piece in cut_pairs([costs[i] for i in mine], tokens, most_pairs)]
            for mine in parts
        ]
    made = [Piece(_tensors(pairs, references, piece, pad_id), len(piece) / len(pairs)) for piece in cuts[rank.index]]
    for _ in range(max(map(len, cuts)) - len(made)):
        made.append(Piece(_tensors(pairs, references, [costs.index(min(costs))], pad_id), 0.0, idle=True))
    supervised = sum(pair.supervised for pair in pairs)
    return Step(made, len(pairs), sum(costs), supervised, forwards=sum(map(len, cuts)))


def _tensors(pairs: list[Pair], references: torch.Tensor, chosen: list[int], pad_id: int) -> dict[str, torch.Tensor]:
    batch = pad_pairs([pairs[index] for index in chosen], pad_id)
    batch["ref_chosen_logps"], batch["ref_rejected_logps"] = references[chosen].unbind(dim=1)
    return batch
