"""Waiting for something to become true, with an end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.05


def wait_until(what: str, condition: Callable[[], T], timeout_s: float) -> T:
    """The first true value of ``condition``. Fails with ``what`` when there is none in time."""
    end_s = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end_s, f"not after {timeout_s:g} s: {what}"
        time.sleep(POLL_S)
    return value


async def until(what: str, condition: Callable[[], Awaitable[T]], timeout_s: float) -> T:
    """As ``wait_until``, for a condition that has to ask somebody."""
    end_s = time.monotonic() + timeout_s
    while not (value := await condition()):
        assert time.monotonic() < end_s, f"not after {timeout_s:g} s: {what}"
        await asyncio.sleep(POLL_S)
    return value
