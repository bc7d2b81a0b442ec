"""Recipes, launch configs and chat templates that come with the package, by bare name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from posttrain.errors import UserError

Kind = Literal["recipes", "recipes/accelerate", "chat_templates"]

_SUFFIX = {"recipes": ".yaml", "recipes/accelerate": ".yaml", "chat_templates": ".jinja"}
_PACKAGE = Path(__file__).resolve().parent.parent


def bundled_folder(kind: Kind) -> Path:
    """Folder of the bundled files: inside an installed package, beside it in a checkout."""
    inside = _PACKAGE / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def list_bundled(kind: Kind) -> list[str]:
    """Bare names of the bundled files, sorted."""
    return sorted(path.stem for path in bundled_folder(kind).glob(f"*{_SUFFIX[kind]}"))


def find_bundled(kind: Kind, name: str) -> Path:
    """Path of a bundled file.

    Raises:
        UserError: there is none of that name; the nearest names are suggested.
    """
    path = bundled_folder(kind) / f"{name}{_SUFFIX[kind]}"
    if "/" not in name and path.is_file():
        return path
    names = list_bundled(kind)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    todo = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(names) or 'none'}"
    raise UserError(name, f"no file, and not among the bundled {kind.replace('_', ' ')}", todo)
