"""Preference pairs as tokens, and as the padded batches TRL's DPO loss reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from posttrain.training.layout import common_prefix

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Pair:
    """One preference pair: int32 arrays; both answers follow the same prompt ids."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens of both sequences: the prompt counts once per answer."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def shared(self) -> int:
        """Tokens that one forward pass can serve for both: all that both begin with but the last of them."""
        return max(len(self.prompt) + common_prefix(self.chosen, self.rejected) - 1, 0)

    def cost(self, share: bool) -> int:
        """Tokens that go through the model."""
        return self.tokens - self.shared if share else self.tokens

    @property
    def supervised(self) -> int:
        """Tokens whose log-probability enters the loss."""
        return len(self.chosen) + len(self.rejected)

    @property
    def longest(self) -> int:
        """Tokens of the longer sequence."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def pad_pairs(pairs: list[Pair], pad_id: int) -> dict[str, torch.Tensor]:
    """Pads pairs as TRL's collator does: all chosen sequences, then all rejected ones.

    Returns:
        `input_ids`, `attention_mask`, `completion_mask`: [2B, L] int64.
    """
    import torch  # `posttrain check` counts the tokens of pairs without it

    answers = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    prompts = [pair.prompt for pair in pairs] * 2
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    batch = {name: np.zeros((len(answers), length), dtype=np.int64) for name in ("attention_mask", "completion_mask")}
    batch["input_ids"] = np.full((len(answers), length), pad_id, dtype=np.int64)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        batch["input_ids"][number, :end] = np.concatenate([prompt, answer])
        batch["attention_mask"][number, :end] = 1
        batch["completion_mask"][number, len(prompt) : end] = 1
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def cut_pairs(costs: list[int], tokens: int, most: int | None) -> list[list[int]]:
    """Cuts pairs into pieces that each fit one forward pass, longest first, so that like stands beside like.

    Args:
        costs: tokens of each pair.
        tokens: most tokens of a piece; one pair may exceed it where it has to.
        most: most pairs of a piece.
    """
    pieces: list[list[int]] = []
    used = 0
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        full = most is not None and pieces and len(pieces[-1]) >= most
        if not pieces or full or used + costs[index] > tokens:
            pieces.append([])
            used = 0
        pieces[-1].append(index)
        used += costs[index]
    return pieces
