"""Streams leave a busy prefill server for an idle one, over real sockets, with servers that compute
nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from router.interface import StreamHandle
from router.rebalance import HotWatch, ServerBacklog
from streamfill.messages import router_to_server as r
from streamfill.stream.ids import ServerId
from tests.unit.router.cluster_for_tests import (
    TestCluster,
    answer_of,
    commit_of,
    fast_timing,
    ids,
    until,
)
from tests.unit.router.fake_server import FakeServer, expected_answer

PROMPT = list(range(20, 120))
NUM_STREAMS = 6
SPEED = 100
"""Tokens that the busy server says to compute in a second, so 600 tokens take six."""


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    fast_timing(monkeypatch)
    monkeypatch.setattr("router.rebalancer.LOOK_EVERY_S", 0.1)


async def _work(server: FakeServer) -> None:
    """The server says that it computes something, slowly, and has more to do."""
    while True:
        await asyncio.sleep(0.1)
        server.num_computed += SPEED // 10
        server.num_pending = 1


@asynccontextmanager
async def hot_cluster(
    model: Path, **config: bool
) -> AsyncIterator[tuple[TestCluster, FakeServer, list[StreamHandle]]]:
    """A busy server with streams of which it computed nothing."""
    async with TestCluster(model, **config) as cluster:
        busy = await cluster.prefill(0)
        busy.hold_progress = True
        worker = asyncio.ensure_future(_work(busy))
        try:
            handles = [await cluster.open() for _ in range(NUM_STREAMS)]
            for handle in handles:
                await handle.append(ids(*PROMPT))
            yield cluster, busy, handles
        finally:
            worker.cancel()


def num_moved(cluster: TestCluster) -> int:
    return cluster.manager.info().num_moves.get("balance", 0)


async def test_streams_go_to_an_idle_server_and_stay_there(tiny_model: Path) -> None:
    """About half of them, each once; every answer is right, and the metric says how many."""
    async with hot_cluster(tiny_model) as (cluster, busy, handles):
        await asyncio.sleep(0.3)
        idle = await cluster.prefill(1)
        idle.hold_progress = True
        await until(lambda: num_moved(cluster) >= 2)
        await asyncio.sleep(2.0)
        assert 2 <= num_moved(cluster) <= NUM_STREAMS // 2
        assert len(idle.streams) == num_moved(cluster)
        assert len(busy.streams) == NUM_STREAMS - len(idle.streams)
        assert len(busy.of_type(r.OpenStream)) == NUM_STREAMS
        metrics = cluster.manager.metrics.set.registry
        name, labels = "streamfill_router_streams_moved_total", {"reason": "balance"}
        assert metrics.get_sample_value(name, labels) == num_moved(cluster)
        for handle in handles:
            await handle.commit(commit_of(3))
            tokens, _ = await answer_of(handle)
            expected = expected_answer(PROMPT, 3, cluster.vocab_size)
            assert [token.token_id for token in tokens] == expected
        await until(lambda: not len(cluster.manager._cluster.cancels))
        cluster.assert_no_load()


async def test_a_server_alone_is_not_hot(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the other one goes, and another comes, the time without a break begins anew."""
    looks: list[int] = []

    class Watch(HotWatch):
        def look(self, servers: Sequence[ServerBacklog], now_s: float) -> frozenset[ServerId]:
            looks.append(len(servers))
            return super().look(servers, now_s)

    monkeypatch.setattr("router.rebalancer.HotWatch", Watch)
    async with hot_cluster(tiny_model) as (cluster, _, _handles):
        idle = await cluster.prefill(1)
        await until(lambda: 2 in looks)
        await cluster.kill(idle)
        await until(lambda: looks[-1] == 1)
        assert not num_moved(cluster)


async def test_it_can_be_switched_off(tiny_model: Path) -> None:
    """By the configuration."""
    async with hot_cluster(tiny_model, rebalance=False) as (cluster, busy, _):
        idle = await cluster.prefill(1)
        await asyncio.sleep(2.5)
        assert num_moved(cluster) == 0
        assert not idle.streams
        assert len(busy.streams) == NUM_STREAMS


async def test_servers_that_take_nothing_new_get_nothing(tiny_model: Path) -> None:
    """One that drains is no target, however idle it is."""
    async with hot_cluster(tiny_model) as (cluster, busy, _):
        idle = await cluster.prefill(1)
        await cluster.manager.drain_server(ServerId(idle.server_id), None, force=False)
        await asyncio.sleep(2.5)
        assert num_moved(cluster) == 0
        assert len(busy.streams) == NUM_STREAMS


async def test_committed_streams_stay(tiny_model: Path) -> None:
    """Whatever waits with them."""
    async with hot_cluster(tiny_model) as (cluster, busy, handles):
        busy.output_limit = 0
        for handle in handles:
            await handle.commit(commit_of(3))
        idle = await cluster.prefill(1)
        await asyncio.sleep(2.5)
        assert num_moved(cluster) == 0
        assert not idle.streams
        busy.output_limit = 100
        for handle in handles:
            await answer_of(handle)
