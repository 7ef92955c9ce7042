"""A router with a placement policy, and servers that report what they hold."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from router.placement.interface import PlacementReason
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.stream.prefix_blocks import block_keys, pack_keys
from tests.unit.router.cluster_for_tests import (
    TestCluster,
    answer_of,
    commit_of,
    fast_timing,
    ids,
    until,
)
from tests.unit.router.fake_server import FakeServer, expected_answer

BLOCK_TOKENS = 32
DOCUMENT = list(range(20, 120))
"""Three whole blocks."""
OTHER = list(range(500, 600))
PIECES = (DOCUMENT[:40], DOCUMENT[40:])


@pytest.fixture
async def clusters(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """Starts a router with a policy, and two prefill servers."""
    fast_timing(monkeypatch)
    started: list[TestCluster] = []

    async def start(placement: str, **options: Any) -> TestCluster:
        cluster = TestCluster(tiny_model, placement=placement, **options)
        await cluster.__aenter__()
        started.append(cluster)
        for number in range(2):
            await cluster.prefill(number)
        return cluster

    yield start
    for cluster in started:
        await cluster.__aexit__()


def _watched(server: FakeServer) -> list[int]:
    return [m.block_tokens for m in server.received if isinstance(m, r.WatchResidency)]


def _report(seq: int, *prompts: list[int], after_seq: int | None = None) -> s.Residency:
    keys = [key for prompt in prompts for key in block_keys(prompt, BLOCK_TOKENS)]
    return s.Residency(
        block_tokens=BLOCK_TOKENS,
        after_seq=seq - 1 if after_seq is None else after_seq,
        seq=seq,
        is_complete=after_seq is None,
        stored=pack_keys(keys),
    )


async def _read(cluster: TestCluster, *pieces: list[int]) -> Any:
    handle = await cluster.open()
    for piece in pieces:
        await handle.append(ids(*piece))
    return handle


async def _finish(cluster: TestCluster, handle: Any, prompt: list[int]) -> Any:
    await handle.commit(commit_of(2))
    tokens, done = await answer_of(handle)
    assert [token.token_id for token in tokens] == expected_answer(prompt, 2, cluster.vocab_size)
    return done


async def test_agents_that_read_one_document_share_a_server(clusters: Any) -> None:
    """Although the other one is idle, and before any server reported anything; another document
    goes to the other one. Nobody notices: no attempt failed, and nothing was sent twice."""
    cluster = await clusters("cache-aware")
    readers = [await _read(cluster, *PIECES) for _ in range(3)]
    other = await _read(cluster, OTHER)
    dones = [await _finish(cluster, handle, DOCUMENT) for handle in readers]
    assert len({done.prefill_server for done in dones}) == 1
    assert {done.num_attempts for done in dones} == {1}
    value = cluster.manager.metrics.set.registry.get_sample_value
    chosen = {"role": "prefill", "outcome": "chosen"}
    assert value("streamfill_router_placements_total", chosen) >= 4
    assert value("streamfill_router_streams_placed_anew_total") >= 1
    reasons = {
        reason: value("streamfill_router_placement_choices_total", {"reason": reason.value})
        for reason in PlacementReason
    }
    assert sum(reasons.values()) == value("streamfill_router_placements_total", chosen)
    assert reasons[PlacementReason.AFFINITY] >= 2
    found_tokens = value("streamfill_router_placement_found_tokens_total")
    assert found_tokens >= BLOCK_TOKENS * 2
    assert found_tokens < value("streamfill_router_placement_prompt_tokens_total")
    await until(lambda: value("streamfill_router_placement_info", {"policy": "cache-aware"}) == 1)
    assert (await _finish(cluster, other, OTHER)).prefill_server not in {
        done.prefill_server for done in dones
    }
    await until(lambda: all(not server.streams for server in cluster.servers))
    cluster.assert_no_load()


async def test_least_loaded_spreads_them(clusters: Any) -> None:
    """The same readers, as ever; and no server is asked what it holds."""
    cluster = await clusters("least-loaded")
    readers = [await _read(cluster, *PIECES) for _ in range(2)]
    dones = [await _finish(cluster, handle, DOCUMENT) for handle in readers]
    assert len({done.prefill_server for done in dones}) == 2
    assert not any(_watched(server) for server in cluster.servers)


async def test_a_prompt_goes_where_a_server_says_that_it_is(clusters: Any) -> None:
    """After a complete report, and after a change; also when it comes with the commit only."""
    cluster = await clusters("cache-aware")
    first, second = cluster.servers
    await until(lambda: _watched(first) == _watched(second) == [BLOCK_TOKENS])
    await second.send(_report(1))
    await second.send(_report(2, DOCUMENT, after_seq=1))
    await first.send(_report(1))
    placed = cluster.manager._cluster.placer.policy
    await until(lambda: placed.view.held("prefill-1"))
    streamed = await _finish(cluster, await _read(cluster, *PIECES), DOCUMENT)
    assert streamed.prefill_server == "prefill-1"
    handle = await cluster.open()
    await handle.commit(commit_of(2, final_segment=ids(*DOCUMENT)))
    assert (await answer_of(handle))[1].prefill_server == "prefill-1"


async def test_a_lost_report_is_asked_for(clusters: Any) -> None:
    """A report behind another one than the newest is a gap; the answer is a question."""
    cluster = await clusters("cache-aware")
    server = cluster.servers[0]
    await until(lambda: _watched(server))
    await server.send(_report(1))
    await server.send(_report(3, DOCUMENT, after_seq=2))
    await until(lambda: len(_watched(server)) == 2)
    value = cluster.manager.metrics.set.registry.get_sample_value
    await until(lambda: value("streamfill_router_residency_gaps_total") == 1)
    assert value("streamfill_router_residency_asked_total") >= 3
    assert value("streamfill_router_residency_awaited") == 2
    view = cluster.manager._cluster.placer.policy.view
    assert not view.held("prefill-0")
    await server.send(_report(3, DOCUMENT))
    await until(lambda: view.held("prefill-0") == set(block_keys(DOCUMENT, BLOCK_TOKENS)))
    await until(lambda: value("streamfill_router_residency_awaited") == 1)


async def test_a_broken_report_is_answered(clusters: Any) -> None:
    """And changes nothing."""
    cluster = await clusters("cache-aware")
    server = cluster.servers[0]
    await until(lambda: _watched(server))
    broken = s.Residency(
        block_tokens=BLOCK_TOKENS, after_seq=0, seq=1, is_complete=True, stored=b"123"
    )
    await server.send(broken)
    await until(lambda: server.of_type(r.Malformed))
    await server.send(_report(1, DOCUMENT))
    view = cluster.manager._cluster.placer.policy.view
    await until(lambda: view.held("prefill-0"))


async def test_what_a_dead_server_held_is_forgotten(clusters: Any) -> None:
    """Its successor under the same id is asked anew."""
    cluster = await clusters("cache-aware")
    server = cluster.servers[0]
    await until(lambda: _watched(server))
    await server.send(_report(1, DOCUMENT))
    view = cluster.manager._cluster.placer.policy.view
    await until(lambda: view.held("prefill-0"))
    await cluster.kill(server)
    successor = await cluster.prefill(0)
    await until(lambda: _watched(successor))
    assert not view.held("prefill-0")


async def test_a_stream_that_moved_loses_nothing(clusters: Any) -> None:
    """Its first server forgets it, its second has all; the client's numbers go on."""
    cluster = await clusters("cache-aware")
    await _read(cluster, *PIECES)
    handle = await cluster.open()  # at the idle server
    first, second = cluster.servers
    await until(lambda: first.of_type(r.OpenStream) and second.of_type(r.OpenStream))
    for number, piece in enumerate(PIECES):
        acknowledged = await handle.append(ids(*piece), client_seq=number + 1)
        assert acknowledged.client_seq == number + 1
    await until(lambda: {len(first.streams), len(second.streams)} == {0, 2})
    done = await _finish(cluster, handle, DOCUMENT)
    assert done.num_attempts == 1
    assert done.usage.num_prompt_tokens == len(DOCUMENT)


