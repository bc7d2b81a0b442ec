"""From the recipe's sources to the rows of a training stage, each accounted for; steps are cut in `schedule`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from posttrain.data.held_out import choose_held_out, held_out_count
from posttrain.data.ledger import Ledger
from posttrain.data.rows import Origin
from posttrain.errors import DataError
from posttrain.pretraining.mixture import Share, rows_drawn
from posttrain.pretraining.store import Joined, Store, StoredRows
from posttrain.recipe.schema import Data, Source
from posttrain.stages.context import Context
from posttrain.stages.conversion import Conversion, Refused, Tokenised
from posttrain.stages.rows_cache import tokenised_source

__all__ = ["Conversion", "Prepared", "Refused", "Tokenised", "prepare"]

T = TypeVar("T")


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """The rows of all sources, and how one epoch draws from them."""

    names: list[str]
    rows: list[StoredRows[T]]
    shares: list[Share]
    ledger: Ledger
    files: list[str]
    """Every data file whose rows can be trained on."""
    file_numbers: list[np.ndarray]
    """Per source: place of a file among the source's -> its place in `files` (-1: not there)."""
    held_out: Joined[T]
    """Usable rows of all sources that no step sees."""

    def at(self, items: np.ndarray) -> list[T]:
        """Rows of [n, 2] (source, row) pairs."""
        return [self.rows[source][row] for source, row in items.tolist()]

    @property
    def every(self) -> Joined[T]:
        """The rows of all sources, one source after the other."""
        return Joined(self.rows)

    def longest(self, count: int) -> list[T]:
        """The rows with most tokens, at most `count`, longest first."""
        lengths = np.concatenate([rows.lengths for rows in self.rows])
        few = np.argpartition(lengths, -count)[-count:] if count < len(lengths) else np.arange(len(lengths))
        return [self.every[index] for index in few[np.argsort(-lengths[few], kind="stable")].tolist()]

    @property
    def usable(self) -> list[np.ndarray]:
        """Per source [rows] int64: place of each row among the source's usable ones, those held out counted."""
        return [rows.chosen for rows in self.rows]

    @property
    def places(self) -> list[np.ndarray]:
        """Per source [rows, 2] int64: index into `files`, row as the file counts them."""
        found = []
        for rows, numbers in zip(self.rows, self.file_numbers, strict=True):
            places = rows.column("places")
            places[:, 0] = numbers[places[:, 0]]
            found.append(places)
        return found

    @property
    def last_ids(self) -> list[np.ndarray]:
        """Per source [rows] int32: id of the last token with loss of each row."""
        return [rows.column("counts")[:, 2] for rows in self.rows]


def prepare(data: Data, context: Context, conversion: Conversion[T]) -> Prepared[T]:
    """Reads and tokenises all sources, or finds them tokenised, and accounts for every row and token.

    Raises:
        DataError: broken files or rows, nothing left, or more rows dropped than `max_dropped` allows.
        ChatError: naming file and row of what the template cannot take.
    """
    ledger, names, stores = Ledger(), [], []
    files: list[str] = []
    numbers: list[np.ndarray] = []
    for number, source in enumerate(data.sources):
        name = source_label(source, number, data.sources)
        store, own_files = tokenised_source(number, source, name, context, conversion)
        context.events("note", text=f"{name}: {store.about['rows_in']} rows, shape {store.about['shape']}")
        _account(name, store, own_files, ledger)
        names.append(name)
        stores.append(store)
        numbers.append(_number_files(store, own_files, files))
    held = _hold_out(data, names, stores, conversion.holds_out, context.seed, ledger)
    rows, shares, apart = [], [], []
    for number, (source, store) in enumerate(zip(data.sources, stores, strict=True)):
        kept = np.delete(np.arange(len(store)), held[number])
        share = Share(len(kept), 1.0 if source.weight is None else source.weight, source.rows)
        rows.append(StoredRows(store, kept, conversion.make))
        apart.append(StoredRows(store, held[number], conversion.make))
        _count_epoch(names[number], rows[number], rows_drawn(share, number, context.seed, 0), ledger)
        shares.append(share)
    ledger.balance()
    ledger.check_dropped(data.max_dropped)
    if not any(map(len, rows)):
        raise DataError(", ".join(names), "no row can be trained on", "see the reasons in the ledger, lengths first")
    if not any(share.wanted for share in shares if share.available):
        raise DataError(
            ", ".join(names), "no row is left of an epoch at these weights", "raise `weight`, or set `rows`"
        )
    return Prepared(names, rows, shares, ledger, files, numbers, Joined(apart))


