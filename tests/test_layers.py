"""Imports go one way (docs/architecture.md): the house is read with `ast`, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "posttrain"

# Lowest first. Rooms of a frozenset stand side by side and may not import each other;
# rooms of a tuple share a floor and may.
FLOORS: list[frozenset[str] | tuple[str, ...]] = [
    ("errors",),
    frozenset({"recipe", "artifact", "console"}),
    ("merging",),
    ("data",),
    frozenset({"chat", "models"}),
    ("pretraining",),
    ("training",),
    frozenset({"certify", "evaluation", "report", "estimate", "doctor"}),
    ("stages",),
    ("pipeline", "launch", "stage_process", "torchrun", "runs", "rehearse", "draft", "slurm"),
    ("cli",),
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SCHEMA_READERS = {"recipe", "stages", "pipeline", "launch", "runs", "rehearse", "cli"}


def imports_of(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) for every `posttrain.…` that a module imports, inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("posttrain."))
        elif isinstance(node, ast.ImportFrom) and node.module == "posttrain":
            yield from ((node.lineno, f"posttrain.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("posttrain."):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def complaints(room: str, source: str) -> list[str]:
    """Says which imports of a module in `room` go up, sideways within a brace, or to the schema."""
    found = []
    for line, name in imports_of(source):
        other = name.split(".")[1]
        if other not in FLOOR_OF:
            if not other.startswith("__"):
                found.append(f"{line}: {name} is on no floor")
        elif FLOOR_OF[other] > FLOOR_OF[room]:
            found.append(f"{line}: {room} imports {name}, which stands above it")
        elif other != room and FLOOR_OF[other] == FLOOR_OF[room] and isinstance(FLOORS[FLOOR_OF[room]], frozenset):
            found.append(f"{line}: {room} imports its neighbour {name}")
        if name.startswith("posttrain.recipe.schema") and room not in SCHEMA_READERS:
            found.append(f"{line}: {room} touches the schema; library functions take plain values")
    return found


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or not path.name.startswith("__"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_stands_on_a_floor() -> None:
    assert {room_of(path) for path in modules()} <= FLOOR_OF.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    assert complaints(room_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source", "word"),
    [
        ("data", "from posttrain.training import sft", "above"),
        ("data", "def f():\n    import posttrain.stages.sft", "above"),
        ("errors", "from posttrain import artifact", "above"),
        ("chat", "from posttrain.models.hub import resolve", "neighbour"),
        ("certify", "from posttrain.evaluation import batches", "neighbour"),
        ("models", "from posttrain.recipe.schema import Source", "schema"),
        ("models", "from posttrain.attic import x", "no floor"),
    ],
)
def test_the_check_finds(room: str, source: str, word: str) -> None:
    (complaint,) = complaints(room, source)
    assert word in complaint


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("chat", "from posttrain.recipe.bundled import template_path"),
        ("rehearse", "from posttrain import pipeline"),
        ("pretraining", "from posttrain.pretraining.fit import fit"),
        ("stages", "from posttrain.recipe.schema import Runtime\nfrom posttrain import __version__"),
    ],
)
def test_the_check_allows(room: str, source: str) -> None:
    assert complaints(room, source) == []
