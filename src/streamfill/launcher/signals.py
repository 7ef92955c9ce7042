"""Ctrl-C and its relatives: the first asks for an orderly end, the second for an immediate one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass
class StopRequest:
    """What the signals of this process asked for so far."""

    first: asyncio.Event = field(default_factory=asyncio.Event)
    """Set by the first signal."""
    num_signals: int = 0
    on_second: Callable[[], None] = lambda: None
    """Called at each signal after the first, from the event loop."""

    def note(self) -> None:
        """One more signal has come."""
        self.num_signals += 1
        if self.num_signals == 1:
            self.first.set()
        else:
            self.on_second()


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Catches SIGINT, SIGTERM and SIGHUP inside the block. For the main thread's event loop."""
    request = StopRequest()
    loop = asyncio.get_running_loop()
    # Who was started by nohup goes on when its terminal is closed.
    numbers = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    for number in numbers:
        loop.add_signal_handler(number, request.note)
    try:
        yield request
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
