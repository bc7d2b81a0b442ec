"""Greedy answers: the highest logit at every step, nothing forced, the end of turn as only stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from posttrain.evaluation.batches import by_length


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt."""

    ids: list[int]
    """Generated tokens, the end of turn left out."""
    text: str
    """`ids` decoded, other special tokens shown, nothing cleaned up."""
    stopped: bool
    """Whether the end of turn came within the limit."""


@torch.inference_mode()
def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts_ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int],
    batch_tokens: int = 8192,
) -> list[Answer]:
    """Answers prompts greedily, in batches of like length, padded on the left.

    Neither the model's generation config (repetition penalties, forced tokens, stop strings, its own end
    tokens) nor any sampling takes part: two models differ by their weights alone.

    Args:
        prompts_ids: token ids of the prompts, none empty.
        eos_ids: the end of turn of the chat template; the same for every model that is compared. Empty for a
            tokenizer that has no such token: then nothing stops before the limit.
        batch_tokens: most tokens of a batch, padding and answers included.
    """
    answers: dict[int, Answer] = {}
    lengths = [len(ids) + max_new_tokens for ids in prompts_ids]
    padding = eos_ids[0] if eos_ids else 0  # masked out before a prompt, cut off after an answer
    plain = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=padding,
    )
    with _own_config(model, plain):
        for batch in by_length(lengths, batch_tokens):
            prompts, mask = _pad_left([prompts_ids[row] for row in batch], padding)
            ids = model.generate(input_ids=prompts.to(model.device), attention_mask=mask.to(model.device))
            for row, generated in zip(batch, ids[:, prompts.shape[1] :].tolist(), strict=True):
                answers[row] = _answer(tokenizer, generated, eos_ids)
    return [answers[row] for row in range(len(prompts_ids))]


@contextmanager
def _own_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Swaps the model's generation config: what a config passed to `generate` leaves open is filled from it."""
    before = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = before


def _pad_left(rows: Sequence[Sequence[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), padding, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :] = torch.tensor(list(row))
        mask[number, longest - len(row) :] = 1
    return ids, mask


def _answer(tokenizer: PreTrainedTokenizerBase, generated: list[int], eos_ids: Sequence[int]) -> Answer:
    ends = [position for position, token in enumerate(generated) if token in eos_ids]
    ids = generated[: ends[0]] if ends else generated
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Answer(ids, text, bool(ends))
