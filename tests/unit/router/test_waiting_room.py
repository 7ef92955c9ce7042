"""Operations that wait for room: who goes on when, and what is left of those that do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest

from router.admission import AdmissionCounters
from router.interface import Acknowledged, CommitOptions, Segment, StreamHandle
from router.service_replies import cluster_info
from streamfill.errors import (
    FailedPreconditionError,
    ResourceExhaustedError,
    StreamError,
    UnavailableError,
)
from streamfill.messages import server_to_router as s
from streamfill.messages.common import StreamMode
from streamfill.stream.state import StreamState
from tests.unit.router.cluster_for_tests import (
    PATIENCE_S,
    TestCluster,
    answer_of,
    commit_of,
    fast_timing,
    until,
)
from tests.unit.router.fake_server import FakeServer, expected_answer

CAP_TOKENS = 10
MAX_WAITING = 2


@pytest.fixture
async def cluster(tiny_model: Path) -> AsyncIterator[TestCluster]:
    limits = {"max_uncommitted_tokens": CAP_TOKENS, "max_waiting_segments": MAX_WAITING}
    async with TestCluster(tiny_model, **limits) as started:
        yield started
        for session in list(started.manager._sessions.values()):
            session.cancel("the test is over")
        room = started.manager._cluster.room
        await until(lambda: not room._waits)
        assert not room._places
        for server in room._servers.values():
            counters = server.counters()
            assert (counters.num_uncommitted_tokens, counters.num_waiting_segments) == (0, 0)


@pytest.fixture
async def prefill(cluster: TestCluster) -> FakeServer:
    return await cluster.prefill()


def tokens(number: int) -> Segment:
    return Segment(token_ids=[20] * number)


async def holding(
    cluster: TestCluster, number: int, mode: StreamMode = StreamMode.APPEND
) -> StreamHandle:
    """A stream with so many tokens."""
    handle = await cluster.open(mode)
    if number:
        await grow(handle, number)
    return handle


def grow(handle: StreamHandle, number: int, seq: int | None = None) -> asyncio.Task[Acknowledged]:
    """Append, or update to, so many tokens."""
    change = handle.append if handle.mode is StreamMode.APPEND else handle.update
    return asyncio.create_task(change(tokens(number), seq))


def counters(cluster: TestCluster, number: int = 0) -> AdmissionCounters:
    for server in cluster.manager.info().servers:
        if server.server_id == f"prefill-{number}":
            assert server.admission is not None
            return server.admission
    raise AssertionError(f"prefill-{number} is not there")


async def waiting(cluster: TestCluster, *growths: asyncio.Task[Acknowledged]) -> None:
    """They have come to the queue, and are not through."""
    room = cluster.manager._cluster.room
    await until(lambda: len(room._waits) >= len(growths))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not any(growth.done() for growth in growths)


async def soon(work: Awaitable[Any]) -> Any:
    return await asyncio.wait_for(work, PATIENCE_S)


async def test_an_append_waits_until_another_stream_is_committed(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """Nothing of it is recorded or sent meanwhile, and the answer is that of the whole prompt."""
    prefill.output_limit = 0
    first, second = await holding(cluster, 8), await holding(cluster, 2)
    # An operation counts as taken when the router has it: the server may get it later.
    await until(lambda: second.stream_id in prefill.streams)
    await until(lambda: prefill.streams[second.stream_id].prompt)
    growth = grow(second, 3)
    await waiting(cluster, growth)
    assert second.status().acknowledged.num_received_tokens == 2
    assert len(prefill.streams[second.stream_id].prompt) == 2
    assert counters(cluster) == AdmissionCounters(
        num_uncommitted_tokens=10,
        max_uncommitted_tokens=CAP_TOKENS,
        num_waiting_segments=1,
        num_refused_segments=0,
        num_over_cap_segments=0,
    )
    await first.commit(commit_of(1))
    assert (await soon(growth)).num_received_tokens == 5
    prefill.output_limit = 2
    await second.commit(commit_of(2))
    answer, _ = await answer_of(second)
    expected = expected_answer([20] * 5, 2, cluster.vocab_size)
    assert [token.token_id for token in answer] == expected


async def test_they_are_admitted_as_they_came(cluster: TestCluster, prefill: FakeServer) -> None:
    """The one behind waits although it would fit; it comes when the one in front has come."""
    holder = await holding(cluster, 8, StreamMode.UPDATE)
    front, behind = await cluster.open(), await cluster.open()
    large = grow(front, 6)
    await waiting(cluster, large)
    small = grow(behind, 1)
    await waiting(cluster, large, small)
    await soon(grow(holder, 4))
    assert (await soon(large)).num_received_tokens == 6
    await waiting(cluster, small)
    await holder.cancel("no more")
    await soon(small)


async def test_more_than_may_wait_are_refused_at_once(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """The error names every number; the stream is unharmed and may send the segment again."""
    holder = await holding(cluster, 10)
    streams = [await cluster.open() for _ in range(MAX_WAITING)]
    growths = [grow(handle, 1) for handle in streams]
    await waiting(cluster, *growths)
    refused = await cluster.open()
    with pytest.raises(ResourceExhaustedError, match="send the segment again") as caught:
        await grow(refused, 5, seq=1)
    for part in ("5 tokens", "10 tokens on server prefill-0, at most 10", "2 operations", "most 2"):
        assert part in caught.value.message
    assert caught.value.details == {
        "server_id": "prefill-0",
        "num_tokens": 5,
        "held_tokens": 10,
        "limit_tokens": 10,
        "num_waiting": 2,
    }
    assert counters(cluster).num_refused_segments == 1
    await holder.cancel("room")
    assert (await soon(grow(refused, 4, seq=1))).num_received_tokens == 4
    await soon(asyncio.gather(*growths))


async def test_who_waited_too_long_is_refused(tiny_model: Path) -> None:
    """With the time that it waited; its place in the queue is free then."""
    limits = {"max_uncommitted_tokens": 10, "max_waiting_segments": 1, "admission_wait_s": 0.05}
    async with TestCluster(tiny_model, **limits) as cluster:
        await cluster.prefill()
        await holding(cluster, 10)
        handle = await cluster.open(StreamMode.UPDATE)
        for _ in range(2):
            with pytest.raises(ResourceExhaustedError, match=r"waited 0\.05 s") as caught:
                await grow(handle, 3)
            assert caught.value.details["num_waiting"] == 0
        assert counters(cluster).num_refused_segments == 2
        assert counters(cluster).num_waiting_segments == 0


async def test_a_refused_text_leaves_the_prompt_as_it_was(tiny_model: Path) -> None:
    """Also one that was tokenised in a thread: what follows is put behind the old text."""
    limits = {"max_uncommitted_tokens": 20, "admission_wait_s": 0.05}
    async with TestCluster(tiny_model, **limits) as cluster:
        await cluster.prefill(pool_tokens=400_000)
        handle = await cluster.open()
        await handle.append(Segment(text="The quick bro"))
        holder = await holding(cluster, 20 - handle.status().acknowledged.num_received_tokens)
        for refused in ("ad axe", "ad axe " * 800):
            with pytest.raises(ResourceExhaustedError):
                await handle.append(Segment(text=refused))
        await holder.cancel("room")
        await handle.append(Segment(text="wn fox"))
        await handle.commit(commit_of(1))
        answer, _ = await answer_of(handle)
        expected = expected_answer(cluster.encode("The quick brown fox"), 1, cluster.vocab_size)
        assert [token.token_id for token in answer] == expected


async def test_a_commit_is_never_held_back(cluster: TestCluster, prefill: FakeServer) -> None:
    """Nor its final segment, however full the server is and whoever waits."""
    await holding(cluster, 9)
    waits, commits = await holding(cluster, 0), await holding(cluster, 1)
    growth = grow(waits, 5)
    await waiting(cluster, growth)
    await soon(commits.commit(commit_of(1, final_segment=tokens(50))))
    _, done = await answer_of(commits)
    assert done.usage.num_prompt_tokens == 51
    await waiting(cluster, growth)


async def test_a_commit_takes_the_segments_before_it_along(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """An append that waits, and another behind it, are a committed context as well."""
    await holding(cluster, 10)
    handle = await cluster.open()
    growths = [grow(handle, 3)]
    await waiting(cluster, *growths)
    growths.append(grow(handle, 4))
    await asyncio.sleep(0)
    await soon(handle.commit(commit_of(1)))
    assert [growth.result().num_received_tokens for growth in growths] == [3, 7]
    _, done = await answer_of(handle)
    assert done.usage.num_prompt_tokens == 7
    assert counters(cluster).num_uncommitted_tokens == 10


async def test_a_refused_commit_holds_the_next_segment_back_again(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """What it took along is counted as what it is: uncommitted, and above the cap."""
    await holding(cluster, 10)
    handle = await cluster.open()
    growth = grow(handle, 3)
    await waiting(cluster, growth)
    with pytest.raises(StreamError, match="-1"):
        await handle.commit(CommitOptions(final_segment=Segment(token_ids=[-1])))
    assert growth.result().num_received_tokens == 3
    assert counters(cluster).num_uncommitted_tokens == 13
    growth = grow(handle, 1)
    await waiting(cluster, growth)


async def test_an_update_in_front_of_a_refused_commit_makes_room_too(
    cluster: TestCluster, prefill: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit took it along, so it did not ask; it has shrunk its context all the same."""
    monkeypatch.setattr("router.handle.INLINE_CHARS", 0)  # it is still in the tokenizer
    shrinks = await holding(cluster, 10, StreamMode.UPDATE)
    handle = await cluster.open()
    growth = grow(handle, 3)
    await waiting(cluster, growth)
    shrink = asyncio.create_task(shrinks.update(Segment(text="a")))
    await asyncio.sleep(0)
    with pytest.raises(StreamError, match="-1"):
        await shrinks.commit(CommitOptions(final_segment=Segment(token_ids=[-1])))
    assert (await soon(shrink)).num_received_tokens == 1
    assert (await soon(growth)).num_received_tokens == 3


