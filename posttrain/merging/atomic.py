"""A new folder that exists under its name only when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from posttrain.artifact import publish_folder
from posttrain.errors import CheckpointError, UserError

Report = TypeVar("Report")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Says what could not be written, and why, in our words."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be written: {error.strerror}", "make room, rerun") from error


def build_folder(
    out: Path, sources: Iterable[Path], write: Callable[[Path], Report], partial: Path | None = None
) -> Report:
    """Runs `write` on an empty folder beside `out`, and gives that its final name.

    One left by a killed process is replaced; when `write` raises, nothing is left.

    Args:
        out: must not exist.
        sources: folders that are read.
        partial: the folder that is written; `OUT.merging` when absent.

    Raises:
        UserError: `out` exists, or lies inside a source.
        CheckpointError: the folder cannot be made, synced or renamed; and what `write` raises.
    """
    if out.exists():
        raise UserError(str(out), "exists already", "choose another folder, or move it aside")
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise UserError(str(out), f"lies inside {source}, which is read", "choose another folder")
    partial = partial or out.with_name(out.name + ".merging")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with disk_errors(out):
            partial.mkdir(parents=True)
        report = write(partial)
        with disk_errors(out):
            publish_folder(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report
