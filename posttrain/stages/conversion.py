"""From the rows of one source to tokens in a store: read, rendered and counted piece by piece, in processes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from posttrain.data.ledger import EXAMPLES
from posttrain.data.read import OpenSource, nothing_usable
from posttrain.data.rows import Origin
from posttrain.data.shapes import Fields, Want
from posttrain.errors import PosttrainError
from posttrain.pretraining.store import Block, BlockMaker, Make, Store, StoreWriter
from posttrain.stages.context import Events
from posttrain.stages.workers import in_order

T = TypeVar("T")
_ROWS, _CHARACTERS = 256, 1 << 21
"""Rows, and characters, after which a piece ends."""
_ALONE = 4
"""Pieces worked on without processes: a fork takes 45 ms a worker (measured at 0.6 GB), a piece about 80."""
_TELL_SECONDS = 5.0


class Tokenised(NamedTuple):
    """One usable row of a source."""

    ids: Sequence[int]
    cuts: Sequence[int]
    """See `posttrain.pretraining.store`."""
    supervised: int
    truncated: int
    """Tokens cut off."""
    part: tuple[int, int] = (1, 1)
    """(2, 3): the second of three rows that one conversation was split into."""


class Refused(NamedTuple):
    """A row that was rendered and cannot be trained on."""

    reason: str
    tokens: int
    part: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class Conversion(Generic[T]):
    """How a kind of stage makes tokens of rows."""

    want: Want
    convert: Callable[[list[Any]], Iterable[Tokenised | Refused]]
    """Rows -> one result each, in order; or several, where `part` says so."""
    make: Make[T]
    """What is stored -> a `Row` or a `Pair`."""
    decides: dict[str, Any]
    """Everything that decides the tokens of a row, as JSON values: tokenizer, template, settings."""
    holds_out: bool = True
    """Whether rows may be kept back for certificates."""


Example = tuple[int, int]
"""Where a row stands: file, by its place among the source's, and row as the file counts them."""


@dataclass
class Tally:
    """What became of rows, apart from those that are stored."""

    rows_in: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    """Reason -> rows that could not be rendered."""
    refused: Counter[str] = field(default_factory=Counter)
    """Reason -> rows that were rendered and cannot be trained on."""
    refused_tokens: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[Example]] = field(default_factory=dict)
    """Reason -> where the first such rows stand."""
    split: int = 0
    made: int = 0

    def note(self, reason: str, example: Example) -> None:
        """Remembers where a row stands, if it is among the first of its kind."""
        examples = self.first.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(example)

    def add(self, later: Tally) -> None:
        """Adds what became of later rows."""
        self.rows_in += later.rows_in
        self.split += later.split
        self.made += later.made
        self.unusable.update(later.unusable)
        self.refused.update(later.refused)
        self.refused_tokens.update(later.refused_tokens)
        for reason, examples in later.first.items():
            for example in examples:
                self.note(reason, example)


@dataclass(frozen=True)
class Worker:
    """Makes a block and a tally of a piece of a source."""

    source: OpenSource
    convert: Callable[[list[Any]], Iterable[Tokenised | Refused]]
    files: dict[str, int]
    """Name of each file -> its place."""

    def __call__(self, piece: list[tuple[Origin, Fields]]) -> tuple[Block, Tally]:
        tally, block = Tally(rows_in=len(piece)), BlockMaker()
        rows, broken = [], None
        try:
            for origin, fields in piece:
                row, reason = self.source.convert(fields, origin)
                if reason is None:
                    rows.append(row)
                else:
                    tally.unusable[reason] += 1
                    tally.note(reason, self._place(origin))
        except PosttrainError as error:  # what stands before it comes first
            broken = error
        self._account(rows, block, tally)
        if broken is not None:
            raise broken
        return block.build(), tally

    def _account(self, rows: list[Any], block: BlockMaker, tally: Tally) -> None:
        remaining, place = iter(rows), (0, 0)
        for result in self.convert(rows) if rows else ():
            number, parts = result.part
            if number == 1:
                place = self._place(next(remaining).origin)
                if parts > 1:
                    tally.split += 1
                    tally.made += parts
            if isinstance(result, Refused):
                tally.refused[result.reason] += 1
                tally.refused_tokens[result.reason] += result.tokens
                tally.note(result.reason, place)
                continue
            ids, cuts = result.ids, result.cuts
            last = int(ids[cuts[-1] - 1]) if cuts else -1
            block.add(ids, cuts, (result.supervised, result.truncated, last), place, result.part)

    def _place(self, origin: Origin) -> Example:
        return self.files[origin.file], origin.row


def store_rows(
    source: OpenSource, conversion: Conversion[Any], folder: Path, processes: int, events: Events, name: str
) -> Store:
    """Reads and tokenises a whole source into a new store; its `about` says what became of every row.

    Args:
        folder: of the store.
        processes: how many may work on it.
        name: of the source, for progress.

    Raises:
        PosttrainError: of the first row, in order, that is broken; then nothing is left behind under `folder`.
    """
    worker = Worker(source, conversion.convert, {file: number for number, file in enumerate(source.files)})
    writer, tally, told = StoreWriter(folder), Tally(), time.monotonic()
    try:
        for block, part in in_order(worker, _pieces(source.fields()), processes, _ALONE):
            writer.write(block)
            tally.add(part)
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                events("phase", text=f"tokenising {name}: {tally.rows_in:,} rows")
    finally:
        writer.close()
    if tally.unusable.total() == tally.rows_in:
        file, row = min(example for examples in tally.first.values() for example in examples)
        raise nothing_usable(str(Origin(source.files[file], row)), tally.unusable)
    return writer.finish({"shape": source.shape, **vars(tally)})


def _pieces(rows: Iterable[tuple[Origin, Fields]]) -> Iterator[list[tuple[Origin, Fields]]]:
    """Cuts a source into pieces; rows before a broken one are a piece of their own."""
    piece: list[tuple[Origin, Fields]] = []
    held, broken = 0, None
    try:
        for row in rows:
            piece.append(row)
            held += _characters(row[1])
            if len(piece) == _ROWS or held > _CHARACTERS:
                yield piece
                piece, held = [], 0
    except PosttrainError as error:
        broken = error
    if piece:
        yield piece
    if broken is not None:
        raise broken


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list) else 1
