"""A monotonic clock that a test sets forward, so that a long time is over at the moment at which it
is to be over, however busy the machine is."""

from __future__ import annotations

import time
from types import ModuleType

import pytest


class ShiftedTime:
    """Stands in for the module ``time`` where nothing but ``monotonic`` is used of it."""

    def __init__(self) -> None:
        self.shift_s = 0.0
        """From the true time; a test only adds to it."""

    def monotonic(self) -> float:
        """As ``time.monotonic``."""
        return time.monotonic() + self.shift_s


def shifted_time(monkeypatch: pytest.MonkeyPatch, module: ModuleType) -> ShiftedTime:
    """The clock of one module, from now on."""
    clock = ShiftedTime()
    monkeypatch.setattr(module, "time", clock)
    return clock
