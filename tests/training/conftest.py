"""Fixtures for the tests of the trainers."""

from __future__ import annotations

import gc

import pytest
import trl  # noqa: F401  imported before the freeze


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports() -> None:
    """Takes what the imports left out of garbage collection: every trainer collects in full, for half a second."""
    gc.collect()
    gc.freeze()
