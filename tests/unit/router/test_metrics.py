"""What the router counts, scraped while fake servers do its work."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from router import metrics as router_metrics
from router.ended_streams import MAX_QUEUED, EndedStream, EndedStreams
from router.interface import Segment
from streamfill.messages.common import StreamMode
from streamfill.observability.exposition import MetricsServer
from streamfill.observability.lifetime import LifetimeEntry, LifetimeEvent, inter_token_s
from streamfill.observability.metric_values import MetricSet
from streamfill.observability.metrics import Metric, Owner
from streamfill.stream.state import StreamState
from tests.support.metrics import Scrape, scrape
from tests.unit.router.cluster_for_tests import (
    PATIENCE_S,
    TestCluster,
    answer_of,
    commit_of,
    fast_timing,
    text,
    until,
)


@pytest.fixture(autouse=True)
def _published_often(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_timing(monkeypatch)
    monkeypatch.setattr(router_metrics, "PUBLISH_INTERVAL_S", 0.0)
    monkeypatch.setattr("router.manager.PUBLISH_INTERVAL_S", 0.0)


@pytest.fixture
async def cluster(tiny_model: Path) -> AsyncIterator[TestCluster]:
    async with TestCluster(tiny_model) as started:
        yield started


@pytest.fixture
def port(cluster: TestCluster) -> Iterator[int]:
    registry = cluster.manager.metrics.set.registry
    server = MetricsServer(registry, host="127.0.0.1", port=0, section="router")
    yield server.port
    server.close()


async def scraped(port: int) -> Scrape:
    return await asyncio.to_thread(scrape, port)


async def ended(port: int, num_streams: int) -> Scrape:
    """The page when the figures of so many streams are in."""
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        page = await scraped(port)
        if page.count(Metric.STREAM_TIME) == num_streams:
            return page
        assert time.monotonic() < deadline_s, "the figures never came"
        await asyncio.sleep(0.02)


async def test_a_stream_from_its_opening_to_its_end(cluster: TestCluster, port: int) -> None:
    """Segments, tokens in and out, the hand-off, and the waits by the lifetime's functions."""
    await cluster.prefill(), await cluster.decode()
    handle = await cluster.open()
    await handle.append(text("The quick brown fox"))
    await handle.append(text(" jumps over"))
    before = await scraped(port)
    assert before.value(Metric.STREAMS_OPENED, mode="append") == 1
    assert before.value(Metric.SEGMENTS, mode="append") == 2
    await handle.commit(commit_of(8, final_segment=text(" the lazy dog.")))
    _, done = await answer_of(handle)
    page = await ended(port, 1)
    assert page.value(Metric.SEGMENTS, mode="append") == 3
    assert page.total(Metric.TOKENS_IN) >= done.usage.num_prompt_tokens
    assert page.value(Metric.TOKENS_OUT) == 8
    assert page.value(Metric.STREAMS_ENDED, outcome="DONE") == 1
    assert page.total(Metric.STREAMS_ENDED) == 1
    assert page.value(Metric.HANDOFFS, outcome="done") == 1
    assert page.value(Metric.PLACEMENTS, role="prefill", outcome="chosen") >= 1
    assert page.value(Metric.PLACEMENTS, role="decode", outcome="chosen") >= 1
    assert page.total(Metric.PLACEMENT_CHOICES) == page.value(
        Metric.PLACEMENTS, role="prefill", outcome="chosen"
    )
    gaps_s = inter_token_s(done.lifetime.entries)
    assert page.count(Metric.INTER_TOKEN) == len(gaps_s) == 7
    assert page.sum(Metric.INTER_TOKEN) == pytest.approx(sum(gaps_s))
    for metric in (Metric.TTFT_COMMIT, Metric.TTFT_SEGMENT, Metric.PREFILL_QUEUE):
        assert page.count(metric) == 1
    assert page.count(Metric.TOKENISE) == 3


async def test_open_streams_by_state(cluster: TestCluster, port: int) -> None:
    """Published by the housekeeping, and back at zero when they have ended."""
    await cluster.prefill()
    handles = [await cluster.open(), await cluster.open(StreamMode.UPDATE)]
    await until(lambda: _num_open(cluster, StreamState.OPEN) == 2)
    page = await scraped(port)
    assert page.value(Metric.OPEN_STREAMS, state="OPEN") == 2
    assert page.value(Metric.OPEN_STREAMS, state="DECODING") == 0
    for handle in handles:
        await handle.cancel("enough")
    page = await ended(port, 2)
    assert page.value(Metric.STREAMS_ENDED, outcome="ABORTED") == 2
    await until(lambda: not cluster.manager.metrics._snapshot.num_open_by_state)
    assert (await scraped(port)).total(Metric.OPEN_STREAMS) == 0


async def test_servers_by_state_and_one_that_died(cluster: TestCluster, port: int) -> None:
    """A dead server is counted as dead, its streams' attempts as failed and tried again."""
    first, second = await cluster.prefill(0), await cluster.prefill(1)
    handle = await cluster.open()
    await handle.append(text("some words"))
    await until(lambda: first.streams or second.streams)
    victim = first if first.streams else second
    await cluster.kill(victim)
    await until(lambda: cluster.state_of(victim) == "dead")
    await handle.commit(commit_of(2))
    await answer_of(handle)
    page = await ended(port, 1)
    assert page.value(Metric.SERVERS, role="prefill", state="alive") == 1
    assert page.value(Metric.SERVERS, role="prefill", state="dead") == 1
    assert page.value(Metric.SERVERS, role="decode", state="alive") == 0
    assert page.value(Metric.ATTEMPTS_FAILED) == page.value(Metric.RETRIES) == 1
    assert page.value(Metric.READY) == 1


