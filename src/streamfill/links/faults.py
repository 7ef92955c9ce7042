"""Faults put into the links between router and servers on purpose, for tests of what follows.

A process that starts with ``STREAMFILL_LINK_FAULTS`` in its environment spoils what it sends: of
``every`` frames one on average, drawn from ``seed`` and the process's name::

    STREAMFILL_LINK_FAULTS="every=50,seed=1"
    STREAMFILL_LINK_FAULTS="every=20,seed=1,kinds=dropped+slow,while=/tmp/faults"

With ``while`` it does so only as long as there is a file of that name, so that a test can begin and
end the faults of a running cluster. Each fault is counted, and logged as ``link_fault_injected``
with its kind and what was sent. Without the variable none of this is in a frame's way.
"""

from __future__ import annotations

import enum
import heapq
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from streamfill.fault_words import read_fault_words
from streamfill.observability.logging import log_event

_log = logging.getLogger(__name__)

VARIABLE = "STREAMFILL_LINK_FAULTS"

LONGEST_DELAY_S = 0.6
"""Of one frame that others overtake; beyond what is repeated at once, below any time-out."""

SLOW_BY_S = 0.3
"""Later than it should, in their order, come the frames of a link that is slow."""

SLOW_FOR_S = 1.5

_LOOK_EVERY_S = 0.05
"""At the file of ``while``."""


class LinkFault(enum.Enum):
    """What can go wrong with a frame."""

    DROPPED = "dropped"
    DUPLICATED = "duplicated"
    """It comes a second time, up to ``LONGEST_DELAY_S`` later."""
    DELAYED = "delayed"
    """It comes up to ``LONGEST_DELAY_S`` later, and what is sent behind it comes first."""
    SLOW = "slow"
    """It and all that is sent there for ``SLOW_FOR_S`` comes ``SLOW_BY_S`` later, in order."""


@dataclass(frozen=True)
class LinkFaultPlan:
    """How often, and what."""

    every: int
    """Of so many frames one is spoiled, on average."""
    seed: int
    kinds: tuple[LinkFault, ...] = tuple(LinkFault)
    while_file: Path | None = None
    """Only while it exists. None: always."""

    @classmethod
    def parse(cls, text: str) -> LinkFaultPlan:
        """Read what the environment says.

        Raises:
            ConfigError: it cannot be read, or says nothing sensible.
        """
        words = read_fault_words(VARIABLE, text, LinkFault)
        return cls(words.every, words.seed, words.kinds, words.while_file)


class LinkFaults:
    """The faults of what one process sends. For one thread."""

    def __init__(
        self, plan: LinkFaultPlan, sender: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_by_kind: Counter[LinkFault] = Counter()
        """That really happened."""
        self._plan = plan
        self._random = Random(f"{plan.seed} {sender}")
        self._clock = clock
        self._slow_until_s: dict[Hashable, float] = {}
        self._last_due_s: dict[Hashable, float] = {}
        """When the newest frame of a link that was slow arrives; none behind it comes earlier."""
        self._is_on = plan.while_file is None
        self._look_s = 0.0
        log_event(
            _log,
            "link_faults_are_injected",
            level=logging.WARNING,
            every=plan.every,
            seed=plan.seed,
            kinds="+".join(kind.value for kind in plan.kinds),
            while_file=plan.while_file,
        )

    @classmethod
    def from_environment(cls, sender: str) -> LinkFaults | None:
        """What ``STREAMFILL_LINK_FAULTS`` asks for; None where it is not set.

        Args:
            sender: name of the process.

        Raises:
            ConfigError: it cannot be read.
        """
        text = os.environ.get(VARIABLE)
        return None if text is None else cls(LinkFaultPlan.parse(text), sender)

    def delays_s(self, peer: Hashable, message: object) -> tuple[float, ...]:
        """After which times a frame is to be sent: once at once where all is well, never where it
        is dropped, twice where it is duplicated.

        Args:
            peer: to whom; links are slow one by one.
            message: what the frame says, for the log.
        """
        now_s = self._clock()
        fault = self._draw(now_s)
        if fault is not None:
            self.num_by_kind[fault] += 1
            log_event(
                _log,
                "link_fault_injected",
                level=logging.WARNING,
                kind=fault,
                message=type(message).__name__,
            )
        if fault is LinkFault.SLOW:
            self._slow_until_s[peer] = now_s + SLOW_FOR_S
        delay_s = self._in_order_s(peer, now_s)
        match fault:
            case LinkFault.DROPPED:
                return ()
            case LinkFault.DUPLICATED:
                return delay_s, delay_s + self._random.uniform(0, LONGEST_DELAY_S)
            case LinkFault.DELAYED:
                return (delay_s + self._random.uniform(0, LONGEST_DELAY_S),)
            case _:
                return (delay_s,)

    def _draw(self, now_s: float) -> LinkFault | None:
        file = self._plan.while_file
        if file is not None and now_s >= self._look_s:
            self._look_s = now_s + _LOOK_EVERY_S
            self._is_on = file.exists()
        if not self._is_on or self._random.randrange(self._plan.every):
            return None
        return self._random.choice(self._plan.kinds)

    def _in_order_s(self, peer: Hashable, now_s: float) -> float:
        if now_s < self._slow_until_s.get(peer, 0.0):
            due_s = now_s + SLOW_BY_S
        else:
            due_s = max(now_s, self._last_due_s.get(peer, 0.0))
        if due_s <= now_s:
            self._slow_until_s.pop(peer, None)
            self._last_due_s.pop(peer, None)
            return 0.0
        self._last_due_s[peer] = due_s
        return due_s - now_s


class DelayedFrames:
    """Frames that are to be sent later, for a thread without an event loop."""

    def __init__(self) -> None:
        self._frames: list[tuple[float, int, bytes]] = []
        self._numbers = itertools.count()

    def put(self, due_s: float, frame: bytes) -> None:
        """Keep a frame; those that are due at the same time keep their order."""
        heapq.heappush(self._frames, (due_s, next(self._numbers), frame))

    def take(self, now_s: float) -> list[bytes]:
        """What is due, in order."""
        frames = []
        while self._frames and self._frames[0][0] <= now_s:
            frames.append(heapq.heappop(self._frames)[2])
        return frames

    def clear(self) -> None:
        """Drop them: the connection is gone."""
        self._frames.clear()

    @property
    def next_s(self) -> float:
        """When the next one is due; infinity where there is none."""
        return self._frames[0][0] if self._frames else float("inf")
