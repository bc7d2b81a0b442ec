"""What training stages leave in their folder, by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from posttrain.artifact import write_atomically
from posttrain.data.ledger import Ledger, render_ledger

_MODEL = {".json", ".safetensors", ".jinja", ".model", ".txt"}
_LOGS = {"job.json", "log.txt", "stage.json"}
_MORE = {"data_order.npz", "metrics.jsonl"}


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


PROBE_ROWS = "probe_rows.json"
_PROBES, _PROBE_LENGTH = 32, 256


def write_probe_rows(folder: Path, rows: Sequence[Iterable[int]]) -> None:
    """Keeps some rows of token ids, spread over the data, on which later hand-offs are compared."""
    every = max(1, len(rows) // _PROBES)
    chosen = [[int(token) for token in row][:_PROBE_LENGTH] for row in rows[::every][:_PROBES]]
    write_atomically(folder / PROBE_ROWS, json.dumps(chosen))


def read_probe_rows(folder: Path) -> list[list[int]]:
    """Reads the rows back; each has at least two tokens."""
    return [row for row in json.loads((folder / PROBE_ROWS).read_text(encoding="utf-8")) if len(row) > 1]
