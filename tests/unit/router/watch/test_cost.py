"""What it costs the router when somebody looks at a thousand streams, a hundred of them changing.

``pytest tests/unit/router/watch/test_cost.py -s`` prints the figures of docs/status_page.md.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from router.interface import StreamHandle
from router.watch import hub
from router.watch.wish import Sort, WatchWish
from streamfill.messages.common import StreamDecision
from streamfill.observability.lifetime import percentile
from tests.unit.router.cluster_for_tests import TestCluster, ids

NUM_STREAMS = 1000
NUM_CHANGING = 100
MEASURED_S = 4.0
MOST_ADDED_SLICES = 10.0
"""What may be computed at a time for those who look, at P99: so many times what it takes to read
the streams of one slice. That is as much longer on a machine that others slow down."""
MOST_FRAME_BYTES = 200_000
"""Of a later frame. The first one has 320 kB."""


@dataclass
class Figures:
    """Of one measurement."""

    lags_ms: list[float] = field(default_factory=list)
    """How late the loop came back to one who slept for 2 ms."""
    busy_ms: list[float] = field(default_factory=list)
    """What the loop's thread computed meanwhile. Others who are at work on this machine make the
    loop late as well, but do not add to this."""
    frame_bytes: list[int] = field(default_factory=list)
    cpu_share: float = 0.0

    def p99_ms(self) -> float:
        """Of the lag."""
        return percentile(self.lags_ms, 99) or 0.0

    def busy_p99_ms(self) -> float:
        """Of what made it late."""
        return percentile(self.busy_ms, 99) or 0.0


async def look(cluster: TestCluster, limit: int, figures: Figures) -> None:
    """As a page does, with the streams that change in its view."""
    wish = WatchWish(limit=limit, sort=Sort.OLDEST)
    async with aclosing(cluster.manager.watch(wish)) as frames:
        async for frame in frames:
            figures.frame_bytes.append(len(msgspec.json.encode(frame)))


async def sleep_lightly(figures: Figures) -> None:
    while True:
        started_s, cpu_s = time.monotonic(), time.thread_time()
        await asyncio.sleep(0.002)
        figures.lags_ms.append(1000 * (time.monotonic() - started_s) - 2)
        figures.busy_ms.append(1000 * (time.thread_time() - cpu_s))


async def change(handles: list[StreamHandle]) -> None:
    """Some hundred segments a second."""
    while True:
        for handle in handles[:NUM_CHANGING]:
            await handle.append(ids(11, 12))
            await asyncio.sleep(0.002)


def slice_ms(cluster: TestCluster) -> float:
    """What the loop's thread computes to read the streams of one slice."""
    found_ms = []
    sessions = list(cluster.manager._sessions.values())[: hub.SLICE]
    for _ in range(20):
        cpu_s = time.thread_time()
        for session in sessions:
            session.facts(lambda at_s: round(1000 * at_s))
        found_ms.append(1000 * (time.thread_time() - cpu_s))
    return percentile(found_ms, 50) or 0.0


async def measure(cluster: TestCluster, handles: list[StreamHandle], limits: list[int]) -> Figures:
    """With one viewer for each limit."""
    figures = Figures()
    viewers = [asyncio.create_task(look(cluster, limit, figures)) for limit in limits]
    await asyncio.sleep(1.5)
    figures.frame_bytes.clear()
    others = [asyncio.create_task(change(handles)), asyncio.create_task(sleep_lightly(figures))]
    cpu_s, started_s = time.process_time(), time.monotonic()
    await asyncio.sleep(MEASURED_S)
    figures.cpu_share = (time.process_time() - cpu_s) / (time.monotonic() - started_s)
    for task in (*viewers, *others):
        task.cancel()
    await asyncio.gather(*viewers, *others, return_exceptions=True)
    return figures


@pytest.mark.slow
async def test_looking_at_a_thousand_streams_is_cheap(tiny_model: Path) -> None:
    """The loop comes back as soon as without, nearly, and frames are small."""
    async with TestCluster(tiny_model, max_uncommitted_tokens=10**8) as cluster:
        prefill = await cluster.prefill(pool_tokens=10**7)
        handles = [await cluster.open(request_id=f"agent-{n}") for n in range(NUM_STREAMS)]
        for handle in handles:
            for _ in range(5):
                await handle.append(ids(*range(10, 60)))
        prefill.decisions = tuple(
            StreamDecision(
                stream_id=handle.stream_id,
                state="open",
                num_known_tokens=250,
                num_computed_tokens=250,
                num_shared_tokens=0,
                priority=0,
                idle_s=1.0,
                expected_next_s=None,
                decision="idle",
                reason="everything known of it is computed",
                victim_rank=None,
            )
            for handle in handles
        )
        alone = await measure(cluster, handles, [])
        for limits in ([100], [500], [500] * 8):
            figures = await measure(cluster, handles, limits)
            added_ms = figures.busy_p99_ms() - alone.busy_p99_ms()
            added_slices = added_ms / slice_ms(cluster)
            mean_bytes = sum(figures.frame_bytes) / len(figures.frame_bytes)
            print(
                f"{len(limits)} viewers of {limits[0]}: CPU {100 * figures.cpu_share:.1f} % "
                f"({100 * alone.cpu_share:.1f} % without), lag P99 {figures.p99_ms():.2f} ms "
                f"({alone.p99_ms():.2f} ms), {added_ms:.2f} ms or "
                f"{added_slices:.1f} slices of it computed, "
                f"frames of {mean_bytes / 1000:.1f} kB"
            )
            assert added_slices < MOST_ADDED_SLICES
            assert mean_bytes < MOST_FRAME_BYTES
            assert len(figures.frame_bytes) >= len(limits) * MEASURED_S / 2
