"""`posttrain init`: a commented recipe from four answers: a model, data, a task, and where to write it."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from posttrain.artifact import write_atomically
from posttrain.draft.data_facts import DataFacts, read_data
from posttrain.draft.model_facts import read_model
from posttrain.draft.write import TASKS, Answers, recipe_text
from posttrain.errors import UserError
from posttrain.recipe.load import load_recipe


@dataclass(frozen=True)
class Draft:
    """A recipe that was written, and why it is as it is."""

    path: Path
    chosen: tuple[str, ...]
    """One line for each thing that was found or chosen."""


def init_recipe(model: str, data: list[str], task: str, out: Path) -> Draft:
    """Writes a recipe; everything it names is looked at first.

    Args:
        model: folder or hub id.
        data: files, folders or hub ids (`owner/name` or `owner/name:split`), conversations before pairs.
        task: `sft`, `dpo` or `both`.
        out: new YAML file; its stem names the recipe.

    Raises:
        UserError: an answer cannot be used, or `out` exists.
    """
    name = _name(out)
    wants = _wants(task, data)
    known = read_model(model, out.absolute().parent)
    conversations, pairs = ((read_data(wants[want], want, out.absolute().parent) if want in wants else None)
                            for want in ("chat", "pair"))  # fmt: skip
    answers = Answers(name, known, conversations, pairs)
    text = recipe_text(answers)
    with tempfile.TemporaryDirectory() as scratch:  # nothing that does not load gets the final name
        probe = Path(scratch) / out.name
        probe.write_text(text, encoding="utf-8")
        load_recipe(probe)
    write_atomically(out, text)
    return Draft(out, (*known.chosen, answers.plan.why, *_told(conversations), *_told(pairs)))


def _name(out: Path) -> str:
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out {out}", "is no YAML file", "name it e.g. my-model.yaml")
    if out.exists():
        raise UserError(f"--out {out}", "exists already, and is not overwritten", "name another file, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}", "its folder does not exist", "make the folder first")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", out.stem):
        raise UserError(f"--out {out}", "its name cannot name a recipe", "use letters, digits, `.`, `_`, `-`")
    return out.stem


def _wants(task: str, data: list[str]) -> dict[str, str]:
    """What each kind of rows is read from: `chat`, `pair`."""
    if task not in TASKS:
        raise UserError(f"--task {task}", "is no task", f"there are: {', '.join(TASKS)}")
    kinds = TASKS[task]
    if len(data) > len(kinds):
        raise UserError("--data", f"is given {len(data)} times", f"--task {task} takes {len(kinds)}")
    if not data:
        raise UserError("--data", "is missing", "give a file, a folder, or owner/name of the hub")
    if len(data) < len(kinds) and not Path(data[0]).exists():
        raise UserError(f"--data {data[0]}", "is one dataset of the hub, for two tasks", "give --data twice")
    return dict(zip(kinds, data * len(kinds), strict=False))


def _told(data: DataFacts | None) -> list[str]:
    return [] if data is None else [data.why]
