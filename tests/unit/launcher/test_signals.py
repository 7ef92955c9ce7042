"""What Ctrl-C and its relatives ask for."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from streamfill.launcher.signals import stop_on_signal


@pytest.fixture(autouse=True)
def hangup() -> Iterator[None]:
    """What the signal did before is what it does afterwards."""
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


async def test_the_end_of_the_terminal_is_an_orderly_end() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever started the tests
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.wait_for(stop.first.wait(), 20)


async def test_who_was_started_by_nohup_outlives_the_terminal() -> None:
    """The other signals are heard as ever."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.05)
        assert stop.num_signals == 0
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(stop.first.wait(), 20)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
