"""The deterministic data order: which rows make which optimizer step, and a log that answers it later."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from posttrain.pretraining.mixture import Share, epoch_rows

FILE = "data_order.npz"


@dataclass(frozen=True)
class Order:
    """The rows of every optimizer step of a run, fixed by seed and data alone.

    `items` is [N, 2] int64 (source, row within the source) over all epochs; step s reads
    `items[offsets[s]:offsets[s + 1]]`.
    """

    items: np.ndarray
    offsets: np.ndarray

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return len(self.offsets) - 1

    def of_step(self, step: int) -> np.ndarray:
        """Rows of a step (counted from 0), [n, 2] int64."""
        return self.items[self.offsets[step] : self.offsets[step + 1]]


def draw_items(shares: list[Share], seed: int, epochs: float) -> np.ndarray:
    """Draws the rows of `epochs` epochs (a fraction takes the first part of the last one), [N, 2] int64."""
    per_epoch = sum(share.wanted for share in shares if share.available)
    total = round(per_epoch * epochs)
    parts = [epoch_rows(shares, seed, epoch) for epoch in range(-(-total // per_epoch) if per_epoch else 0)]
    return np.concatenate(parts)[:total] if parts else np.empty((0, 2), dtype=np.int64)


def plan_steps(rows: int, global_batch_size: int, max_steps: int) -> np.ndarray:
    """Cuts `rows` rows into steps; the last may be smaller, and `max_steps` (when > 0) ends the run early.

    Returns:
        [steps + 1] int64 offsets.
    """
    offsets = np.arange(0, rows, global_batch_size, dtype=np.int64)
    offsets = np.append(offsets, rows)
    return offsets[: max_steps + 1] if max_steps > 0 else offsets


def save_order(folder: Path, order: Order, sources: list[str], files: list[str], places: list[np.ndarray]) -> None:
    """Writes the order beside the model, so that step -> rows can be looked up for good.

    Args:
        sources: names, in the order of `items`' first column.
        files: every data file that was read.
        places: per source [rows, 2] int64: index into `files`, row as the file counts them.
    """
    temporary = folder / f".{FILE}.tmp.npz"
    starts = np.cumsum([0, *(len(place) for place in places)], dtype=np.int64)
    table = np.concatenate(places) if places else np.empty((0, 2), dtype=np.int64)
    np.savez_compressed(
        temporary,
        items=order.items,
        offsets=order.offsets,
        sources=np.asarray(sources),
        files=np.asarray(files),
        starts=starts,
        places=table,
    )
    os.replace(temporary, folder / FILE)


def publish_order(source: Path, target: Path) -> None:
    """Copies the order of a folder into another, its data files under names that tell nothing of this machine.

    A file from the hub is `owner/name@commit/path`; a local one has its name, with as many of the folders above it as
    keep it apart from the others.
    """
    with np.load(source / FILE, allow_pickle=False) as saved:
        arrays = dict(saved)
    arrays["files"] = np.asarray(_public_names([str(file) for file in arrays["files"]]))
    temporary = target / f".{FILE}.tmp.npz"
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, target / FILE)


def _public_names(files: list[str]) -> list[str]:
    parts = [PurePath(file).parts for file in files]
    found = []
    for own in parts:
        cached = next((at for at, part in enumerate(own) if part.startswith("datasets--")), None)
        if cached is not None and own[cached + 1 : cached + 2] == ("snapshots",):
            name = own[cached].removeprefix("datasets--").replace("--", "/", 1)
            found.append(f"{name}@{'/'.join(own[cached + 2 :])}")
            continue
        enough = (n for n in range(1, len(own)) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        found.append("/".join(own[-next(enough, len(own)) :]))
    return found


def rows_of_step(folder: Path, step: int) -> list[tuple[str, str, int]]:
    """Looks up which rows an optimizer step (counted from 1, as metrics do) was made of.

    Returns:
        (source's name, file, row as a person finds it in the file), in the order of training.

    Raises:
        IndexError: no such step.
    """
    with np.load(folder / FILE, allow_pickle=False) as saved:
        offsets, sources, files = saved["offsets"], saved["sources"], saved["files"]
        if not 1 <= step < len(offsets):
            raise IndexError(f"step {step} of a run of {len(offsets) - 1} steps")
        items = saved["items"][offsets[step - 1] : offsets[step]]
        places = saved["places"][saved["starts"][items[:, 0]] + items[:, 1]]
    return [
        (str(sources[source]), str(files[file]), int(row))
        for (source, _), (file, row) in zip(items.tolist(), places.tolist(), strict=True)
    ]
