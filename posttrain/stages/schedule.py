"""The optimizer steps of a training stage: which of its rows each reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from posttrain.errors import DataError
from posttrain.pretraining.mixture import epoch_rows
from posttrain.pretraining.order import Order, draw_items, plan_steps
from posttrain.pretraining.rows import Row, Stream
from posttrain.stages.prepare import Prepared

T = TypeVar("T")


@dataclass(frozen=True)
class Schedule(Generic[T]):
    """The optimizer steps of a run: what each reads, and the log of it."""

    order: Order
    rows_of: Callable[[int], list[T]]
    """Step (from 0) -> its rows."""

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.order.steps


def schedule_rows(prepared: Prepared[T], trainer: dict[str, Any], seed: int) -> Schedule[T]:
    """Steps of whole rows: documents in SFT, pairs in DPO."""
    batch, most = trainer["global_batch_size"], _max_steps(trainer)
    per_epoch = sum(share.wanted for share in prepared.shares if share.available)
    epochs = most * batch / per_epoch if most > 0 else float(trainer["num_train_epochs"])
    items = _some(draw_items(prepared.shares, seed, epochs), prepared)
    order = Order(items, plan_steps(len(items), batch, most))
    return Schedule(order, lambda step: prepared.at(order.of_step(step)))


def schedule_wrapped(prepared: Prepared[Row], trainer: dict[str, Any], seed: int, length: int) -> Schedule[Row]:
    """Steps of packed rows cut from one stream; the order names the documents each step holds.

    Nothing is cut before a step asks for its rows.
    """
    batch, most = trainer["global_batch_size"], _max_steps(trainer)
    _count_cuts(prepared, epoch_rows(prepared.shares, seed, 0), length)
    if most > 0:
        items = _draw_tokens(prepared, seed, most * batch * length)
    else:
        items = _some(draw_items(prepared.shares, seed, float(trainer["num_train_epochs"])), prepared)
    stream = Stream(np.cumsum(_lengths(prepared, items)), length)
    cuts = plan_steps(len(stream), batch, most)
    first, _ = stream.documents(cuts[:-1])
    _, last = stream.documents(cuts[1:] - 1)
    sizes = last - first + 1
    offsets = np.cumsum(np.append(0, sizes))
    order = Order(items[np.repeat(first - offsets[:-1], sizes) + np.arange(offsets[-1])], offsets)

    def document(place: int) -> Row:
        return prepared.rows[items[place, 0]][items[place, 1]]

    return Schedule(order, lambda step: [stream.row(row, document) for row in range(cuts[step], cuts[step + 1])])


def _lengths(prepared: Prepared[Row], items: np.ndarray) -> np.ndarray:
    """Tokens of each drawn row, [n] int64."""
    lengths = np.empty(len(items), dtype=np.int64)
    for number, rows in enumerate(prepared.rows):
        own = items[:, 0] == number
        lengths[own] = rows.lengths[items[own, 1]]
    return lengths


def _draw_tokens(prepared: Prepared[Row], seed: int, tokens: int) -> np.ndarray:
    """Whole epochs until they hold `tokens` tokens; epochs differ in length where a weight is no whole number."""
    parts: list[np.ndarray] = []
    held = 0
    while held < tokens:
        parts.append(epoch_rows(prepared.shares, seed, len(parts)))
        held += int(_lengths(prepared, parts[-1]).sum())
    return np.concatenate(parts)


def _some(items: np.ndarray, prepared: Prepared[Any]) -> np.ndarray:
    if not len(items):
        raise DataError(", ".join(prepared.names), "num_train_epochs leaves no row to train on", "raise it")
    return items


def _count_cuts(prepared: Prepared[Row], items: np.ndarray, length: int) -> None:
    """Moves the tokens that start a packed row from `trained` to `masked`: nothing stands before them.

    A row that an epoch repeats counts as it stands the first time.
    """
    stream = Stream(np.cumsum(_lengths(prepared, items)), length)
    begins = np.arange(len(stream))
    places, _ = stream.documents(begins)  # of the document in which each packed row begins
    within = begins * length - np.append(0, stream.ends)[places]
    for number, rows in enumerate(prepared.rows):
        own = np.flatnonzero(items[:, 0] == number)
        first = np.empty(len(rows), dtype=np.int64)
        first[items[own[::-1], 1]] = own[::-1]  # of a row that is written again, the last value stays
        drawn = items[places, 1]
        starts = (items[places, 0] == number).nonzero()[0]
        starts = starts[first[drawn[starts]] == places[starts]]
        lost = int(rows.store.loss_at(rows.chosen[drawn[starts]], within[starts]).sum())
        if lost:
            prepared.ledger.train(prepared.names[number], supervised=-lost, masked=lost, rows=0)


def _max_steps(trainer: dict[str, Any]) -> int:
    return int(trainer.get("max_steps") or -1)
