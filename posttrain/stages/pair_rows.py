"""How preferences become pairs of `dpo`. No torch: `posttrain check` samples by it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from posttrain.chat.render import render_pairs
from posttrain.chat.system import fold_system
from posttrain.data.rows import Message, PairRow
from posttrain.errors import ChatError
from posttrain.recipe.schema import Data
from posttrain.stages.conversation import Chat
from posttrain.stages.conversion import Conversion, Refused, Tokenised
from posttrain.training.pairs import Pair


def conversion(chat: Chat, data: Data) -> Conversion[Pair]:
    """How a stage makes tokens of pairs."""
    decides = {
        **chat.decides(),
        **data.model_dump(include={"max_length", "long_rows", "system"}, exclude_none=True),
    }
    return Conversion("pair", lambda rows: tokenise(rows, chat, data), stored_pair, decides)


def stored_pair(ids: np.ndarray, cuts: np.ndarray) -> Pair:
    """Makes a pair of its ids and the ends of its prompt and its better answer."""
    prompt, chosen = cuts.tolist()
    return Pair(ids[:prompt], ids[prompt:chosen], ids[chosen:])


def tokenise(rows: list[PairRow], chat: Chat, data: Data) -> Iterator[Tokenised | Refused]:
    """Renders pairs; an answer that goes beyond `max_length` is cut at its end, or the pair is refused.

    Raises:
        ChatError: naming file and row of a pair that the template cannot take.
    """
    pairs = ((_prompt(row, data), row.chosen, row.rejected, row.tools) for row in rows)
    for row, parts in zip(rows, render_pairs(chat.tokenizer, chat.template, pairs), strict=True):
        if isinstance(parts, ChatError):
            raise parts.at(str(row.origin))
        yield _fit_pair(parts, data.max_length, data.long_rows == "truncate")


def _prompt(row: PairRow, data: Data) -> list[Message]:
    try:
        return fold_system(row.prompt) if data.system == "fold" else row.prompt
    except ChatError as error:
        raise error.at(str(row.origin)) from None


def _fit_pair(parts: tuple[list[int], list[int], list[int]], limit: int, cut: bool) -> Tokenised | Refused:
    prompt, chosen, rejected = parts
    tokens = len(prompt) + len(chosen) + len(rejected)
    room = limit - len(prompt)
    if room < 1:
        return Refused("the prompt fills max_length", tokens)
    if max(len(chosen), len(rejected)) > room and not cut:
        return Refused("longer than max_length", tokens)
    better, worse = chosen[:room], rejected[:room]
    if better == worse:
        return Refused(f"both answers are the same {'tokens' if chosen == rejected else 'once cut'}", tokens)
    ends, supervised = (len(prompt), len(prompt) + len(better)), len(better) + len(worse)
    return Tokenised(prompt + better + worse, ends, supervised, tokens - len(prompt) - supervised)
