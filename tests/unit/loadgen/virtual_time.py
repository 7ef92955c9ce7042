"""An event loop whose time jumps to the next timer: seconds pass at once, and exactly."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
Clock = Callable[[], float]
START_S = 1000.0


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = START_S

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout > 0:
            self.now_s += timeout
            timeout = 0
        return super().select(timeout)


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def run_virtually(work: Callable[[Clock], Coroutine[Any, Any, T]]) -> T:
    """What ``work`` returns, which is given the clock of its loop."""
    with asyncio.Runner(loop_factory=_VirtualLoop) as runner:
        return runner.run(work(runner.get_loop().time))
