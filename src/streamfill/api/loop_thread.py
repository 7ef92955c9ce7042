"""An event loop in a thread of its own, shared by all synchronous clients of a process.

One for all, because gRPC's asyncio side logs errors when several loops of a process poll at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

JOIN_TIMEOUT_S = 5.0
"""Stopping a loop takes milliseconds; the thread is a daemon, so giving up is harmless."""

_lock = threading.Lock()
_shared: LoopThread | None = None
_num_users = 0


class LoopThread:
    """Runs coroutines for callers in other threads."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="streamfill-client", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``. An interrupted caller, as by Ctrl-C, cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the thread."""
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(JOIN_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()


def acquire() -> LoopThread:
    """The shared loop, started for its first user. Give it back with ``release``."""
    global _shared, _num_users
    with _lock:
        if _shared is None:
            _shared = LoopThread()
        _num_users += 1
        return _shared


def release() -> None:
    """The caller's last use is over; with the last user the loop stops."""
    global _shared, _num_users
    with _lock:
        _num_users -= 1
        if _num_users == 0 and _shared is not None:
            _shared.stop()
            _shared = None
