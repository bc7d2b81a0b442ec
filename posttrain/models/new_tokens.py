"""`posttrain_tokens.json`: rows of a model folder that have first values and have yet to be trained. No torch here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from posttrain.artifact import write_atomically
from posttrain.errors import CheckpointError
from posttrain.models.files import read_json

NEW_TOKENS = "posttrain_tokens.json"


@dataclass(frozen=True)
class NewToken:
    """A token whose row was never trained."""

    token: str
    id: int
    begins_as: tuple[str, ...]
    """Tokens the mean of whose rows it begins as; `from` in the file."""


def read_new_tokens(folder: Path) -> tuple[NewToken, ...]:
    """Reads which rows of a model folder are new, by id; () where the folder says nothing.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / NEW_TOKENS
    if not path.is_file():
        return ()
    try:
        return tuple(
            NewToken(entry["token"], int(entry["id"]), tuple(entry["from"])) for entry in read_json(path)["new"]
        )
    except (LookupError, TypeError, ValueError):
        raise CheckpointError(str(path), "is damaged", "run posttrain doctor with --fix on the source again") from None


def write_new_tokens(folder: Path, tokens: Iterable[NewToken]) -> None:
    """Writes which rows of a model folder are new, by id."""
    ordered = sorted(tokens, key=lambda token: token.id)
    listing = {"new": [{"token": new.token, "id": new.id, "from": list(new.begins_as)} for new in ordered]}
    write_atomically(folder / NEW_TOKENS, json.dumps(listing, indent=2, ensure_ascii=False) + "\n")
