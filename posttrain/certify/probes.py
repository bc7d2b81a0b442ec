"""The rows on which models are compared: token ids, where their loss counts, and whether training saw them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from posttrain.artifact import write_atomically
from posttrain.errors import CheckpointError

FILE = "probe_rows.json"
LONGEST = 256
"""Tokens of a row that are kept: a certificate need not read on."""

Source = Literal["held_out", "training", "given"]
"""Never trained on; trained on, as too few rows were there to hold some out; or the user's own file."""


@dataclass(frozen=True)
class Probe:
    """One row."""

    ids: list[int]
    labels: list[int]
    """As long as `ids`: the id itself where its loss counts, -100 elsewhere."""


@dataclass(frozen=True)
class Probes:
    """Rows to compare models on; each has at least two tokens."""

    source: Source
    rows: list[Probe]

    @property
    def ids(self) -> list[list[int]]:
        """Token ids alone, row by row."""
        return [row.ids for row in self.rows]


def save_probes(folder: Path, probes: Probes) -> None:
    """Writes rows beside an adapter or model, cut at `LONGEST` tokens."""
    rows = [{"ids": row.ids[:LONGEST], "labels": row.labels[:LONGEST]} for row in probes.rows]
    write_atomically(folder / FILE, json.dumps({"source": probes.source, "rows": rows}))


def read_probes(file: Path) -> Probes:
    """Reads what `save_probes` wrote; rows of one token, which predict nothing, are left out.

    Raises:
        CheckpointError: missing, damaged or empty.
    """
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        rows = [Probe(list(map(int, row["ids"])), list(map(int, row["labels"]))) for row in saved["rows"]]
        source = saved["source"]
    except FileNotFoundError:
        raise CheckpointError(str(file), "is missing", "give rows to compare on, or do without") from None
    except (ValueError, LookupError, TypeError) as error:
        raise CheckpointError(
            str(file), f"holds no rows to compare on ({error!r})", "train the adapter again"
        ) from None
    rows = [row for row in rows if len(row.ids) > 1 and len(row.ids) == len(row.labels)]
    if not rows or source not in get_args(Source):
        raise CheckpointError(str(file), "holds no row of two tokens", "give other rows to compare on")
    return Probes(source, rows)


def join_probes(several: list[Probes]) -> Probes:
    """The rows of several, each once; held out only where all of them are."""
    rows = list({tuple(row.ids): row for probes in several for row in probes.rows}.values())
    sources = {probes.source for probes in several}
    return Probes(sources.pop() if len(sources) == 1 else "training", rows)
