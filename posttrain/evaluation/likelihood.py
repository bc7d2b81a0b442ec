"""What a model thinks of given tokens: log-probabilities, bits per byte, preferences between two answers.

All log-probabilities are natural (nats), summed in float64 from a float32 log-softmax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from posttrain.chat.render import render_pair
from posttrain.errors import ChatError
from posttrain.evaluation.batches import by_length

if TYPE_CHECKING:
    from posttrain.chat.templates import ChatTemplate
    from posttrain.data.rows import PairRow

IGNORED = -100
Row = tuple[Sequence[int], Sequence[int]]
_POSITIONS_AT_ONCE = 1024  # a float32 copy of that many rows of the vocabulary: 0.6 GB at 152 k entries


@torch.inference_mode()
def token_logprobs(model: PreTrainedModel, rows: Sequence[Row], batch_tokens: int = 4096) -> list[np.ndarray]:
    """Returns per row the log-probabilities of its supervised tokens, in order, as float32 arrays.

    Args:
        model: a causal language model in eval mode; never put into training mode here.
        rows: `(input_ids, labels)` of equal length; a label of -100 is not scored, any other equals its input
            id and is scored given all tokens before it. A first token has nothing before it: label -100.
        batch_tokens: most tokens of a forward pass, padding included (a longer row runs alone).

    Raises:
        ValueError: lengths differ, or a first token is supervised.
    """
    for number, (input_ids, labels) in enumerate(rows):
        if len(input_ids) != len(labels) or (labels and labels[0] != IGNORED):
            raise ValueError(f"row {number}: {len(input_ids)} ids, {len(labels)} labels, first label {labels[:1]}")
    scored: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(rows)
    for batch in by_length([len(row[0]) for row in rows], batch_tokens):
        batch = [row for row in batch if any(label != IGNORED for label in rows[row][1])]
        if batch:
            for row, values in zip(batch, _score_batch(model, [rows[row] for row in batch]), strict=True):
                scored[row] = values
    return scored


def _score_batch(model: PreTrainedModel, rows: list[Row]) -> list[np.ndarray]:
    """One forward pass over right-padded rows; only the supervised positions become float32."""
    longest = max(len(input_ids) for input_ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for number, (input_ids, row_labels) in enumerate(rows):
        ids[number, : len(input_ids)] = torch.tensor(input_ids)
        labels[number, : len(input_ids)] = torch.tensor(row_labels)
        mask[number, : len(input_ids)] = 1
    logits = model(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
    ).logits  # (rows, tokens, vocabulary)
    where, when = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)  # row order, then position
    targets = labels[where, when + 1]
    parts = []
    for start in range(0, len(targets), _POSITIONS_AT_ONCE):
        part = slice(start, start + _POSITIONS_AT_ONCE)
        chosen = logits[where[part].to(logits.device), when[part].to(logits.device)].float()
        target = targets[part, None].to(logits.device)
        parts.append((chosen.gather(-1, target)[:, 0] - chosen.logsumexp(-1)).cpu())
    flat = torch.cat(parts).numpy()
    return np.split(flat, np.cumsum(np.bincount(where.numpy(), minlength=len(rows)))[:-1])


@dataclass(frozen=True)
class TextScore:
    """Bits a model needs for one text, and the text's size."""

    bits: float
    """Of all tokens after the first."""
    text_bytes: int
    """Of the whole text in UTF-8."""
    tokens: int
    """Tokens scored."""


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_length: int,
    batch_tokens: int = 4096,
) -> list[TextScore]:
    """Scores texts as the tokenizer encodes them by itself (with BOS where it adds one).

    The figure of a corpus is `sum(bits) / sum(text_bytes)`; it compares models across tokenizers, which
    perplexity does not. The first token has no context and costs nothing: it is BOS where there is one, else
    the figure is a little too low, by the same amount for models that share a tokenizer.

    A text longer than `max_length` tokens is cut into windows that overlap by one token: each token after the
    first is scored once, with the tokens of its own window as context.
    """
    rows: list[Row] = []
    owner: list[int] = []
    for number, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        for start in range(0, max(1, len(ids) - 1), max_length - 1):
            window = ids[start : start + max_length]
            rows.append((window, [IGNORED, *window[1:]][: len(window)]))
            owner.append(number)
    nats, tokens = np.zeros(len(texts)), np.zeros(len(texts), dtype=np.int64)
    for number, values in zip(owner, token_logprobs(model, rows, batch_tokens), strict=True):
        nats[number] -= values.sum(dtype=np.float64)
        tokens[number] += len(values)
    return [TextScore(float(nats[i]) / math.log(2), len(text.encode()), int(tokens[i])) for i, text in enumerate(texts)]


@dataclass(frozen=True)
class PairScore:
    """Log-probability of the two answers of a pair, given the prompt, and their lengths in tokens."""

    chosen: float
    rejected: float
    chosen_tokens: int
    rejected_tokens: int

    @property
    def prefers_chosen(self) -> bool:
        """Whether the chosen answer has the higher summed log-probability; a tie counts against the model."""
        return self.chosen > self.rejected

    @property
    def prefers_chosen_per_token(self) -> bool:
        """The same with the mean over the answer's tokens, which does not favour short answers."""
        return self.chosen / self.chosen_tokens > self.rejected / self.rejected_tokens


def preference(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    pairs: Sequence[PairRow],
    max_length: int,
    batch_tokens: int = 4096,
) -> list[PairScore | None]:
    """Scores the answers of pairs, end of turn included, rendered by the very path that trains.

    Returns:
        One score per pair; None where prompt and longer answer do not fit into `max_length` tokens, since a
        cut answer is another answer.

    Raises:
        ChatError: a pair cannot be rendered; it names its file and row.
    """
    rows: list[Row] = []
    fitting: list[int] = []
    for number, pair in enumerate(pairs):
        try:
            prompt, chosen, rejected = render_pair(
                tokenizer, template, pair.prompt, pair.chosen, pair.rejected, pair.tools
            )
        except ChatError as error:
            raise error.at(str(pair.origin)) from None
        if len(prompt) + max(len(chosen), len(rejected)) > max_length:
            continue
        fitting.append(number)
        for answer in (chosen, rejected):
            rows.append(([*prompt, *answer], [*[IGNORED] * len(prompt), *answer]))
    scores = token_logprobs(model, rows, batch_tokens)
    result: list[PairScore | None] = [None] * len(pairs)
    for number, chosen_values, rejected_values in zip(fitting, scores[::2], scores[1::2], strict=True):
        result[number] = PairScore(
            float(chosen_values.sum(dtype=np.float64)),
            float(rejected_values.sum(dtype=np.float64)),
            len(chosen_values),
            len(rejected_values),
        )
    return result
