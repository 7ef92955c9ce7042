"""Several answers to one request, each a stream of its own, as one sequence of events.

1. The first choice of each prompt is opened and committed at once.
2. Its siblings (``n`` above 1) follow when it has a first token: then the prompt is in the prefix
   cache, and no server computes it twice.
3. Events are passed on through a short queue. A client that reads slowly makes the choices wait, as
   in gRPC, and what they produce stays in the core, at most ``max_tokens`` tokens.
4. The first choice that fails ends all; so does the end of the block, whatever ended it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from router.interface import (
    Acknowledged,
    DoneEvent,
    OpenOptions,
    StreamHandle,
    StreamManager,
    TokenEvent,
)
from router.service import CLIENT_GONE
from streamfill.errors import InternalError, StreamError
from streamfill.observability.logging import log_event

logger = logging.getLogger(__name__)

QUEUE_EVENTS = 16
"""Of all choices together."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One answer to be had."""

    opening: OpenOptions
    feed: Callable[[StreamHandle], Awaitable[None]]
    """Puts the prompt in and commits. The stream may end before it does."""
    prompt: int = 0
    """Number of its prompt among those of the request."""
    waits_for: int | None = None
    """The choice with the same prompt that is to begin first."""


@dataclass(frozen=True)
class ChoiceEvent:
    """Something that happened to one choice."""

    index: int
    event: TokenEvent | DoneEvent


_Queued: TypeAlias = ChoiceEvent | StreamError


class Choices:
    """Runs the choices of one request; for ``async with``."""

    def __init__(self, manager: StreamManager, choices: Sequence[Choice]) -> None:
        self._manager = manager
        self._choices = choices
        self._queue: asyncio.Queue[_Queued] = asyncio.Queue(QUEUE_EVENTS)
        self._begun = [asyncio.Event() for _ in choices]
        self._open: dict[int, StreamHandle] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._end_reason = CLIENT_GONE

    async def __aenter__(self) -> Choices:
        runs = [self._guarded(n, self._run(n)) for n in range(len(self._choices))]
        self._tasks = [asyncio.create_task(run) for run in runs]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._tasks:
            task.cancel()
        handles, self._open = list(self._open.values()), {}
        for handle in handles:
            await handle.cancel(self._end_reason)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def events(self) -> AsyncIterator[ChoiceEvent]:
        """Everything that happens, until each choice is done. To be called once.

        Raises:
            StreamError: of the first choice that failed.
        """
        num_left = len(self._choices)
        while num_left:
            queued = await self._queue.get()
            if isinstance(queued, StreamError):
                self._end_reason = f"its request failed: {queued.message}"
                raise queued
            yield queued
            num_left -= isinstance(queued.event, DoneEvent)

    async def _run(self, index: int) -> None:
        choice = self._choices[index]
        if choice.waits_for is not None:
            await self._begun[choice.waits_for].wait()
        handle = await self._manager.open(choice.opening)
        self._open[index] = handle
        feeding = asyncio.create_task(self._guarded(index, choice.feed(handle)))
        try:
            async for event in handle.events():
                if not isinstance(event, Acknowledged):
                    self._begun[index].set()
                    await self._queue.put(ChoiceEvent(index, event))
            self._open.pop(index, None)
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)

    async def _guarded(self, index: int, work: Awaitable[None]) -> None:
        """Whatever ends ``work`` badly is told to the one who waits for events."""
        try:
            await work
        except StreamError as error:
            await self._queue.put(error)
        except Exception as error:  # noqa: BLE001 - the edge of a task, whose waiter is told
            handle = self._open.get(index)
            log_event(
                *(logger, "choice_failed"),
                stream_id=None if handle is None else handle.stream_id,
                level=logging.ERROR,
                exception=error,
            )
            await self._queue.put(InternalError(f"the choice failed: {error!r}"))


def committed_choices(
    openings: Sequence[OpenOptions],
    feeds: Sequence[Sequence[Callable[[StreamHandle], Awaitable[None]]]],
) -> list[Choice]:
    """Choices in the order of the OpenAI API: all of the first prompt, then of the second.

    Args:
        openings: one for each prompt.
        feeds: for each prompt, one for each of its choices.
    """
    choices: list[Choice] = []
    for prompt, (opening, own) in enumerate(zip(openings, feeds, strict=True)):
        first = len(choices)
        for number, feed in enumerate(own):
            waits_for = first if number else None
            choices.append(Choice(opening=opening, feed=feed, prompt=prompt, waits_for=waits_for))
    return choices
