"""The errors people see: where it is, what was found, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self


class PosttrainError(Exception):
    """An error with a place, a finding and a remedy; our own fault unless a subclass says otherwise.

    Args:
        where: file, key path, row, stage: the narrowest place that is known.
        found: what was found there.
        todo: what the reader should do next.
    """

    exit_code = 1

    def __init__(self, where: str, found: str, todo: str = "") -> None:
        self.where, self.found, self.todo = where, found, todo
        super().__init__(where, found, todo)

    def __str__(self) -> str:
        head = f"{self.where}: {self.found}"
        return f"{head}\n  -> {self.todo}" if self.todo else head

    def at(self, where: str) -> Self:
        """The same error seen from further out: a row that holds the message, a key that names the folder."""
        return type(self)(where, f"{self.where}: {self.found}", self.todo)


class UserError(PosttrainError):
    """The user's input is at fault: exit code 2, no traceback, nothing half-written."""

    exit_code = 2


class RecipeError(UserError):
    """One problem of a recipe; `RecipeErrors` carries all of a file."""


class RecipeErrors(UserError):
    """Every problem of a recipe, or of the files that it names, at once.

    Args:
        problems: at least one, in the order of their lines.
    """

    def __init__(self, problems: Sequence[UserError]) -> None:
        self.problems = problems
        first = problems[0]
        super().__init__(first.where, first.found, first.todo)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class DataError(UserError):
    """A data file or row cannot be used."""


class ChatError(UserError):
    """Tokenizer, template, generation config and weights do not agree."""


class CheckpointError(UserError):
    """A model or adapter folder cannot be used."""


class StageError(PosttrainError):
    """A stage failed, or did not get what the recipe asked for (device, dtype, trainable parameters)."""


class Interrupted(PosttrainError):
    """The run was asked to stop; a checkpoint was saved where one could be."""

    exit_code = 130


def missing_extra(module: str, extra: str) -> UserError:
    """Builds the one-line error for an optional dependency that is not installed."""
    return UserError(module, "is not installed", f"install it with: pip install 'posttrain[{extra}]'")
