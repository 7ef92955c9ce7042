"""Shared by the tests of access to the router."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.router.access.keys_for_tests import TestKeys


@pytest.fixture
def keys(tmp_path: Path) -> TestKeys:
    """A key file without keys, in force."""
    return TestKeys(tmp_path)
