"""What a stage reads, by content: models, data and templates become digests and commits, never paths."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from posttrain.artifact import Artifact, DigestCache, fingerprint, write_atomically
from posttrain.data.files import source_files
from posttrain.data.read import locate
from posttrain.errors import CheckpointError, UserError
from posttrain.models.files import files_of_model
from posttrain.models.hub import HubId, StageRef, Unreachable, parse_reference, resolve

JOB, LOG = "job.json", "log.txt"
UNKNOWN = "?"
"""Stands for the commit of a hub id that was left open; no run is ever planned with it."""


@dataclass(frozen=True)
class Input:
    """One input of a stage: what it is (identity) and where it lies (job)."""

    identity: dict[str, Any]
    job: dict[str, Any]


class Pins:
    """Commits that a run's unpinned hub ids were resolved to, once; the file lies in the run folder.

    Attributes:
        unreachable: what could not be resolved without a network, as "kind id"; only with `leave_open`.
    """

    def __init__(self, path: Path, leave_open: bool = False) -> None:
        self.path, self.leave_open = path, leave_open
        self.unreachable: list[str] = []
        self._known: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self._used: dict[str, str] = {}

    def commit(self, hub: HubId, kind: Literal["model", "dataset"]) -> str:
        """Returns the commit of a hub id: the pinned one, else what it means now."""
        key = f"{kind}:{hub}"
        try:
            self._used[key] = self._known.get(key) or resolve(hub, kind)
        except Unreachable:
            if not self.leave_open:
                raise
            self.unreachable += [f"{kind} {hub}"] if f"{kind} {hub}" not in self.unreachable else []
            return UNKNOWN
        return self._used[key]

    def save(self) -> None:
        """Remembers what was resolved; the run folder must exist."""
        if self._used.keys() - self._known.keys():
            write_atomically(self.path, json.dumps({**self._known, **self._used}, indent=2, sort_keys=True))


@dataclass(frozen=True)
class Inputs:
    """Resolves the references of one recipe.

    Attributes:
        recipe_dir: folder that relative paths of the recipe start from.
        run_dir: where `@stage` lies.
        fingerprints: of the stages described so far, by name.
    """

    recipe_dir: Path
    run_dir: Path
    cache: DigestCache
    pins: Pins
    fingerprints: dict[str, str]

    def model(self, ref: str, where: str) -> Input:
        """Describes a model, tokenizer or report: `@stage`, folder, or hub id.

        Raises:
            UserError: a folder that does not exist, or a hub id that cannot be resolved.
            CheckpointError: a folder that holds no model or adapter.
        """
        try:
            found = parse_reference(ref)
        except UserError as error:
            raise UserError(where, f"{error.where!r} {error.found}", error.todo) from None
        if isinstance(found, StageRef):
            if found.name not in self.fingerprints:
                raise UserError(where, f"{ref} is no stage before this one", "refer to a stage that runs earlier")
            folder = self.run_dir / found.name
            identity = {"stage": self.fingerprints[found.name]}
            return Input(identity, {"ref": ref, "folder": str(folder.absolute()), "revision": None})
        if isinstance(found, HubId):
            commit = self._commit(found, "model", where)
            return Input({"hub": found.id, "commit": commit}, {"ref": ref, "folder": None, "revision": commit})
        folder = self.path(found.path, where)
        if not folder.is_dir():
            raise CheckpointError(where, f"{folder} is a file", "name the folder of the model")
        with _readable(where):
            return Input(self._folder(folder, where), {"ref": ref, "folder": str(folder), "revision": None})

    def source(self, source: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Describes one data source, given as its dumped schema: returns (identity, settings for the job).

        In the job a path is absolute and a hub id carries its commit.
        """
        shown = {key: value for key, value in source.items() if key not in ("path", "revision") and value is not None}
        if "rows" not in shown:
            shown.setdefault("weight", 1.0)
        try:
            found = locate(source["path"], self.recipe_dir)
        except UserError as error:
            raise UserError(where, f"{error.where!r} is {error.found}", error.todo) from None
        if isinstance(found, str):
            commit = self._commit(HubId(found, source.get("revision")), "dataset", where)
            return {**shown, "hub": found, "commit": commit}, {**source, "revision": commit}
        path = self.path(found, where)
        with _readable(where):
            return {**shown, "content": self._rows(path)}, {**source, "path": str(path)}

    def path(self, path: Path, where: str) -> Path:
        """Returns a recipe's path made absolute; raises UserError when nothing is there."""
        found = (self.recipe_dir / path.expanduser()).resolve()
        if not found.exists():
            todo = f"paths start from the recipe's folder, {self.recipe_dir}; a hub id is written owner/name"
            raise UserError(where, f"no file or folder {found}", todo)
        return found

    def _commit(self, hub: HubId, kind: Literal["model", "dataset"], where: str) -> str:
        try:
            return self.pins.commit(hub, kind)
        except UserError as error:  # of the same kind, with the place in the recipe before it
            raise error.at(where) from None

    def _folder(self, folder: Path, where: str) -> dict[str, Any]:
        """Identity of a model or adapter folder: its files, and what its own record or base adds."""
        files = files_of_model(folder)
        if not any(path.suffix in (".json", ".model") for path in files):
            raise CheckpointError(where, f"{folder} holds no model", "name a folder with config.json or an adapter's")
        identity: dict[str, Any] = {"content": self.cache.tree(folder, files)}
        artifact = Artifact.read(folder)
        if artifact is not None:  # an adapter of ours stands on a base that its files do not hold
            identity["artifact"] = artifact.record.fingerprint
        return identity

    def _rows(self, path: Path) -> str:
        """Digest of the data files of a path: their bytes in order and their suffixes, never their names."""
        return fingerprint([["".join(file.suffixes), self.cache.digest(file)] for file in source_files(path)])


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """Turns what the system refuses to read into the user's error."""
    try:
        yield
    except OSError as error:
        found = f"{error.filename} cannot be read ({error.strerror})"
        raise UserError(where, found, "check the file and its permissions") from None
