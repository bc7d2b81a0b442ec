"""Fixtures that every test may use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from runs_support import FAKES, Project

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with real data and tokenizers; skips where it is absent, fails where it was promised."""
    promised = os.environ.get("POSTTRAIN_SHARED")
    folder = Path(promised) if promised else ROOT.parent / "shared"
    if not folder.is_dir():
        if promised:
            pytest.fail(f"POSTTRAIN_SHARED={promised} is not a folder")
        pytest.skip("no shared data folder (set POSTTRAIN_SHARED)")
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A recipe whose stages are fakes, in every process that the test starts."""
    inherited = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES), *([inherited] if inherited else [])]))
    return Project(tmp_path / "project")


@pytest.fixture(scope="session")
def finished_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that ran once, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(FAKES))
        Project(folder).go()
    return folder


@pytest.fixture
def finished(project: Project, finished_template: Path) -> Project:
    """A project whose recipe ran to its end."""
    shutil.rmtree(project.folder)
    shutil.copytree(finished_template, project.folder)
    return project
