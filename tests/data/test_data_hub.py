"""Hub ids without a network: the cached commit serves, another commit's rows never do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.data.hub import cached_commit, is_hub_id, resolve_revision
from posttrain.errors import CheckpointError, DataError

COMMIT, OTHER = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_hub_ids() -> None:
    assert is_hub_id("HuggingFaceH4/ultrachat_200k")
    assert not any(map(is_hub_id, ("./a/b", "/a/b", "a", "a/b/c", "../b", "a b/c")))


def test_a_commit_is_its_own_answer() -> None:
    assert resolve_revision("owner/name", COMMIT) == COMMIT


def test_offline_the_cached_reference_serves(cache: Path) -> None:
    put(cache / "datasets--owner--name" / "refs" / "main", COMMIT)
    put(cache / "datasets--owner--name" / "refs" / "v1", OTHER)
    put(cache / "models--owner--name" / "refs" / "main", OTHER)
    assert resolve_revision("owner/name") == COMMIT
    assert resolve_revision("owner/name", "v1") == OTHER
    assert resolve_revision("owner/name", repo_type="model") == OTHER


def test_offline_a_single_snapshot_serves_and_two_do_not(cache: Path) -> None:
    put(cache / "datasets--owner--name" / "snapshots" / COMMIT / "README.md")
    assert cached_commit("owner/name", None, "dataset") == COMMIT
    assert cached_commit("owner/name", "v1", "dataset") is None
    put(cache / "datasets--owner--name" / "snapshots" / OTHER / "README.md")
    assert cached_commit("owner/name", None, "dataset") is None


def test_offline_and_not_cached_is_refused(cache: Path) -> None:
    with pytest.raises(DataError, match=r"owner/name@v1: the hub could not be reached and no commit.*\n.*local path"):
        resolve_revision("owner/name", "v1")
    with pytest.raises(CheckpointError, match="no commit of this model is cached"):
        resolve_revision("owner/name", repo_type="model")


READ = """
import os, sys
from posttrain.data.read import SourceSpec, read_source
from posttrain.errors import DataError
for revision, split in ((sys.argv[1], None), (sys.argv[2], None), (sys.argv[1], "test")):
    try:
        source = read_source(SourceSpec("owner/name", split=split, revision=revision), "text")
        print([row.text for row in source.rows], source.files, source.rows[1].origin)
    except DataError as error:
        print(str(error).splitlines()[0])
"""


def test_rows_come_from_the_commit_asked_for_or_not_at_all(tmp_path: Path) -> None:
    """`datasets` serves "the latest cached version" offline, whatever the revision: ours must not."""
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    put(tmp_path / "src" / "train.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in "ab"))
    make = (
        f"import datasets; print(datasets.load_dataset({str(tmp_path / 'src')!r}).cache_files['train'][0]['filename'])"
    )
    made = subprocess.run([sys.executable, "-c", make], capture_output=True, text=True, check=True, env=environment)
    arrow = Path(made.stdout.strip())
    cached = tmp_path / "datasets" / "owner___name" / "default" / "0.0.0" / COMMIT
    shutil.copytree(arrow.parent, cached)
    (cached / arrow.name).rename(cached / "name-train.arrow")
    done = subprocess.run(
        [sys.executable, "-c", READ, COMMIT, OTHER], capture_output=True, text=True, check=True, env=environment
    )
    served, other, split = done.stdout.splitlines()
    assert served == f"['a', 'b'] ['owner/name@{COMMIT}'] owner/name@{COMMIT}:2"
    assert other.startswith(f"owner/name@{OTHER}: this commit is not cached, another one is ({COMMIT})")
    assert "Unknown split" in split
