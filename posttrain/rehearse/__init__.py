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

MARK = ".rehearsal"
"""Hidden file in a rehearsal's folder: it may be replaced by the next one."""


def rehearse(loaded: LoadedRecipe, out_dir: Path, console: Console) -> Path:
    """Runs a rehearsal of a recipe below `out_dir` and returns its run folder.

    `out_dir` receives `recipe.yaml` (the rehearsal, a recipe like any other), `twins/`, `data/` and the run.

    Raises:
        UserError: `out_dir` holds something else, or a model of the recipe cannot have a twin.
        StageError: a stage failed; what it says holds for the recipe too.
    """
    from posttrain.pipeline.run import Request, run_recipe

    out_dir = out_dir.resolve()
    _empty(out_dir)
    text, notes = rehearsal_of(loaded, out_dir)
    for note in notes:
        console.note(f"substituted: {note}")
    path = out_dir / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    rehearsal = load_recipe(path)
    run_recipe(rehearsal, out_dir / "runs", Request(), console)
    console.note("the rehearsal went through; it proves that the stages fit together, not that they fit into memory")
    return out_dir / "runs" / rehearsal.recipe.name


def _empty(folder: Path) -> None:
    """Makes an empty folder, removing an earlier rehearsal and nothing else."""
    if (folder / MARK).is_file():
        shutil.rmtree(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(str(folder), "is not empty, and no rehearsal", "name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
