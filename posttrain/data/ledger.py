"""The token ledger of a training stage: every row and token that came in, and what became of it.

Rows and tokens are counted once, for one epoch of the mixture; `rows_seen` says how often rows are
repeated by a weight. A pair's prompt is counted once. Tokens are counted on rows that were rendered:
a row dropped while reading has none.

    rows in - split + made = trained + left_out + held_out + dropped
    tokens in              = trained + masked + truncated + left_out + held_out + dropped

`split` conversations were replaced by the rows `made` of them, one per answer; the earlier turns that such
a row reads are counted in each. `trained` tokens carry loss, `masked` ones are only read, `truncated` ones
were cut off, `left_out` is what a weight below 1 or an exact number of rows leaves aside, and `held_out`
rows are kept back for certificates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.data.rows import Dropped, Origin
from posttrain.errors import DataError, StageError

EXAMPLES = 3
"""Origins kept per reason."""


@dataclass
class _Account:
    """The counters of one source, or of several added up."""

    rows: Counter[str] = field(default_factory=Counter)
    """`in`, `split`, `made`, `trained`, `left_out`, `held_out`, `seen`."""
    tokens: Counter[str] = field(default_factory=Counter)
    """`in`, `trained`, `masked`, `truncated`, `left_out`, `held_out`."""
    dropped_rows: Counter[str] = field(default_factory=Counter)
    dropped_tokens: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)

    def add(self, other: _Account) -> None:
        self.rows.update(other.rows)
        self.rows["seen"] += 0 if other.rows["seen"] else other.rows["trained"]
        self.tokens.update(other.tokens)
        self.dropped_rows.update(other.dropped_rows)
        self.dropped_tokens.update(other.dropped_tokens)
        for reason, origins in other.first.items():
            self.first[reason] = (self.first.get(reason, []) + origins)[:EXAMPLES]

    def as_dict(self) -> dict[str, Any]:
        rows, tokens = self.rows, self.tokens
        seen = rows["seen"] or rows["trained"]
        return {
            "rows": {
                "in": rows["in"],
                "split": rows["split"],
                "made": rows["made"],
                "trained": rows["trained"],
                "left_out": rows["left_out"],
                "held_out": rows["held_out"],
                "dropped": dict(sorted(self.dropped_rows.items())),
            },
            "tokens": {
                **{name: tokens[name] for name in ("in", "trained", "masked", "truncated", "left_out", "held_out")},
                "dropped": dict(sorted(self.dropped_tokens.items())),
            },
            "rows_seen": seen,
            "times": round(seen / rows["trained"], 6) if rows["trained"] else 0.0,
            "first_dropped": dict(sorted(self.first.items())),
        }


class Ledger:
    """Builds the ledger while a stage prepares its data.

    What comes in (`enter`) and what became of it (`train`, `leave_out`, `hold_out`, `drop`) are counted
    apart, so that `balance` proves something.
    """

    def __init__(self) -> None:
        self._sources: dict[str, _Account] = {}

    def read(self, source: str, rows_in: int, dropped: Iterable[Dropped]) -> None:
        """Enters a source as `read_source` returned it: all its rows, and those dropped while reading."""
        self.enter(source, rows=rows_in)
        for drop in dropped:
            self.drop(source, drop.reason, origin=drop.origin)

    def enter(self, source: str, rows: int = 0, tokens: int = 0) -> None:
        """Counts rows that were read, or the tokens of a row that was rendered, before anything is cut."""
        account = self._account(source)
        account.rows["in"] += rows
        account.tokens["in"] += tokens

    def split(self, source: str, made: int, conversations: int = 1) -> None:
        """Counts conversations that are replaced by `made` rows, each of which is accounted for by itself."""
        self._account(source).rows.update(split=conversations, made=made)

    def train(self, source: str, supervised: int, masked: int, truncated: int = 0, rows: int = 1) -> None:
        """Counts rows that are trained on, their tokens with loss, without, and those cut off."""
        account = self._account(source)
        account.rows["trained"] += rows
        account.tokens.update(trained=supervised, masked=masked, truncated=truncated)

    def leave_out(self, source: str, rows: int, tokens: int = 0) -> None:
        """Counts rows that the mixture's weight or row count leaves aside in an epoch; these are not dropped."""
        account = self._account(source)
        account.rows["left_out"] += rows
        account.tokens["left_out"] += tokens

    def hold_out(self, source: str, rows: int, tokens: int) -> None:
        """Counts usable rows that no step may see, because certificates compare models on them."""
        account = self._account(source)
        account.rows["held_out"] += rows
        account.tokens["held_out"] += tokens

    def drop(self, source: str, reason: str, rows: int = 1, tokens: int = 0, origin: Origin | None = None) -> None:
        """Counts rows (or, with `rows=0`, only tokens) that cannot be used, and remembers where the first stand."""
        account = self._account(source)
        if rows:
            account.dropped_rows[reason] += rows
        if tokens:
            account.dropped_tokens[reason] += tokens
        examples = account.first.setdefault(reason, [])
        if origin is not None and len(examples) < EXAMPLES:
            examples.append(str(origin))

    def see(self, source: str, rows: int) -> None:
        """Says how many rows one epoch of the mixture takes from a source, repeats counted."""
        self._account(source).rows["seen"] = rows

    def balance(self) -> None:
        """Raises StageError, an error of ours, where the two sides of any source differ."""
        for name, source in self.as_dict()["sources"].items():
            for unit in ("rows", "tokens"):
                account = source[unit]
                came = account["in"] - account.get("split", 0) + account.get("made", 0)
                out = {key: value for key, value in account.items() if key not in ("in", "split", "made", "dropped")}
                out["dropped"] = sum(account["dropped"].values())
                if came != sum(out.values()) or min(came, *out.values()) < 0:
                    listed = " + ".join(f"{key} {value:,}" for key, value in out.items())
                    raise StageError(
                        f"ledger of {name}",
                        f"{unit} do not add up: in {came:,}, but {listed} = {sum(out.values()):,}",
                        "this is a fault in the stage, not in the data: please report it",
                    )

    def check_dropped(self, max_dropped: float) -> None:
        """Raises DataError where more than this share (0 to 1) of all rows was dropped, saying why and where."""
        total = self._total()
        rows_in = total.rows["in"] - total.rows["split"] + total.rows["made"]
        dropped = total.dropped_rows.total()
        if dropped <= max_dropped * rows_in:
            return
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in total.dropped_rows.most_common())
        first = "; ".join(
            f"{reason}: {', '.join(total.first[reason])}" for reason in total.first if total.first[reason]
        )
        raise DataError(
            ", ".join(self._sources),
            f"{dropped:,} of {rows_in:,} rows ({100 * dropped / rows_in:.1f} %) were dropped: {reasons}"
            + (f"; first rows: {first}" if first else ""),
            f"repair them, or raise max_dropped (now {max_dropped:g})",
        )

    def as_dict(self) -> dict[str, Any]:
        """The ledger as plain JSON values: `sources` by name, and their `total`."""
        sources = {name: account.as_dict() for name, account in self._sources.items()}
        return {"sources": sources, "total": self._total().as_dict()}

    def _account(self, source: str) -> _Account:
        return self._sources.setdefault(source, _Account())

    def _total(self) -> _Account:
        total = _Account()
        for account in self._sources.values():
            total.add(account)
        return total


