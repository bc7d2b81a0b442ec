"""From the recipe's sources to the optimizer steps of a training stage: rows, ledger, order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from posttrain.data.held_out import choose_held_out, held_out_count
from posttrain.data.ledger import Ledger
from posttrain.data.read import SourceRows, read_source
from posttrain.data.rows import Origin
from posttrain.errors import DataError
from posttrain.pretraining.mixture import Share, epoch_rows
from posttrain.pretraining.order import Order, draw_items, plan_steps
from posttrain.pretraining.rows import IGNORE, Row, wrap
from posttrain.recipe.schema import Data, Source
from posttrain.stages.context import Context
from posttrain.stages.sources import source_spec

T = TypeVar("T")


@dataclass(frozen=True)
class Tokenised(Generic[T]):
    """One usable row of a source, and its tokens for the ledger."""

    value: T
    """A `Row` or a `Pair`."""
    supervised: int
    masked: int
    truncated: int
    part: tuple[int, int] = (1, 1)
    """(2, 3): the second of three rows that one conversation was split into."""


@dataclass(frozen=True)
class Refused:
    """A row that was rendered and cannot be trained on."""

    reason: str
    tokens: int
    part: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """The rows of all sources, and how one epoch draws from them."""

    names: list[str]
    rows: list[list[T]]
    shares: list[Share]
    ledger: Ledger
    files: list[str]
    """Every data file that was read."""
    places: list[np.ndarray]
    """Per source [rows, 2] int64: index into `files`, row as the file counts them."""
    held_out: list[T]
    """Usable rows of all sources that no step sees."""
    usable: list[np.ndarray]
    """Per source [rows] int64: place of each row among the source's usable ones, those held out counted."""

    def at(self, items: np.ndarray) -> list[T]:
        """Rows of [n, 2] (source, row) pairs."""
        return [self.rows[source][row] for source, row in items.tolist()]


def prepare(
    data: Data,
    context: Context,
    want: str,
    convert: Callable[[list[Any]], Iterable[Tokenised[T] | Refused]],
    prompt_of: Callable[[T], bytes] | None = None,
) -> Prepared[T]:
    """Reads and tokenises all sources and accounts for every row and token.

    Args:
        want: `text`, `chat` or `pair`.
        convert: the rows of one source -> one result each, in order; or several, where `part` says so.
        prompt_of: what rows may not share with one that is held out; absent = nothing is held out.

    Raises:
        DataError: broken files or rows, nothing left, or more rows dropped than `max_dropped` allows.
    """
    ledger, names, made = Ledger(), [], []
    files: list[str] = []
    places: list[np.ndarray] = []
    for number, source in enumerate(data.sources):
        name = _label(source, number, data.sources)
        context.events("phase", text=f"reading {name}")
        found: SourceRows = read_source(source_spec(source, context.recipe_dir), want)  # type: ignore[arg-type]
        context.events("note", text=f"{name}: {found.rows_in} rows, shape {found.shape}")
        ledger.read(name, found.rows_in, found.dropped)
        kept, origins = _account(name, found, convert(found.rows), ledger)
        names.append(name)
        made.append(kept)
        places.append(_places(origins, files))
    held_out, usable = _hold_out(data, names, made, places, prompt_of, context.seed, ledger)
    rows, shares = [], []
    for number, source in enumerate(data.sources):
        kept = [made[number][index] for index in usable[number].tolist()]
        share = Share(len(kept), 1.0 if source.weight is None else source.weight, source.rows)
        _count_epoch(names[number], number, kept, share, context.seed, ledger)
        rows.append([one.value for one in kept])
        shares.append(share)
    ledger.balance()
    ledger.check_dropped(data.max_dropped)
    if not any(rows):
        raise DataError(", ".join(names), "no row can be trained on", "see the reasons in the ledger, lengths first")
    if not any(share.wanted for share in shares if share.available):
        raise DataError(
            ", ".join(names), "no row is left of an epoch at these weights", "raise `weight`, or set `rows`"
        )
    trained_at = [place[index] for place, index in zip(places, usable, strict=True)]
    return Prepared(names, rows, shares, ledger, files, trained_at, held_out, usable)


def _label(source: Source, number: int, sources: list[Source]) -> str:
    """A source's name in ledger and data order: its path's last part, numbered where two are the same."""
    names = [Path(other.path).name if other.path.startswith(("/", ".", "~")) else other.path for other in sources]
    return names[number] if names.count(names[number]) == 1 else f"{names[number]}#{number + 1}"


def _places(origins: list[Origin], files: list[str]) -> np.ndarray:
    """Where rows stand, [rows, 2] int64: file (by its place in `files`, which grows) and row in it."""
    known = {file: number for number, file in enumerate(files)}
    for origin in origins:
        if origin.file not in known:
            known[origin.file] = len(files)
            files.append(origin.file)
    return np.array([(known[origin.file], origin.row) for origin in origins], dtype=np.int64).reshape(-1, 2)


