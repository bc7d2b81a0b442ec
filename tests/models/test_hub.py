"""References, and commits of hub ids without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.errors import CheckpointError, UserError
from posttrain.models.hub import HubId, LocalPath, StageRef, cached_commit, fetch_model, parse_reference, resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("@sft", StageRef("sft")),
        ("./models/base", LocalPath(Path("models/base"))),
        ("../base", LocalPath(Path("../base"))),
        ("/srv/base", LocalPath(Path("/srv/base"))),
        ("rows/train.jsonl", LocalPath(Path("rows/train.jsonl"))),
        ("data/pairs.jsonl.gz", LocalPath(Path("data/pairs.jsonl.gz"))),
        ("mistralai/Mistral-7B-v0.1", HubId("mistralai/Mistral-7B-v0.1")),
        (f"owner/name@{COMMIT}", HubId("owner/name", COMMIT)),
        ("owner/name@refs/pr/3", HubId("owner/name", "refs/pr/3")),
    ],
)
def test_references(text: str, expected: LocalPath | HubId | StageRef) -> None:
    assert parse_reference(text) == expected


def test_home_is_expanded() -> None:
    assert parse_reference("~/base") == LocalPath(Path.home() / "base")


@pytest.mark.parametrize(
    "text", ["", "gpt2", "a/b/c", "owner/name@", "owner/na me", "-x/y", "owner/\N{GREEK SMALL LETTER ALPHA}"]
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(UserError, match="neither a stage"):
        parse_reference(text)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds `owner/name`, branch main, at COMMIT; and no network."""
    from huggingface_hub import constants

    repository = tmp_path / "models--owner--name"
    (repository / "snapshots" / COMMIT).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repository


def test_a_commit_is_not_asked_for() -> None:
    assert resolve(HubId("nobody/nothing", COMMIT)) == COMMIT


def test_offline_the_cached_commit_serves(cache: Path) -> None:
    assert resolve(HubId("owner/name")) == COMMIT
    assert resolve(HubId("owner/name", "main")) == COMMIT


@pytest.mark.parametrize("hub", [HubId("owner/other"), HubId("owner/name", "v2")], ids=str)
def test_offline_without_a_copy_is_refused(cache: Path, hub: HubId) -> None:
    with pytest.raises(UserError, match="no network") as caught:
        resolve(hub)
    assert "pin a commit" in caught.value.todo


def test_a_reference_without_its_files_does_not_count(cache: Path) -> None:
    (cache / "snapshots" / COMMIT).rmdir()
    assert cached_commit(HubId("owner/name")) is None
    assert cached_commit(HubId("owner/name", COMMIT)) is None


def test_models_and_datasets_are_apart(cache: Path) -> None:
    assert cached_commit(HubId("owner/name"), "dataset") is None


def test_planning_needs_no_torch() -> None:
    code = "import sys, posttrain.models.hub, posttrain.models.known_shapes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tokenizer_is_fetched_without_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def download(hub_id: str, revision: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert fetch_model("owner/name", "a" * 40, weights=False) == tmp_path
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        fetch_model("owner/name", "a" * 40)
    assert [any("safetensors" in name for name in wanted) for wanted in asked] == [False, True]
