"""Steps, rows and tokens of a training stage: recorded, counted in its store, estimated from a sample, or bounded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.artifact import Artifact, Record
from posttrain.data.files import source_files
from posttrain.models.hub import fetch_description
from posttrain.stages.context import Job
from posttrain.stages.nearest import nearest_model
from posttrain.stages.samples import Samples
from posttrain.stages.sources import ROWS

if TYPE_CHECKING:
    from posttrain.stages.expected import Expected

_COUNTED = 64 << 20
"""Bytes of local data up to which rows are counted."""


@dataclass(frozen=True)
class Rows:
    """What a training stage goes through; None where it is not known."""

    steps: int | None
    rows: int | None
    """Rows of all steps: documents, pairs, or packed rows."""
    tokens: int | None
    dropped: int | None
    """Rows of an epoch that cannot be trained on."""
    source: str
    """How the figures were come by: `record`, `store` (of tokenised rows), `sample`, `settings`, `upper bound`,
    `unknown`."""
    exact: bool = False
    """Whether they are counted; a sample that covers all rows is."""
    sampled: int | None = None
    """Rows tokenised for the figures."""
    rows_in: int | None = None
    """Rows that come in an epoch, those of split conversations one by one."""
    reasons: Mapping[str, int] | None = None
    """Why rows of an epoch are dropped -> how many."""
    supervised: int | None = None
    """Of the tokens, those with loss; not of pairs, whose prompt counts twice in `tokens`."""
    shared: int | None = None
    """Of the tokens of pairs, those that sharing prefixes saves."""
    longest: int | None = None
    """Tokens of the longest sequence that was seen."""

    @property
    def dropped_share(self) -> float | None:
        """Share of the rows of an epoch that is dropped."""
        return self.dropped / self.rows_in if self.dropped is not None and self.rows_in else None


def rows_of(job: Job, jobs: Mapping[str, Job], samples: Samples) -> Rows:
    """Steps, rows and tokens of a stage, from the best there is: record, store, sample, settings."""
    done = Artifact.read(Path(job.run_dir) / job.stage)
    if done is not None and done.record.fingerprint == job.fingerprint and done.record.ledger is not None:
        return _recorded(job, done.record)
    expected = _expected(job, jobs, samples)
    if expected is not None:
        rows = _of_ledger(job, expected.ledger, expected.pairs)
        return replace(
            rows, source=expected.source, exact=expected.exact, sampled=expected.sampled, longest=expected.longest
        )
    batch, most = int(job.trainer["global_batch_size"]), _most(job)
    length = int(job.config["data"]["max_length"]) * (2 if job.kind == "dpo" else 1)
    if most:
        return Rows(most, most * batch, most * batch * length, None, "settings" if _wraps(job) else "upper bound")
    counts = [_count(source) for source in job.config["data"]["sources"]]
    if _wraps(job) or any(count is None for count in counts):
        return Rows(None, None, None, None, "unknown")
    rows_seen = round(sum(count or 0 for count in counts) * float(job.trainer["num_train_epochs"]))
    return Rows(math.ceil(rows_seen / batch), rows_seen, rows_seen * length, None, "upper bound")


def _expected(job: Job, jobs: Mapping[str, Job], samples: Samples) -> Expected | None:
    """What the stage's own tokenizer and template make of its data, where both can be had without a download."""
    given, template = nearest_model(job, jobs, lambda hub: fetch_description(hub, download=False))
    if given["folder"] is None or not (Path(given["folder"]) / "tokenizer.json").is_file():
        return None
    local = all(Path(source["path"]).is_absolute() for source in job.config["data"]["sources"])
    if not local and not (Path(job.run_dir) / ROWS).is_dir():
        return None
    from posttrain.stages.expected import expected_rows  # it imports transformers

    return expected_rows(job, given, template, samples)


def _recorded(job: Job, record: Record) -> Rows:
    """What a finished stage went through."""
    assert record.ledger is not None
    told, pairs = record.summary["metrics"].get("pairs"), None
    if told is not None:
        total = record.ledger["total"]
        times = total["rows_seen"] / max(total["rows"]["trained"] + total["rows"]["left_out"], 1)
        pairs = (round(told["plain_tokens"] * times), round(told["saved_tokens"] * times))
    rows = _of_ledger(job, record.ledger, pairs)
    steps = record.summary["metrics"].get("steps")
    return replace(rows, steps=rows.steps if steps is None else steps)


def _of_ledger(job: Job, ledger: Mapping[str, Any], pairs: tuple[int, int] | None) -> Rows:
    """All epochs by the ledger of one; where a step takes packed rows, their number."""
    total, batch, most = ledger["total"], int(job.trainer["global_batch_size"]), _most(job)
    epoch = supervised = 0.0
    for source in ledger["sources"].values():
        trained = source["tokens"]["trained"]
        epoch += source["times"] * (trained + source["tokens"]["masked"])
        supervised += source["times"] * trained
    share, seen = supervised / epoch if epoch else 0.0, total["rows_seen"]
    shared = None
    if pairs is not None:
        (epoch, of_prefix) = pairs
        shared = of_prefix / epoch if epoch else 0.0
    length, epochs = int(job.config["data"]["max_length"]), float(job.trainer["num_train_epochs"])
    if _wraps(job):
        tokens = most * batch * length if most else round(epoch * epochs)
        rows = most * batch if most else math.ceil(tokens / length)
    else:
        rows = most * batch if most else round(seen * epochs)
        tokens = round(epoch * rows / seen) if seen else 0
    return Rows(
        steps=most or math.ceil(rows / batch),
        rows=rows,
        tokens=tokens,
        dropped=sum(total["rows"]["dropped"].values()),
        source="record",
        exact=True,
        rows_in=total["rows"]["in"] - total["rows"]["split"] + total["rows"]["made"],
        reasons=dict(total["rows"]["dropped"]),
        supervised=round(tokens * share) if pairs is None else None,
        shared=None if shared is None else round(tokens * shared),
    )


def _wraps(job: Job) -> bool:
    packing = job.config["data"].get("packing")
    return packing == "wrap" or (packing is None and job.kind == "pretrain")


def _most(job: Job) -> int:
    return max(int(job.trainer.get("max_steps") or 0), 0)


def _count(source: Mapping[str, Any]) -> int | None:
    """Rows that a source gives an epoch: exact where the recipe says, else lines of its local JSON Lines."""
    if source.get("rows"):
        return int(source["rows"])
    path = Path(source["path"])
    if not path.is_absolute() or not path.exists() or source.get("select"):
        return None
    files = source_files(path)
    if any(file.suffix != ".jsonl" for file in files) or sum(file.stat().st_size for file in files) > _COUNTED:
        return None
    lines = sum(sum(1 for line in file.read_bytes().splitlines() if line.strip()) for file in files)
    weight = source.get("weight")
    return round(lines * (1.0 if weight is None else float(weight)))