def _account(name: str, found: SourceRows, results: Iterable[Any], ledger: Ledger) -> tuple[list[Any], list[Origin]]:
    """Enters every result in the ledger; returns those that can be trained on, and where each one's row stands."""
    kept, origins = [], []
    rows, origin = iter(found.rows), Origin(name, 0)
    for result in results:
        number, parts = result.part
        if number == 1:
            origin = next(rows).origin
            if parts > 1:
                ledger.split(name, parts)
        if isinstance(result, Refused):
            ledger.enter(name, tokens=result.tokens)
            ledger.drop(name, result.reason, tokens=result.tokens, origin=origin)
            continue
        ledger.enter(name, tokens=result.supervised + result.masked + result.truncated)
        kept.append(result)
        origins.append(origin)
    return kept, origins


def _hold_out(
    data: Data,
    names: list[str],
    made: list[list[Tokenised[T]]],
    places: list[np.ndarray],
    prompt_of: Callable[[T], bytes] | None,
    seed: int,
    ledger: Ledger,
) -> tuple[list[T], list[np.ndarray]]:
    """Chooses the rows to hold out over all sources; returns them, and which rows of each source are left.

    Raises:
        DataError: `held_out` leaves nothing to train on.
    """
    total = sum(map(len, made))
    count = held_out_count(data.held_out, total) if prompt_of else 0
    if count >= total > 0:
        raise DataError(", ".join(names), f"held_out: {count} leaves none of {total} rows to train on", "lower it")
    chosen = choose_held_out(list(_prompts(made, places, prompt_of)) if prompt_of else [], count, seed)
    held, usable, at = [], [], 0
    for name, kept in zip(names, made, strict=True):
        out = [at + number in chosen for number in range(len(kept))]
        for one in (one for one, apart in zip(kept, out, strict=True) if apart):
            ledger.hold_out(name, 1, one.supervised + one.masked + one.truncated)
            held.append(one.value)
        usable.append(np.flatnonzero(~np.array(out, dtype=bool)))
        at += len(kept)
    return held, usable


def _prompts(
    made: list[list[Tokenised[T]]], places: list[np.ndarray], prompt_of: Callable[[T], bytes]
) -> Iterator[bytes]:
    """The prompt of every row; rows made of one conversation have that of the first of them."""
    for kept, place in zip(made, places, strict=True):
        last: tuple[list[int], bytes] | None = None
        for one, where in zip(kept, place.tolist(), strict=True):
            if last is None or last[0] != where:
                last = (where, prompt_of(one.value))
            yield last[1]


def _count_epoch(name: str, number: int, kept: list[Any], share: Share, seed: int, ledger: Ledger) -> None:
    """Enters what the first epoch trains on, and what its weight leaves aside."""
    shares = [Share(0)] * number + [share]
    drawn = np.bincount(epoch_rows(shares, seed, 0)[:, 1], minlength=len(kept)) if kept else np.empty(0)
    for one, times in zip(kept, drawn, strict=True):
        if times:
            ledger.train(name, one.supervised, one.masked, one.truncated)
        else:
            ledger.leave_out(name, 1, one.supervised + one.masked + one.truncated)
    ledger.see(name, int(drawn.sum()))


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
    """Steps of packed rows cut from one stream; the order names the documents each step holds."""
    batch, most = trainer["global_batch_size"], _max_steps(trainer)
    first = epoch_rows(prepared.shares, seed, 0)
    _count_cuts(prepared, first, length)
    if most > 0:
        items = _draw_tokens(prepared, seed, most * batch * length)
    else:
        items = _some(draw_items(prepared.shares, seed, float(trainer["num_train_epochs"])), prepared)
    rows, members = wrap(prepared.at(items), length)
    cuts = plan_steps(len(rows), batch, most)
    held = [np.unique(np.concatenate([members[i] for i in range(a, b)])) for a, b in pairwise(cuts)]
    offsets = np.cumsum([0, *map(len, held)], dtype=np.int64)
    order = Order(items[np.concatenate(held).astype(np.int64)], offsets)
    return Schedule(order, lambda step: rows[cuts[step] : cuts[step + 1]])


def _draw_tokens(prepared: Prepared[Row], seed: int, tokens: int) -> np.ndarray:
    """Whole epochs until they hold `tokens` tokens; epochs differ in length where a weight is no whole number."""
    parts: list[np.ndarray] = []
    held = 0
    while held < tokens:
        parts.append(epoch_rows(prepared.shares, seed, len(parts)))
        held += sum(map(len, prepared.at(parts[-1])))
    return np.concatenate(parts)


def _some(items: np.ndarray, prepared: Prepared[Any]) -> np.ndarray:
    if not len(items):
        raise DataError(", ".join(prepared.names), "num_train_epochs leaves no row to train on", "raise it")
    return items


def _count_cuts(prepared: Prepared[Row], items: np.ndarray, length: int) -> None:
    """Moves the tokens that start a packed row from `trained` to `masked`: nothing stands before them."""
    seen: set[tuple[int, int]] = set()
    at = 0
    for (source, number), row in zip(map(tuple, items.tolist()), prepared.at(items), strict=True):
        starts = np.arange(-at % length, len(row), length)
        lost = int((row.labels[starts] != IGNORE).sum())
        if lost and (source, number) not in seen:
            prepared.ledger.train(prepared.names[source], supervised=-lost, masked=lost, rows=0)
        seen.add((source, number))
        at += len(row)


def _max_steps(trainer: dict[str, Any]) -> int:
    return int(trainer.get("max_steps") or -1)