def source_label(source: Source, number: int, sources: list[Source]) -> str:
    """A source's name in ledger and data order: its path's last part, numbered where two are the same."""
    names = [Path(other.path).name if other.path.startswith(("/", ".", "~")) else other.path for other in sources]
    return names[number] if names.count(names[number]) == 1 else f"{names[number]}#{number + 1}"


def _number_files(store: Store, own: list[str], files: list[str]) -> np.ndarray:
    """Gives the files that a store has rows of a place in `files`, which grows."""
    numbers = np.full(len(own), -1, dtype=np.int64)
    for place in np.unique(store.columns["places"][:, 0]).tolist():
        if own[place] not in files:
            files.append(own[place])
        numbers[place] = files.index(own[place])
    return numbers


def _account(name: str, store: Store, files: list[str], ledger: Ledger) -> None:
    """Enters what came in, what was dropped and why, and what was split."""
    about = store.about
    ledger.enter(name, rows=about["rows_in"], tokens=int(store.lengths.sum() + store.columns["counts"][:, 1].sum()))
    for reason, rows in [*about["unusable"].items(), *about["refused"].items()]:
        ledger.drop(name, reason, rows)
        for file, row in about["first"][reason]:
            ledger.drop(name, reason, rows=0, origin=Origin(files[file], row))
    for reason, tokens in about["refused_tokens"].items():
        ledger.enter(name, tokens=tokens)
        ledger.drop(name, reason, rows=0, tokens=tokens)
    if about["split"]:
        ledger.split(name, about["made"], about["split"])


def _hold_out(
    data: Data, names: list[str], stores: list[Store], wanted: bool, seed: int, ledger: Ledger
) -> list[np.ndarray]:
    """Chooses the rows to hold out over all sources: per source their indices, ascending.

    Raises:
        DataError: `held_out` leaves nothing to train on.
    """
    total = sum(map(len, stores))
    count = held_out_count(data.held_out, total) if wanted else 0
    if count >= total > 0:
        raise DataError(", ".join(names), f"held_out: {count} leaves none of {total} rows to train on", "lower it")
    chosen = np.array(sorted(choose_held_out(_prompts(stores), count, seed)), dtype=np.int64)
    held, begin = [], 0
    for name, store in zip(names, stores, strict=True):
        own = chosen[(chosen >= begin) & (chosen < begin + len(store))] - begin
        if len(own):
            ledger.hold_out(name, len(own), int(store.lengths[own].sum() + store.columns["counts"][own, 1].sum()))
        held.append(own)
        begin += len(store)
    return held


def _prompts(stores: list[Store]) -> Iterator[bytes]:
    for store in stores:
        yield from store.prompts()


def _count_epoch(name: str, rows: StoredRows[Any], drawn: np.ndarray, ledger: Ledger) -> None:
    """Enters what the first epoch trains on, and what its weight leaves aside."""
    seen = np.zeros(len(rows), dtype=bool)
    seen[drawn] = True
    lengths, counts = rows.lengths, rows.column("counts")
    supervised, truncated = counts[:, 0].astype(np.int64), counts[:, 1].astype(np.int64)
    trained = int(supervised[seen].sum())
    ledger.train(name, trained, int(lengths[seen].sum()) - trained, int(truncated[seen].sum()), int(seen.sum()))
    if not seen.all():
        ledger.leave_out(name, int((~seen).sum()), int((lengths + truncated)[~seen].sum()))
    ledger.see(name, len(drawn))