@pytest.mark.parametrize("end", ["cancel", "deadline"])
async def test_a_stream_that_ends_leaves_the_queue_at_once(
    cluster: TestCluster, prefill: FakeServer, end: str
) -> None:
    """Its operation is answered, and the one behind it takes its place."""
    await holding(cluster, 8)
    handle = await cluster.open(deadline_s=2.0 if end == "deadline" else None)
    behind = await cluster.open()
    large = grow(handle, 5)
    await waiting(cluster, large)
    small = grow(behind, 2)
    await waiting(cluster, large, small)
    if end == "cancel":
        await handle.cancel("enough")
    with pytest.raises(FailedPreconditionError, match="has ended"):
        await soon(large)
    assert (await soon(small)).num_received_tokens == 2


async def test_a_call_that_is_given_up_leaves_no_trace(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """Neither in the queue nor in the prompt; its number is free."""
    holder = await holding(cluster, 8)
    handle = await holding(cluster, 2)
    growth = grow(handle, 3, seq=2)
    await waiting(cluster, growth)
    growth.cancel()
    await until(lambda: counters(cluster).num_waiting_segments == 0)
    assert counters(cluster).num_refused_segments == 0
    await holder.cancel("room")
    assert (await soon(grow(handle, 1, seq=2))).num_received_tokens == 3


async def test_a_call_given_up_just_when_it_was_admitted_gives_its_room_back(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """Nothing was recorded, so nothing may be counted; the next one in the queue gets the room."""
    holder = await holding(cluster, 8, StreamMode.UPDATE)
    handle, behind = await holding(cluster, 1), await cluster.open()
    growth = grow(handle, 5)
    await waiting(cluster, growth)
    next_one = grow(behind, 6)
    await waiting(cluster, growth, next_one)
    shrink = grow(holder, 3)
    await asyncio.sleep(0)  # a turn of the loop: the holder shrinks, and wakes the first
    assert counters(cluster).num_waiting_segments == 1
    assert not growth.done()
    growth.cancel()
    await soon(shrink)
    assert (await soon(next_one)).num_received_tokens == 6
    assert counters(cluster).num_uncommitted_tokens == 3 + 1 + 6


async def test_an_update_that_does_not_grow_never_waits(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """It overtakes those that wait, and its room is given to them."""
    first = await holding(cluster, 10, StreamMode.UPDATE)
    growth = grow(await cluster.open(), 4)
    await waiting(cluster, growth)
    await soon(grow(first, 10))
    await waiting(cluster, growth)
    await soon(grow(first, 6))
    await soon(growth)


async def test_a_context_larger_than_the_cap_goes_on_alone(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """Segment by segment, up to its commit."""
    handle = await cluster.open()
    for number in (6, 12, 18):
        assert (await soon(grow(handle, 6))).num_received_tokens == number
    await handle.commit(commit_of(1))
    _, done = await answer_of(handle)
    assert done.usage.num_prompt_tokens == 18
    assert counters(cluster).num_over_cap_segments == 2


async def test_streams_that_all_wait_for_each_other_come_to_their_commits(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """Each needs more than all hold together; one after the other is let above the cap."""
    first, second = await holding(cluster, 5), await holding(cluster, 5)
    one = grow(first, 8)
    await waiting(cluster, one)
    two = grow(second, 8)
    await soon(one)
    await soon(grow(first, 8))
    await waiting(cluster, two)
    await first.commit(commit_of(1))
    await soon(two)
    await second.commit(commit_of(1))
    for handle, number in ((first, 21), (second, 13)):
        _, done = await answer_of(handle)
        assert done.usage.num_prompt_tokens == number
    assert counters(cluster).num_over_cap_segments == 3


async def test_a_stream_whose_server_dies_goes_on_waiting_elsewhere(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the server's other streams came to fill the cap, it waits in the queue there."""
    fast_timing(monkeypatch)
    doomed = await cluster.prefill(0)
    holder, handle = await holding(cluster, 8), await holding(cluster, 2)
    growth = grow(handle, 3)
    await waiting(cluster, growth)
    heir = await cluster.prefill(1)
    await cluster.kill(doomed)
    await until(lambda: holder.stream_id in heir.streams and handle.stream_id in heir.streams)
    await until(lambda: counters(cluster, 1).num_waiting_segments == 1)
    await waiting(cluster, growth)
    assert {server.server_id for server in cluster.manager._cluster.room._servers} == {"prefill-1"}
    await holder.commit(commit_of(1))
    assert (await soon(growth)).num_received_tokens == 5
    await until(lambda: len(heir.streams[handle.stream_id].prompt) == 5)


async def test_without_any_server_it_waits_for_one(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waited already goes on when a server comes; what comes meanwhile is taken at once."""
    fast_timing(monkeypatch)
    doomed = await cluster.prefill(0)
    holder, handle = await holding(cluster, 8), await holding(cluster, 0)
    growth = grow(handle, 3)
    await waiting(cluster, growth)
    await cluster.kill(doomed)
    await until(lambda: not cluster.manager._cluster.room._places)
    await waiting(cluster, growth)
    await soon(grow(holder, 1))
    await holder.cancel("room")
    await cluster.prefill(1)
    assert (await soon(growth)).num_received_tokens == 3


async def test_without_any_server_for_too_long_it_is_unavailable(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not exhausted: there is nothing that could be full."""
    fast_timing(monkeypatch)
    limits = {"max_uncommitted_tokens": 10, "admission_wait_s": 4.0}
    async with TestCluster(tiny_model, **limits) as cluster:
        doomed = await cluster.prefill()
        await holding(cluster, 10)
        growth = grow(await cluster.open(), 3)
        await waiting(cluster, growth)
        await cluster.kill(doomed)
        with pytest.raises(UnavailableError, match="send the segment again"):
            await soon(growth)


async def test_a_draining_server_gives_its_waiting_streams_away(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """They keep to the cap of the other server; room on the one that drains is for nobody."""
    handles = [await holding(cluster, 8), *[await holding(cluster, 1) for _ in range(2)]]
    growths = [grow(handles[1], 3), grow(handles[2], 3)]
    await waiting(cluster, *growths)
    other = await cluster.prefill(1)
    await prefill.send(s.Draining(server_id=prefill.server_id))
    await until(lambda: len(other.streams) == 3)
    await waiting(cluster, *growths)
    assert counters(cluster, 1).num_uncommitted_tokens == CAP_TOKENS
    await handles[0].commit(commit_of(1))
    await soon(asyncio.gather(*growths))


async def test_where_there_is_no_room_to_wait_a_moved_stream_is_refused(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """The queue of the server that it comes to is bounded for everybody."""
    there = await holding(cluster, 10)
    other = await cluster.prefill(1)
    here = [await holding(cluster, 10)]
    growths = []
    for _ in range(2 * MAX_WAITING):
        handle = await cluster.open()
        here.append(handle)
        growths.append(grow(handle, 1))
        await waiting(cluster, *growths)
    assert counters(cluster, 0).num_waiting_segments == MAX_WAITING
    assert counters(cluster, 1).num_waiting_segments == MAX_WAITING
    await other.send(s.Draining(server_id=other.server_id))
    await until(lambda: counters(cluster, 0).num_refused_segments == MAX_WAITING)
    await until(lambda: sum(growth.done() for growth in growths) == MAX_WAITING)
    errors = [growth.exception() for growth in growths if growth.done()]
    assert all(isinstance(error, ResourceExhaustedError) for error in errors)
    states = {handle.status().state for handle in (there, *here)}
    assert states == {StreamState.OPEN}


async def test_new_streams_go_where_there_is_room(cluster: TestCluster) -> None:
    """A server at its cap gets a stream only when all are; the load alone would choose it."""
    first = await cluster.prefill(0)
    holder = await holding(cluster, 10)
    second = await cluster.prefill(1)
    streams = [await cluster.open() for _ in range(4)]
    await until(lambda: first.streams and len(second.streams) == len(streams))
    assert set(first.streams) == {holder.stream_id}


async def test_first_messages_wait_as_any_segment(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """The stream is open when they are in; then it goes on as usual."""
    holder = await holding(cluster, 10)
    chat = [{"role": "user", "content": "Tell me"}]
    opening = asyncio.create_task(cluster.open(messages=chat))
    await until(lambda: counters(cluster).num_waiting_segments == 1)
    assert not opening.done()
    await holder.cancel("room")
    handle = await soon(opening)
    num_tokens = handle.status().acknowledged.num_received_tokens
    assert counters(cluster).num_uncommitted_tokens == num_tokens > 0
    await handle.commit(commit_of(1))
    await answer_of(handle)


async def test_first_messages_without_room_open_no_stream(tiny_model: Path) -> None:
    """RESOURCE_EXHAUSTED, and nothing is left of it."""
    limits = {"max_uncommitted_tokens": 10, "admission_wait_s": 0.05}
    async with TestCluster(tiny_model, **limits) as cluster:
        prefill = await cluster.prefill()
        await holding(cluster, 10)
        with pytest.raises(ResourceExhaustedError, match="waited"):
            await cluster.open(messages=[{"role": "user", "content": "Tell me"}])
        assert cluster.outcomes() == {"REJECTED": 1}
        await until(lambda: len(prefill.streams) == 1)


async def test_an_opening_that_is_given_up_opens_no_stream(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """Its client never heard the stream's id and could not end it."""
    await holding(cluster, 10)
    chat = [{"role": "user", "content": "Tell me"}]
    opening = asyncio.create_task(cluster.open(messages=chat))
    await until(lambda: counters(cluster).num_waiting_segments == 1)
    opening.cancel()
    await until(lambda: cluster.outcomes() == {"ABORTED": 1})
    assert counters(cluster).num_waiting_segments == 0


async def test_a_waiting_stream_is_not_idle(tiny_model: Path) -> None:
    """It is not aborted for silence while it is we who keep it waiting."""
    limits = {"max_uncommitted_tokens": 10, "idle_stream_timeout_s": 1.5}
    async with TestCluster(tiny_model, **limits) as cluster:
        await cluster.prefill()
        holder = await holding(cluster, 10, StreamMode.UPDATE)
        growth = grow(await cluster.open(), 1)
        for _ in range(12):
            await asyncio.sleep(0.15)
            await soon(grow(holder, 10))
        assert not growth.done()
        await holder.cancel("room")
        await soon(growth)


async def test_the_numbers_are_among_the_counters_of_the_server(
    cluster: TestCluster, prefill: FakeServer
) -> None:
    """In the same map as what the server itself reports."""
    await holding(cluster, 4)
    (server,) = cluster_info(cluster.manager.info()).servers
    assert server.counters["num_uncommitted_tokens"] == 4
    assert server.counters["max_uncommitted_tokens"] == CAP_TOKENS
    assert "num_streams" in server.counters


async def test_the_cap_is_eight_pools_by_default(tiny_model: Path) -> None:
    """Of the server in question."""
    async with TestCluster(tiny_model) as cluster:
        await cluster.prefill(pool_tokens=100)
        await holding(cluster, 4)
        assert counters(cluster).max_uncommitted_tokens == 800


async def test_many_clients_at_random_all_come_to_an_answer(tiny_model: Path) -> None:
    """A small cap, a short queue, three servers: nothing hangs, and no count stays."""
    limits = {"max_uncommitted_tokens": 12, "max_waiting_segments": 4, "admission_wait_s": 5.0}
    async with TestCluster(tiny_model, **limits) as cluster:
        servers = [await cluster.prefill(number) for number in range(3)]

        async def client(number: int) -> int:
            handle = await cluster.open()
            for segment in range(1 + number % 5):
                while True:
                    try:
                        await grow(handle, 1 + (number * segment) % 7)
                        break
                    except ResourceExhaustedError:
                        await asyncio.sleep(0.005)
            await handle.commit(commit_of(1))
            _, done = await answer_of(handle)
            return done.usage.num_prompt_tokens

        got = await asyncio.wait_for(asyncio.gather(*map(client, range(60))), 60)
        assert got == [
            sum(1 + (number * segment) % 7 for segment in range(1 + number % 5))
            for number in range(60)
        ]
        await until(lambda: not any(server.streams for server in servers))
        for number in range(3):
            assert counters(cluster, number).num_uncommitted_tokens == 0
