"""What lies in the run folders: listing it, and removing what no run needs any more."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain.artifact import Artifact
from posttrain.errors import UserError
from posttrain.launch import locked
from posttrain.pipeline.plan import CHECKPOINTS, has_checkpoints
from posttrain.pipeline.run import ASIDE
from posttrain.stages.sources import ROWS

_PARTIAL = ".partial"


@dataclass(frozen=True)
class StageState:
    """One stage of a run, as its folder shows it."""

    name: str
    state: str
    """`done`, `failed` (a gate), `resumable`, or `begun`."""
    headline: str
    bytes: int


@dataclass(frozen=True)
class RunState:
    """One run folder."""

    folder: Path
    stages: tuple[StageState, ...]
    """In the order in which they finished; unfinished ones last."""
    bytes: int


@dataclass(frozen=True)
class Removable:
    """Something that no run needs any more."""

    path: Path
    why: str
    bytes: int


def list_runs(runs_dir: Path) -> list[RunState]:
    """Returns every run below a folder, by name; raises UserError when there is no such folder."""
    if not runs_dir.is_dir():
        raise UserError(str(runs_dir), "no such folder", "name another with --runs-dir")
    folders = sorted(path for path in runs_dir.iterdir() if path.is_dir() and not path.name.startswith("."))
    return [RunState(folder, tuple(_stages(folder)), size(folder)) for folder in folders]


def removable(run_dir: Path) -> list[Removable]:
    """Lists what may go: outputs moved aside, checkpoints of finished stages, leftovers beside finished ones.

    The checkpoints of an unfinished stage stay: its next run resumes from them, and reads the tokenised rows,
    which go where every stage is finished.
    """
    found = [(path, "moved aside by --redo") for path in sorted((run_dir / ASIDE).glob("*"))]
    folders = sorted(path for path in run_dir.iterdir() if path.is_dir())
    resumable = [path for path in folders if path.name.endswith(_PARTIAL)]
    if (run_dir / ROWS).is_dir() and all((run_dir / path.name.removesuffix(_PARTIAL)).is_dir() for path in resumable):
        found.append((run_dir / ROWS, "tokenised rows of finished stages"))
    for folder in folders:
        finished = not folder.name.endswith(_PARTIAL) and Artifact.read(folder) is not None
        if finished and (folder / CHECKPOINTS).is_dir():
            found.append((folder / CHECKPOINTS, "checkpoints of a finished stage"))
        elif folder.name.endswith(_PARTIAL) and (run_dir / folder.name.removesuffix(_PARTIAL)).is_dir():
            found.append((folder, "left beside its finished stage"))
    return [Removable(path, why, size(path)) for path, why in found]


def remove(run_dir: Path, items: list[Removable]) -> None:
    """Removes what `removable` listed; raises UserError while a run uses the folder."""
    with locked(run_dir):
        for item in items:
            if item.path.is_dir() and not item.path.is_symlink():
                shutil.rmtree(item.path)
            else:
                item.path.unlink()


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder (links not followed)."""
    paths = [path] if path.is_file() else path.rglob("*")
    return sum(inner.lstat().st_size for inner in paths if inner.is_file() and not inner.is_symlink())


def spell_bytes(count: float) -> str:
    """Spells a size: `512 B`, `3.4 MB`, `14.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _stages(run_dir: Path) -> Iterator[StageState]:
    finished, others = [], []
    for folder in sorted(path for path in run_dir.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if folder.name.endswith(_PARTIAL):
            state = "resumable" if has_checkpoints(folder) else "begun"
            others.append(StageState(folder.name.removesuffix(_PARTIAL), state, "", size(folder)))
        elif (artifact := Artifact.read(folder)) is not None:
            summary = artifact.record.summary
            state = "failed" if summary.get("failed") else "done"
            told = StageState(folder.name, state, summary.get("headline", ""), size(folder))
            finished.append((artifact.record.provenance.get("finished", ""), told))
    yield from (state for _, state in sorted(finished, key=lambda pair: pair[0]))
    yield from others
