"""Fixtures of the recipe's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_sample import VALID


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    """The valid recipe as a file."""
    path = tmp_path / "small.yaml"
    path.write_text(VALID, encoding="utf-8")
    return path
