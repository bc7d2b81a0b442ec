"""Any recipe's stages, end to end on the CPU: a tiny twin of its model, a few rows, the same code.

Nothing should be met for the first time on a rented GPU: names of modules and columns, templates,
methods, hand-offs and merges are those of the recipe; sizes, precision and data are not, and that is said.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.errors import UserError
from posttrain.recipe.load import load_recipe
from posttrain.rehearse.substitute import rehearsal_of

if TYPE_CHECKING:
    from posttrain.console import Console
    from posttrain.recipe.load import LoadedRecipe

MARK, RUNS = ".rehearsal", "runs"
"""Hidden file in a rehearsal's folder: the next one may replace it; and where its run goes."""


def rehearse(loaded: LoadedRecipe, out_dir: Path, console: Console) -> Path:
    """Runs a rehearsal of a recipe below `out_dir` and returns its run folder.

    Raises:
        UserError: as `prepare`.
        StageError: a stage failed; what it says holds for the recipe too.
    """
    from posttrain.pipeline.run import Request, run_recipe

    rehearsal, notes = prepare(loaded, out_dir)
    for note in notes:
        console.note(f"substituted: {note}")
    run_recipe(rehearsal, rehearsal.folder / RUNS, Request(), console)
    console.note("all stages fit together; whether they fit into memory, and what they teach, this does not show")
    return rehearsal.folder / RUNS / rehearsal.recipe.name


def prepare(loaded: LoadedRecipe, out_dir: Path) -> tuple[LoadedRecipe, list[str]]:
    """Writes `recipe.yaml`, `twins/` and `data/` of a rehearsal; returns it, loaded, and what was substituted.

    The rehearsal is a recipe like any other: `posttrain run OUT_DIR/recipe.yaml` runs it again.

    Raises:
        UserError: `out_dir` holds something else, or a model of the recipe cannot have a twin.
    """
    out_dir = out_dir.resolve()
    _empty(out_dir)
    text, notes = rehearsal_of(loaded, out_dir)
    path = out_dir / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path), notes


def _empty(folder: Path) -> None:
    """Makes an empty folder, removing an earlier rehearsal and nothing else."""
    if (folder / MARK).is_file():
        shutil.rmtree(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(str(folder), "is not empty, and no rehearsal", "name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
