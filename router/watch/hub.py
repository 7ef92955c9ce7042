"""Samples the cluster for all who look at it, and does nothing while nobody does.

1. The first viewer starts the sampling; the last one who goes ends it, and all that was kept is
   dropped.
2. Some times a second the router's streams are read, in slices between which others have their
   turn. Their schedulers are asked beside it, once a second at most and never twice at once: a
   server answers between two steps, which may take seconds.
3. Each viewer takes the newest sample when it has sent the one before, so nothing is queued for
   anybody. Timelines are made of the streams that are in a view, once for all viewers.
4. Streams that ended stay for a while, those of the last minute also for a viewer who comes later:
   the router keeps them anyway.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Final

from router.watch.frames import Frame, StreamFacts
from router.watch.sample import Described, Sample, described, server_view
from router.watch.source import WatchedStream, WatchSource
from router.watch.timeline import Timeline
from router.watch.viewer import Viewer
from router.watch.wish import WatchWish
from streamfill.errors import ResourceExhaustedError, UnavailableError
from streamfill.observability.logging import RateLimited, log_event

logger = logging.getLogger(__name__)

SAMPLE_INTERVAL_S: Final = 0.5
"""What a person follows. Servers report four times a second."""
DESCRIBE_INTERVAL_S: Final = 1.0
"""Each answer names every stream of a server."""
DESCRIBED_PER_S: Final = 500
"""Streams; the more there are, the more seldom they are asked about."""
DESCRIBE_TIMEOUT_S: Final = 5.0
MAX_VIEWERS: Final = 32
"""Of the router: about a thousandth of a core each."""
MAX_VIEWERS_OF_TENANT: Final = 8
"""So that one tenant does not take all places."""
MAX_ENDED: Final = 200
"""Ended streams that can be seen at the same time."""
ENDED_KEPT_S: Final = 600.0
SLICE: Final = 250
"""Streams read before others in the loop have their turn: about a millisecond."""
ENDED_SLICE: Final = 5
"""The same, where a stream is read from its beginning to its end."""
_RETRY_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Ended:
    """All that is kept of a stream that ended."""

    facts: StreamFacts
    timeline: Timeline


class Watches:
    """Owned by the router's core. `close` ends all who look."""

    def __init__(self, source: WatchSource) -> None:
        self._source = source
        self._epoch_s = time.monotonic()
        self._epoch_ms = round(1000 * time.time())
        self._viewers: list[Viewer] = []
        self._sampling: asyncio.Task[None] | None = None
        self._describing: asyncio.Task[None] | None = None
        self._described = Described()
        self._described_s = float("-inf")
        self._sample: Sample | None = None
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        """Of the viewer whose frame is made: slices of several at once would add up."""
        self._timelines: dict[str, Timeline] = {}
        self._watched: dict[str, WatchedStream] = {}
        self._ended: OrderedDict[str, _Ended] = OrderedDict()
        self._closed = False
        self._log_failed = RateLimited()

    @property
    def num_viewers(self) -> int:
        """Who look now."""
        return len(self._viewers)

    async def watch(self, wish: WatchWish) -> AsyncGenerator[Frame, None]:
        """Frames until the caller takes no more or the router stops.

        Raises:
            ResourceExhaustedError: too many look already.
            UnavailableError: the router stops.
        """
        viewer = self._admit(wish)
        try:
            seen: Sample | None = None
            while True:
                sample = await self._newer_than(seen)
                async with self._turn:
                    choice = viewer.select(sample)
                    timelines = await self._timelines_of(viewer)
                    frame = await viewer.frame(sample, choice, timelines)
                yield frame
                seen = sample
        finally:
            self._leave(viewer)

    def close(self) -> None:
        """End all who look, and take no more. Idempotent."""
        self._closed = True
        self._changed.set()
        self._stop()

    # Viewers.

    def _admit(self, wish: WatchWish) -> Viewer:
        if self._closed:
            raise UnavailableError("the router is shutting down")
        of_tenant = Counter(each.wish.tenant for each in self._viewers)[wish.tenant]
        limit = MAX_VIEWERS if wish.tenant is None else MAX_VIEWERS_OF_TENANT
        num_viewers = len(self._viewers)
        if num_viewers >= MAX_VIEWERS or of_tenant >= limit:
            raise ResourceExhaustedError(
                f"{max(of_tenant, num_viewers)} status pages are open, at most "
                f"{MAX_VIEWERS}, and {MAX_VIEWERS_OF_TENANT} of one tenant; close one",
                details={"max_viewers": MAX_VIEWERS, "retry_after_s": _RETRY_S},
            )
        viewer = Viewer(wish, self._epoch_ms)
        self._viewers.append(viewer)
        if self._sampling is None:
            self._sampling = asyncio.create_task(self._run(), name="router-watch")
        return viewer

    def _leave(self, viewer: Viewer) -> None:
        self._viewers.remove(viewer)
        if not self._viewers:
            self._stop()

    def _stop(self) -> None:
        for task in (self._sampling, self._describing):
            if task is not None:
                task.cancel()
        self._sampling = self._describing = None
        self._sample = None
        self._described, self._described_s = Described(), float("-inf")
        self._timelines.clear()
        self._watched.clear()
        self._ended.clear()

    async def _newer_than(self, seen: Sample | None) -> Sample:
        while self._sample is None or self._sample is seen:
            if self._closed:
                raise UnavailableError("the router is shutting down")
            await self._changed.wait()
        return self._sample

    async def _timelines_of(self, viewer: Viewer) -> dict[str, Timeline]:
        found: dict[str, Timeline] = {}
        for place, facts in enumerate(viewer.selected):
            if place and place % SLICE == 0:
                await asyncio.sleep(0)
            found[facts.id] = self._timeline(facts)
        return found

    def _timeline(self, facts: StreamFacts) -> Timeline:
        ended = self._ended.get(facts.id)
        if ended is not None:
            return ended.timeline
        timeline = self._timelines.get(facts.id)
        if timeline is None:
            timeline = self._timelines[facts.id] = Timeline(self._to_ms)
        stream = self._watched.get(facts.id)
        if stream is not None:
            timeline.read(stream.lifetime.entries)
        return timeline

    # Sampling.

    async def _run(self) -> None:
        while True:
            started_s = time.monotonic()
            try:
                await self._take_sample()
            except Exception as error:  # noqa: BLE001  a page must not end at one bad sample
                if self._log_failed.allow():
                    log_event(logger, "sample_failed", level=logging.ERROR, exception=error)
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            taken_s = time.monotonic() - started_s
            # Never more than half of the time, however many streams there are.
            await asyncio.sleep(max(SAMPLE_INTERVAL_S - taken_s, taken_s))

    async def _take_sample(self) -> None:
        self._ask_schedulers()
        now_ms = self._to_ms(time.monotonic())
        streams: dict[str, StreamFacts] = {}
        watched: dict[str, WatchedStream] = {}
        for place, stream in enumerate(self._source.open_streams()):
            if place and place % SLICE == 0:
                await asyncio.sleep(0)
            self._note(stream, streams, watched)
        await self._keep_ended(now_ms)
        streams.update((stream_id, ended.facts) for stream_id, ended in self._ended.items())
        info = self._source.info()
        self._watched = watched
        self._forget_timelines(streams)
        self._sample = Sample(
            now_ms=now_ms,
            info=info,
            servers=[server_view(server, self._described) for server in info.servers],
            streams=streams,
            described=self._described,
        )

    def _note(
        self,
        stream: WatchedStream,
        streams: dict[str, StreamFacts],
        watched: dict[str, WatchedStream],
    ) -> None:
        facts = stream.facts(self._to_ms)
        streams[facts.id] = facts
        watched[facts.id] = stream
        timeline = self._timelines.get(facts.id)
        if timeline is not None:
            timeline.read(stream.lifetime.entries)
            has_begun = facts.num_output_tokens > 0
            now_ms = self._to_ms(time.monotonic())
            timeline.sample(facts.num_computed_tokens, now_ms, is_first_token_out=has_begun)

    async def _keep_ended(self, now_ms: int) -> None:
        """What is kept is the timeline: a lifetime has an entry for each token."""
        found: list[tuple[StreamFacts, WatchedStream]] = []
        for stream in self._source.newest_ended():
            facts = stream.facts(self._to_ms)
            if facts.id in self._ended or len(found) >= MAX_ENDED:
                break
            found.append((facts, stream))
        for place, (facts, stream) in enumerate(reversed(found)):
            if place and place % ENDED_SLICE == 0:
                await asyncio.sleep(0)
            timeline = self._timelines.pop(facts.id, None) or Timeline(self._to_ms)
            timeline.read(stream.lifetime.entries)
            self._ended[facts.id] = _Ended(facts, timeline)
        oldest_ms = now_ms - round(1000 * ENDED_KEPT_S)
        while self._ended:
            first = next(iter(self._ended.values())).facts
            is_old = first.ended_ms is not None and first.ended_ms < oldest_ms
            if len(self._ended) <= MAX_ENDED and not is_old:
                return
            self._ended.popitem(last=False)

    def _forget_timelines(self, streams: dict[str, StreamFacts]) -> None:
        """Those of streams that are gone, or in nobody's view any more."""
        viewed = {facts.id for viewer in self._viewers for facts in viewer.selected}
        for stream_id in [x for x in self._timelines if x not in streams or x not in viewed]:
            del self._timelines[stream_id]

    def _ask_schedulers(self) -> None:
        num_streams = 0 if self._sample is None else self._sample.info.num_open_streams
        pause_s = max(DESCRIBE_INTERVAL_S, num_streams / DESCRIBED_PER_S)
        now_s = time.monotonic()
        if self._describing is None and now_s >= self._described_s + pause_s:
            self._described_s = now_s
            self._describing = asyncio.create_task(self._describe(), name="router-watch-describe")

    async def _describe(self) -> None:
        try:
            answers = await self._source.describe_streams(None, DESCRIBE_TIMEOUT_S)
            self._described = described(answers)
        except Exception as error:  # noqa: BLE001  the page shows what is known without them
            if self._log_failed.allow():
                log_event(logger, "describe_failed", level=logging.WARNING, exception=error)
        if self._describing is asyncio.current_task():
            self._describing = None

    def _to_ms(self, at_s: float) -> int:
        return round(1000 * (at_s - self._epoch_s))