async def test_a_chat_is_placed_by_its_first_messages(clusters: Any) -> None:
    """They come with the opening, and are sent once."""
    cluster = await clusters("dualmap", placement_options={"prefix_tokens": "8"})
    messages = [{"role": "user", "content": "Read this long letter, please: " + "word " * 40}]
    servers = []
    for _ in range(3):
        handle = await cluster.open(messages=messages)
        await handle.commit(commit_of(2))
        servers.append((await answer_of(handle))[1].prefill_server)
    assert len(set(servers)) == 1


async def test_pull_passes_a_full_server_by(clusters: Any) -> None:
    """A context that would have to wait for room goes where there is some."""
    cluster = await clusters("pull", max_uncommitted_tokens=150)
    readers = [await _read(cluster, [base + n for n in range(100)]) for base in (100, 300)]
    short = await cluster.open()
    await short.append(ids(*range(20, 40)))
    places = [_place(cluster, handle) for handle in (*readers, short)]
    assert len(set(places[:2])) == 2
    await readers[0].cancel("not needed")
    await until(lambda: len(cluster.manager._cluster.room._places) == 2)
    late = await _read(cluster, list(range(500, 620)))
    assert _place(cluster, late) == places[0]


def _place(cluster: TestCluster, handle: Any) -> str:
    return cluster.manager._cluster.room._places[handle.stream_id].server_id


async def test_the_policy_in_force_is_shown(clusters: Any) -> None:
    """With its options."""
    cluster = await clusters("dualmap", placement_options={"slack_tokens": "512"})
    assert cluster.manager.info().placement == "dualmap(slack_tokens=512)"