def render_ledger(ledger: dict[str, Any]) -> list[str]:
    """Returns `Ledger.as_dict()` as lines for people: a table, then why rows or tokens were dropped."""
    sources, total = ledger["sources"], ledger["total"]
    entries = [*sources.items(), *([("total", total)] if len(sources) > 1 else [])]
    table = [["source", "rows in", "trained", "left out", "dropped", "times", "tokens in", "trained", "masked"]]
    table[0] += ["truncated", "left out", "dropped"]
    for name, source in entries:
        rows, tokens = source["rows"], source["tokens"]
        table.append([name, *_counts(rows, ("in", "trained", "left_out")), f"{source['times']:g}"])
        table[-1] += _counts(tokens, ("in", "trained", "masked", "truncated", "left_out"))
    lines = _aligned(table)
    if total["rows"].get("split"):
        split, made = total["rows"]["split"], total["rows"]["made"]
        lines.append(f"split {split:,} conversations into {made:,} rows: the template rewrites history")
    if total["rows"].get("held_out"):
        rows, tokens = total["rows"]["held_out"], total["tokens"]["held_out"]
        lines.append(f"held out for certificates: {rows:,} rows and {tokens:,} tokens")
    for reason in {**total["rows"]["dropped"], **total["tokens"]["dropped"]}:
        rows, tokens = total["rows"]["dropped"].get(reason, 0), total["tokens"]["dropped"].get(reason, 0)
        amount = " and ".join(f"{count:,} {unit}" for count, unit in ((rows, "rows"), (tokens, "tokens")) if count)
        where = ", ".join(total["first_dropped"].get(reason, []))
        lines.append(f"dropped {amount}: {reason}" + (f" (first: {where})" if where else ""))
    return lines


def _counts(account: dict[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{count:,}" for count in (*(account[name] for name in names), sum(account["dropped"].values()))]


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    ]
