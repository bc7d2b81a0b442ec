"""What training stages leave in their folder, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from posttrain.artifact import write_atomically
from posttrain.certify.probes import Probe, Probes, save_probes
from posttrain.data.ledger import Ledger, render_ledger
from posttrain.stages.prepare import Prepared

T = TypeVar("T")
TRAINING_PROBES = 32
"""Rows that stand in where none were held out, spread over the set."""
_MODEL = {".json", ".safetensors", ".jinja", ".model", ".txt"}
_LOGS = {"job.json", "log.txt", "stage.json"}
_MORE = {"data_order.npz", "metrics.jsonl", "certificate.md"}


def model_files(folder: Path) -> list[str]:
    """Names of the files of a stage's folder that its record hashes: model, tokenizer, order, metrics, snapshots."""
    top = [
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.name not in _LOGS and (path.suffix in _MODEL or path.name in _MORE)
    ]
    below = [str(path.relative_to(folder)) for path in (folder / "snapshots").rglob("*") if path.is_file()]
    return sorted(top + below)


def write_ledger(folder: Path, ledger: Ledger) -> None:
    """Writes the ledger as JSON and prints it to the stage's log."""
    table = ledger.as_dict()
    write_atomically(folder / "ledger.json", json.dumps(table, indent=2, ensure_ascii=False))
    print("\n".join(render_ledger(table)), flush=True)


def write_probes(folder: Path, prepared: Prepared[T], tokens_of: Callable[[T], tuple[np.ndarray, np.ndarray]]) -> None:
    """Keeps the rows on which later hand-offs are compared: those held out, else some that were trained on.

    Args:
        tokens_of: a row -> (ids, labels); labels are those of the ids' own places.
    """
    held = bool(prepared.held_out)
    rows = prepared.held_out if held else prepared.every
    every = 1 if held else max(1, len(rows) // TRAINING_PROBES)
    places = range(0, len(rows), every)
    chosen = [rows[place] for place in (places if held else places[:TRAINING_PROBES])]
    probes = [Probe(ids.tolist(), labels.tolist()) for ids, labels in map(tokens_of, chosen)]
    save_probes(folder, Probes("held_out" if held else "training", probes))
