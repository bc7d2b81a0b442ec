"""Datasets of the Hugging Face hub, and the commit that a hub id stands for; no torch, imports made when called."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import CheckpointError, DataError

RepoType = Literal["dataset", "model"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECONDS = 10
_OFFLINE = "connect once, copy the cache (HF_HOME) from a machine that has it, or give a local path (./…)"


def is_hub_id(text: str) -> bool:
    """Whether a text has the form `owner/name`."""
    return _HUB_ID.fullmatch(text) is not None


def load_hub_rows(
    path: str, name: str | None = None, split: str | None = None, revision: str | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows (from 1) of one split of a hub dataset at one commit; nothing remote is executed.

    Args:
        path: `owner/name`.
        name: subset (configuration).
        split: `train` when absent.
        revision: commit, tag or branch; resolved with `resolve_revision` unless it is a commit.

    Raises:
        DataError: unreachable and not cached at this commit, no such dataset, subset or split.
    """
    commit = resolve_revision(path, revision)
    import datasets

    try:
        data = datasets.load_dataset(path, name, split=split or "train", revision=commit)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise _refused(path, commit, error) from None
    _check_commit(path, commit, data)
    yield from enumerate(data, 1)


def resolve_revision(repo_id: str, revision: str | None = None, repo_type: RepoType = "dataset") -> str:
    """Returns the commit (40 hex digits) of a branch or tag, `main` when absent; a commit returns itself.

    Offline, the commit that the local hub cache has for it serves.

    Raises:
        DataError (CheckpointError for models): no such repository or revision, no access, or unreachable
            and not cached.
    """
    if revision and _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi, errors

    kind = CheckpointError if repo_type == "model" else DataError
    spelled = f"{repo_id}@{revision}" if revision else repo_id
    try:
        info = HfApi().repo_info(repo_id, revision=revision, repo_type=repo_type, timeout=_SECONDS)
    except errors.GatedRepoError:
        raise kind(spelled, "a gated repository", "accept its terms on the hub, then `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise kind(spelled, f"no revision `{revision}` of this {repo_type}", "give a branch, tag or commit") from None
    except errors.RepositoryNotFoundError:
        todo = "check the spelling; a private one needs `hf auth login`; a local file is given as ./path"
        raise kind(spelled, f"no such {repo_type} on the hub", todo) from None
    except errors.HFValidationError as error:
        raise kind(spelled, f"not a hub id ({error})", "write owner/name, or ./path for a local file") from None
    except (OSError, errors.HTTPError):  # offline mode, no network, or the hub itself is down
        commit = cached_commit(repo_id, revision, repo_type)
        if commit is None:
            found = f"the hub could not be reached and no commit of this {repo_type} is cached"
            raise kind(spelled, found, _OFFLINE) from None
        return commit
    if not info.sha:
        raise kind(spelled, "the hub names no commit for it", "give a commit after @ or as `revision`")
    return info.sha


def cached_commit(repo_id: str, revision: str | None, repo_type: RepoType) -> str | None:
    """Returns the commit that the hub cache on disk has for a branch or tag, or its only snapshot, or None."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{repo_type}s--{repo_id.replace('/', '--')}"
    ref = folder / "refs" / (revision or "main")
    if ref.is_file():
        return ref.read_text(encoding="utf-8").strip()
    snapshots = [path.name for path in folder.glob("snapshots/*") if _COMMIT.fullmatch(path.name)]
    return snapshots[0] if revision is None and len(snapshots) == 1 else None


def _check_commit(path: str, commit: str, data: Any) -> None:
    """Refuses the "latest cached version", which `datasets` serves offline whatever revision was asked for."""
    files = [Path(file["filename"]) for file in data.cache_files]
    if files and not any(commit in file.parts for file in files):
        raise DataError(
            f"{path}@{commit}",
            f"this commit is not cached, another one is ({files[0].parent.name})",
            "connect to the hub once, or pin the cached commit with `revision:`",
        )


def _refused(path: str, commit: str, error: Exception) -> DataError:
    where = f"{path}@{commit}"
    if isinstance(error, ConnectionError):
        return DataError(where, f"not cached, and the hub could not be reached ({_line(error)})", _OFFLINE)
    return DataError(where, _line(error), "correct `path`, `name`, `split` or `revision` of this source")


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())
