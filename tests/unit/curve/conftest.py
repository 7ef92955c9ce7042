"""Folders of CURVE keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamfill.curve.keys import create_keys


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Of the cluster."""
    create_keys(tmp_path / "keys")
    return str(tmp_path / "keys")


@pytest.fixture
def other_folder(tmp_path: Path) -> str:
    """Of another cluster."""
    create_keys(tmp_path / "other")
    return str(tmp_path / "other")
