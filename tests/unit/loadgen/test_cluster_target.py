"""Targets that are there already, or are not."""

from __future__ import annotations

import asyncio
import socket

import pytest

from streamfill.errors import UnavailableError
from streamfill.launcher.signals import StopRequest
from streamfill.loadgen import cluster_target
from streamfill.loadgen.cluster_target import RunningCluster, open_target
from streamfill.loadgen.targets import streamfill as streamfill_target


async def test_who_is_waited_for_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before it is given up."""
    monkeypatch.setattr(cluster_target, "_SILENCE_S", 0.05)
    monkeypatch.setattr(streamfill_target, "READY_TIMEOUT_S", 0.5)
    lines: list[str] = []
    with socket.socket() as bound:  # nobody listens on it, and nobody else gets it
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(UnavailableError, match=f"{address} is not ready after 0.5 s"):
            async with (
                asyncio.timeout(60.0),
                open_target(RunningCluster(address=address), stop=StopRequest(), say=lines.append),
            ):
                pass
    assert lines == [f"Waiting for {address} to be ready."]
