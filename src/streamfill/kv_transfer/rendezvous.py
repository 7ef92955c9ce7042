"""How the two sides of a group find each other: torch.distributed's store, carried by the session.

A torch.distributed group is set up through a key-value store. `TCPStore` would be the usual one,
but its client waits without a time-out for a server that hangs (seen with a stopped process), and
it takes one more port and thread. The control connection is there already, so each side keeps a
table of its own and tells the other what it puts into it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed

from streamfill.errors import TransportError

_dist: Any = torch.distributed

MAX_PAIRS = 64
"""Gloo needs 2 and NCCL a handful; a peer that sends more is broken."""


class RendezvousStore(_dist.Store):  # type: ignore[misc]
    """The store of one group of two. torch calls it from C++, by the names of `dist.Store`.

    Owned by the thread that sets the group up, which is the only one whose `set` reaches the other
    side; `put` and `fail` may come from any thread.
    """

    def __init__(
        self,
        *,
        publish: Callable[[str, bytes], None],
        timeout_s: float,
        pump: Callable[[float], None] | None = None,
    ) -> None:
        """
        Args:
            publish: tells the other side, whose `put` it becomes; called by the owning thread.
            timeout_s: of a wait.
            pump: receives from the other side for at most so many seconds and calls `put`; None
                where another thread does that.
        """
        super().__init__()
        self._publish = publish
        self._timeout_s = timeout_s
        self._pump = pump
        self._changed = threading.Condition()
        self._values: dict[str, bytes] = {}
        self._failure: str | None = None
        self._owner = threading.get_ident()

    def adopt(self) -> None:
        """Make the calling thread the owner."""
        self._owner = threading.get_ident()

    def put(self, key: str, value: bytes) -> None:
        """What the other side has set."""
        with self._changed:
            if len(self._values) >= MAX_PAIRS:
                self._failure = f"the other side set more than {MAX_PAIRS} keys"
            else:
                self._values[key] = value
            self._changed.notify_all()

    def fail(self, reason: str) -> None:
        """Let every wait fail from now on."""
        with self._changed:
            self._failure = reason
            self._changed.notify_all()

    def set(self, key: str, value: bytes) -> None:
        """Put a value into both tables."""
        with self._changed:
            self._values[key] = bytes(value)
        if threading.get_ident() == self._owner:
            self._publish(key, bytes(value))

    def get(self, key: str) -> bytes:
        """The value, waited for."""
        self.wait([key])
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys are set.

        Raises:
            TransportError: they are not in time, or the session ended.
        """
        timeout_s = self._timeout_s if timeout is None else timeout.total_seconds()
        deadline_s = time.monotonic() + min(timeout_s, self._timeout_s)
        while not self.check(keys):
            left_s = deadline_s - time.monotonic()
            if self._failure is not None:
                raise TransportError(self._failure)
            if left_s <= 0:
                raise TransportError(f"the other side did not come within {self._timeout_s} s")
            if self._pump is not None and threading.get_ident() == self._owner:
                self._pump(left_s)
            else:
                with self._changed:
                    self._changed.wait_for(
                        lambda: self._failure is not None or self.check(keys), left_s
                    )

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are set, without waiting."""
        return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        """Counters are local: no group of two needs a common one."""
        with self._changed:
            total = int(self._values.get(key, b"0")) + amount
            self._values[key] = str(total).encode()
            return total

    def delete_key(self, key: str) -> bool:
        """Forget a key on this side."""
        with self._changed:
            return self._values.pop(key, None) is not None
