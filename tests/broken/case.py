"""What a case of broken input is, and the ways to break a whole project."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from broken.whole import RECIPE


@dataclass(frozen=True)
class Case:
    """One broken project.

    Attributes:
        where: how the one error begins; files are relative to the project.
        found: a part of what it says.
    """

    name: str
    break_it: Callable[[Path], None]
    where: str
    found: str


def edited(name: str, old: str, new: str, key: str, found: str) -> Case:
    """A case of the recipe alone; the error stands on the line that `#!` marks in what is put in, or on its first."""
    assert RECIPE.count(old) == 1, f"{old!r} does not stand in the recipe exactly once"
    text = RECIPE.replace(old, new)
    at = text.index("#!") if "#!" in new else text.index(new)
    line = text.count("\n", 0, at) + 1
    place = f"recipe.yaml:{line}  {key}: " if key else f"recipe.yaml:{line}:"
    return Case(name, lambda folder: _write(folder / "recipe.yaml", text), place, found)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
