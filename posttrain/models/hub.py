"""What a recipe's model or data reference means, and which commit of a hub repository it is.

Nothing here imports torch: a plan resolves references before a stage exists.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.errors import CheckpointError, UserError

RepoKind = Literal["model", "dataset"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[^\s@]+))?", re.ASCII)
_FILE_SUFFIXES = {".json", ".jsonl", ".gz", ".parquet", ".csv", ".tsv", ".txt", ".safetensors", ".yaml", ".yml"}
_TIMEOUT = 10.0  # seconds for one question to the hub
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*"]
# Folders hold other formats of the same weights (original/, onnx/, gguf/), `consolidated` a second copy.
_UNWANTED = ["*/*", "consolidated*", "*.py", "*.bin", "*.pt", "*.pth", "*.pkl"]


class Unreachable(UserError):
    """A hub id that only a network could turn into a commit, and there is none."""


@dataclass(frozen=True)
class LocalPath:
    """A file or folder of this machine."""

    path: Path
    """As written, `~` expanded; relative to the recipe's folder."""


@dataclass(frozen=True)
class HubId:
    """A repository of the Hugging Face hub."""

    id: str
    """`owner/name`."""
    revision: str | None = None
    """Commit, tag or branch."""

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


@dataclass(frozen=True)
class StageRef:
    """The output of an earlier stage."""

    name: str


def parse_reference(text: str) -> LocalPath | HubId | StageRef:
    """Reads `@stage`, a path (`./x`, `../x`, `/x`, `~/x`, or a data file's name) or `owner/name[@revision]`.

    Raises:
        UserError: it is none of the three.
    """
    if text.startswith("@"):
        return StageRef(text[1:])
    if text.startswith(("./", "../", "/", "~")) or text in (".", "..") or Path(text).suffix in _FILE_SUFFIXES:
        return LocalPath(Path(text).expanduser())
    if match := _HUB_ID.fullmatch(text):
        return HubId(match["id"], match["revision"])
    raise UserError(
        text or "(empty)",
        "is neither a stage, a path nor a hub id",
        "write @stage, ./folder, or owner/name@revision",
    )


def resolve(hub: HubId, kind: RepoKind = "model") -> str:
    """Returns the commit that a hub id means now; without a network, the one in the local cache.

    A revision that already is a commit is returned as it stands, without asking anyone.

    Raises:
        UserError: no such repository or revision, or no access.
        Unreachable: neither network nor cached copy.
    """
    if hub.revision and _COMMIT.fullmatch(hub.revision):
        return hub.revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        commit = HfApi().repo_info(hub.id, revision=hub.revision, repo_type=kind, timeout=_TIMEOUT).sha
    except GatedRepoError:
        todo = f"accept its terms on the hub with your account, then `hf auth login` ({kind} {hub.id})"
        raise UserError(str(hub), "the repository is gated and you have no access", todo) from None
    except RevisionNotFoundError:
        raise UserError(str(hub), "the repository has no such revision", "name a commit, tag or branch of it") from None
    except RepositoryNotFoundError:
        todo = "check the spelling; a private repository needs `hf auth login`; a local folder is written ./like/this"
        raise UserError(str(hub), f"the hub has no such {kind}, or you may not see it", todo) from None
    except (OfflineModeIsEnabled, HTTPError):
        commit = cached_commit(hub, kind)  # offline: what was resolved last serves
    if commit is None:
        download = f"hf download {hub.id}" + (" --repo-type dataset" if kind == "dataset" else "")
        todo = f"download it once with a network (`{download}`), or pin a commit: {hub.id}@<40 hex digits>"
        raise Unreachable(str(hub), "cannot be resolved to a commit: no network, and no copy in the cache", todo)
    return commit


def cached_commit(hub: HubId, kind: RepoKind = "model") -> str | None:
    """Returns the commit that the local hub cache holds for a hub id's revision (`main` by default), or None."""
    if hub.revision and _COMMIT.fullmatch(hub.revision):
        return hub.revision if _snapshot(hub.id, hub.revision, kind).is_dir() else None
    reference = _cache_folder(hub.id, kind) / "refs" / (hub.revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""
    return commit if _COMMIT.fullmatch(commit) and _snapshot(hub.id, commit, kind).is_dir() else None


def fetch_model(hub_id: str, commit: str, weights: bool = True) -> Path:
    """Downloads a model's config, tokenizer and safetensors at a commit, and returns the folder in the cache.

    Code and pickled weights are never fetched.

    Args:
        weights: whether the safetensors are wanted too; a tokenizer alone needs none.

    Raises:
        UserError: it cannot be downloaded and is not in the cache.
        CheckpointError: the repository has no safetensors.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    where = f"{hub_id}@{commit}"
    try:
        wanted = [name for name in _WANTED if weights or "safetensors" not in name]
        folder = Path(snapshot_download(hub_id, revision=commit, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except (LocalEntryNotFoundError, HTTPError) as error:
        todo = (
            f"check the network and your access, or download it elsewhere: `hf download {hub_id} --revision {commit}`"
        )
        raise UserError(where, f"cannot be downloaded ({type(error).__name__})", todo) from None
    if weights and not any(folder.glob("*.safetensors")):
        todo = "convert the checkpoint to safetensors; pickled weights can run code and are not read"
        raise CheckpointError(where, "has no *.safetensors file", todo)
    return folder


def fetch_description(hub: HubId, download: bool = True) -> Path | None:
    """Returns a folder with a model's config and tokenizer but no weights, or None where they cannot be had.

    The cache is asked first, then (with `download`) the hub; a few megabytes may be downloaded.
    """
    commit = cached_commit(hub)
    if commit and (_snapshot(hub.id, commit, "model") / "config.json").is_file():
        return _snapshot(hub.id, commit, "model")
    if not download:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        wanted, unwanted = [name for name in _WANTED if "safetensors" not in name], _UNWANTED
        folder = snapshot_download(hub.id, revision=resolve(hub), allow_patterns=wanted, ignore_patterns=unwanted)
    except (UserError, HTTPError, LocalEntryNotFoundError):
        return None  # unknown, gated or offline: the caller knows what to do without
    return Path(folder) if (Path(folder) / "config.json").is_file() else None


def _cache_folder(hub_id: str, kind: RepoKind) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}s--{hub_id.replace('/', '--')}"


def _snapshot(hub_id: str, commit: str, kind: RepoKind) -> Path:
    return _cache_folder(hub_id, kind) / "snapshots" / commit