async def test_bad_frames_are_counted(cluster: TestCluster, port: int) -> None:
    """As in the status."""
    server = await cluster.prefill()
    await server.send_raw(b"\x00 no message")
    await until(lambda: cluster.manager.metrics._snapshot.num_malformed_frames)
    assert (await scraped(port)).value(Metric.ROUTER_MALFORMED) == 1


async def test_waits_for_room(tiny_model: Path) -> None:
    """An operation that waited is observed with how it ended; the queue is a gauge."""
    async with TestCluster(tiny_model, max_uncommitted_tokens=100) as cluster:
        await cluster.prefill()
        registry = cluster.manager.metrics.set.registry
        server = MetricsServer(registry, host="127.0.0.1", port=0, section="router")
        try:
            holder, other = await cluster.open(), await cluster.open()
            await holder.append(Segment(token_ids=[5] * 90))
            waiting = asyncio.create_task(other.append(Segment(token_ids=[6] * 50)))
            await until(lambda: _num_waiting(cluster) == 1)
            page = await scraped(server.port)
            assert page.value(Metric.WAITING_SEGMENTS, server="prefill-0") == 1
            assert page.value(Metric.UNCOMMITTED_LIMIT, server="prefill-0") == 100
            await holder.cancel("room")
            await waiting
            page = await scraped(server.port)
            name = Metric.ADMISSION_WAIT.spec.name
            assert page.value(f"{name}_count", outcome="admitted") == 1
            assert page.value(f"{name}_sum", outcome="admitted") > 0
        finally:
            server.close()


def _num_open(cluster: TestCluster, state: StreamState) -> int:
    return cluster.manager.metrics._snapshot.num_open_by_state.get(state, 0)


def _num_waiting(cluster: TestCluster) -> int:
    admissions = [server.admission for server in cluster.manager.metrics._snapshot.servers]
    return sum(each.num_waiting_segments for each in admissions if each is not None)


async def test_a_scrape_does_not_wait_for_the_loop(cluster: TestCluster, port: int) -> None:
    """The loop stands still until the page is there, which says for how long it stood."""
    await cluster.prefill()
    page: list[Scrape] = []

    def scrape_later() -> None:
        time.sleep(0.3)
        page.append(scrape(port))

    scraping = threading.Thread(target=scrape_later)
    scraping.start()
    scraping.join(PATIENCE_S)  # in the loop, which is to stand still
    assert page, "the page waits for the loop"
    assert page[0].value(Metric.LOOP_AGE, process="router") > 0.1


async def test_everything_of_the_router_is_there(cluster: TestCluster, port: int) -> None:
    """Each metric that the enum gives to the router is exported."""
    await cluster.prefill(), await cluster.decode()
    handle = await cluster.open()
    await handle.append(text("a b c"))
    await until(lambda: len(cluster.manager.metrics._snapshot.servers) == 2)
    await until(lambda: all(s.policy for s in cluster.manager.metrics._snapshot.servers))
    await until(lambda: any(s.admission for s in cluster.manager.metrics._snapshot.servers))
    page = await scraped(port)
    wanted = {
        metric.spec.name.removesuffix("_total")
        for metric in Metric
        if metric.spec.owner in (Owner.ROUTER, Owner.EVERY)
    }
    ours = {name for name in page.names if name.startswith("streamfill_")}
    assert ours == wanted


def ended_stream(entries: list[LifetimeEntry]) -> EndedStream:
    return EndedStream(
        stream_id=1,
        request_id="",
        mode="append",
        outcome="DONE",
        error="",
        entries=entries,
        prefill_server="p",
        decode_server="d",
        handoff="done",
        num_attempts=1,
        num_prompt_tokens=1,
        num_output_tokens=1,
    )


ENTRIES = [
    LifetimeEntry(LifetimeEvent.OPENED, 1.0),
    LifetimeEntry(LifetimeEvent.DONE, 3.0),
]


def test_a_flood_of_ended_streams_is_bounded_and_counted() -> None:
    """What the thread cannot take is left out of the figures, and said to be."""
    metrics = MetricSet("router", lambda: 0.0)
    ended = EndedStreams(metrics)
    for _ in range(MAX_QUEUED + 7):
        ended.add(ended_stream(ENTRIES))
    ended.start()
    ended.close()
    value = metrics.registry.get_sample_value
    assert value(Metric.LIFETIMES_LOST.spec.name) == 7
    assert value(f"{Metric.STREAM_TIME.spec.name}_count", {"outcome": "DONE"}) == MAX_QUEUED
    assert value(f"{Metric.STREAM_TIME.spec.name}_sum", {"outcome": "DONE"}) == 2.0 * MAX_QUEUED


def test_one_stream_that_fails_does_not_stop_the_others() -> None:
    """Whatever the consumer behind the figures does."""
    ended = EndedStreams(MetricSet("router", lambda: 0.0))
    taken: list[int] = []

    def then(stream: EndedStream) -> None:
        taken.append(stream.stream_id)
        if len(taken) == 1:
            raise RuntimeError("a bug")

    ended.then = then
    ended.start()
    for _ in range(3):
        ended.add(ended_stream(ENTRIES))
    ended.close()
    assert len(taken) == 3
