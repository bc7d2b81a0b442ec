"""A new folder that exists under its name only when it is complete."""

from __future__ import annotations

import fcntl
import os
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

    One left by a killed process is emptied; when `write` raises, nothing is left.

    Args:
        out: must not exist.
        sources: folders that are read.
        partial: the folder that is written; `OUT.merging` when absent.

    Raises:
        UserError: `out` exists, lies inside a source, or is being written by another process.
        CheckpointError: the folder cannot be made, synced or renamed; and what `write` raises.
    """
    if os.path.lexists(out):  # a link to nothing too: a folder cannot take its place
        raise UserError(str(out), "exists already", "choose another folder, or move it aside")
    for source in sources:
        if out.resolve().is_relative_to(source.resolve()):
            raise UserError(str(out), f"lies inside {source}, which is read", "choose another folder")
    partial = partial or out.with_name(out.name + ".merging")
    with _alone_in(partial, out):
        try:
            report = write(partial)
            if os.path.lexists(out):  # a rename would replace an empty folder
                raise UserError(str(out), "has come to exist meanwhile", "choose another folder, or move it aside")
            with disk_errors(out):
                publish_folder(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return report


@contextmanager
def _alone_in(folder: Path, out: Path) -> Iterator[None]:
    """Makes a folder, or empties it, while no other process can: the lock is on the folder, and ends with us."""
    with disk_errors(out):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(descriptor), folder.stat())
        except (BlockingIOError, FileNotFoundError):
            same = False  # another has it, or has just given it its name
        if not same:
            raise UserError(str(out), "is being written by another process", "wait for it, or choose another folder")
        with disk_errors(out):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield
    finally:
        os.close(descriptor)
