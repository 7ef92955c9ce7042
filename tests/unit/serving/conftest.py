"""Servers under test hold the sockets of their fake transport; they are closed behind each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.serving.builders import ServerUnderTest


@pytest.fixture(autouse=True)
def close_servers() -> Iterator[None]:
    yield
    ServerUnderTest.close_all()
