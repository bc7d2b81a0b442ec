"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
