"""An operator empties a server: its streams go elsewhere while their clients stream on."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router import timing
from router.interface import StreamHandle
from streamfill.api import Client
from streamfill.errors import (
    ErrorCode,
    FailedPreconditionError,
    InvalidArgumentError,
    StreamError,
)
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import StreamMode
from streamfill.stream.ids import ServerId
from tests.unit.router.cluster_for_tests import (
    TestCluster,
    answer_of,
    commit_of,
    fast_timing,
    ids,
    until,
)
from tests.unit.router.fake_manager import FakeManager, serve
from tests.unit.router.fake_server import FakeServer, expected_answer

PROMPT = [20, 21, 22, 23]


@pytest.fixture
async def cluster(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TestCluster]:
    fast_timing(monkeypatch)
    monkeypatch.setattr("router.drains.REPEAT_S", 0.05)
    async with TestCluster(tiny_model) as started:
        yield started


async def drain(
    cluster: TestCluster, server: FakeServer, answers_s: float | None = None, force: bool = False
) -> None:
    await cluster.manager.drain_server(ServerId(server.server_id), answers_s, force=force)


def num_streams(cluster: TestCluster, server: FakeServer) -> int:
    infos = {each.server_id: each for each in cluster.manager.info().servers}
    return infos[server.server_id].num_assigned_streams


def reason_of(cluster: TestCluster, server: FakeServer) -> str:
    """Why it drains."""
    infos = {each.server_id: each for each in cluster.manager.info().servers}
    return infos[server.server_id].state_reason


async def expect_answer(cluster: TestCluster, handle: StreamHandle, prompt: list[int]) -> str:
    """The whole answer is right; returns the prefill server that the client was told."""
    tokens, done = await answer_of(handle)
    expected = expected_answer(prompt, len(tokens), cluster.vocab_size)
    assert [token.token_id for token in tokens] == expected
    return done.prefill_server


async def test_open_streams_move_while_their_clients_stream(cluster: TestCluster) -> None:
    """Nothing is lost or doubled of what comes before, during and after the move."""
    first = await cluster.prefill(0)
    handles = [await cluster.open(mode) for mode in (StreamMode.APPEND,) * 6]
    for handle in handles:
        await handle.append(ids(*PROMPT))
    second = await cluster.prefill(1)

    async def client(handle: StreamHandle, seed: int) -> None:
        generator, prompt = random.Random(seed), list(PROMPT)
        for _ in range(30):
            prompt.append(generator.randrange(30, 200))
            await handle.append(ids(prompt[-1]))
            await asyncio.sleep(0.005)
        await handle.commit(commit_of(8))
        assert await expect_answer(cluster, handle, prompt) == second.server_id

    clients = [asyncio.ensure_future(client(each, n)) for n, each in enumerate(handles)]
    await asyncio.sleep(0.05)
    await drain(cluster, first)
    assert cluster.state_of(first) == "draining"
    await asyncio.gather(*clients)
    await until(lambda: num_streams(cluster, first) == 0 and not first.streams)
    assert cluster.manager.info().num_moves == {"drain": 6}
    assert cluster.outcomes() == {"DONE": 6}


async def test_the_old_attempt_ends_once_the_new_server_has_the_prompt(
    cluster: TestCluster,
) -> None:
    """Not before: until then the old server keeps it."""
    first = await cluster.prefill(0)
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await until(lambda: first.streams)
    second = await cluster.prefill(1)
    second.drop_incoming = lambda message: True
    await drain(cluster, first)
    await until(lambda: second.of_type(r.OpenStream))
    await handle.append(ids(24))
    await until(lambda: list(first.streams[handle.stream_id].prompt) == [*PROMPT, 24])
    assert not first.of_type(r.Cancel)
    second.drop_incoming = lambda message: False
    await until(lambda: handle.stream_id not in first.streams)
    assert list(second.streams[handle.stream_id].prompt) == [*PROMPT, 24]
    await handle.commit(commit_of(3))
    await expect_answer(cluster, handle, [*PROMPT, 24])


async def test_a_new_server_that_dies_at_once_costs_nothing(cluster: TestCluster) -> None:
    """The old attempt goes on, with everything that came meanwhile."""
    first = await cluster.prefill(0)
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    second = await cluster.prefill(1)
    second.drop_incoming = lambda message: True
    await drain(cluster, first)
    await handle.append(ids(24))
    await cluster.kill(second)
    await until(lambda: handle.status().acknowledged.num_computed_tokens == 5)
    await until(lambda: num_streams(cluster, first) == 1)
    assert len(first.of_type(r.OpenStream)) == 1
    await handle.commit(commit_of(3))
    assert await expect_answer(cluster, handle, [*PROMPT, 24]) == first.server_id
    cluster.assert_no_load()


async def test_the_old_server_may_die_during_the_move(cluster: TestCluster) -> None:
    """The new attempt goes on."""
    first = await cluster.prefill(0)
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    second = await cluster.prefill(1)
    second.drop_incoming = lambda message: True
    await drain(cluster, first)
    await cluster.kill(first)
    await until(lambda: cluster.state_of(first) == "dead")
    second.drop_incoming = lambda message: False
    await handle.commit(commit_of(3))
    assert await expect_answer(cluster, handle, PROMPT) == second.server_id
    cluster.assert_no_load()


async def test_an_old_attempt_that_fell_too_far_behind_is_ended(cluster: TestCluster) -> None:
    """The new server is deaf for a while; meanwhile the old one loses what the log forgets."""
    first = await cluster.prefill(0)
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await until(lambda: handle.status().acknowledged.num_computed_tokens == 4)
    second = await cluster.prefill(1)
    second.drop_incoming = lambda message: True
    await drain(cluster, first)
    first.drop_incoming = lambda message: isinstance(message, r.Splice) and message.seq < 90
    more = list(range(30, 130))
    for token_id in more:
        await handle.append(ids(token_id))
    await until(lambda: handle.stream_id not in first.streams)
    second.drop_incoming = lambda message: False
    await handle.commit(commit_of(3))
    assert await expect_answer(cluster, handle, [*PROMPT, *more]) == second.server_id
    cluster.assert_no_load()


async def test_a_commit_in_the_middle_of_a_move_goes_to_the_new_server(
    cluster: TestCluster,
) -> None:
    """And the old attempt ends."""
    first = await cluster.prefill(0)
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    second = await cluster.prefill(1)
    second.drop_incoming = lambda message: True
    await drain(cluster, first)
    await handle.commit(commit_of(3))
    await until(lambda: handle.stream_id not in first.streams)
    second.drop_incoming = lambda message: False
    assert await expect_answer(cluster, handle, PROMPT) == second.server_id
    assert not first.of_type(r.Commit)


async def test_kv_that_went_ahead_is_not_lost(cluster: TestCluster) -> None:
    """The new prefill server is told of the same decode server."""
    first = await cluster.prefill(0)
    await cluster.decode(0)
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await cluster.decode(1)
    second = await cluster.prefill(1)
    await drain(cluster, first)
    await until(lambda: second.of_type(r.PushTo))
    assert [message.peer.server_id for message in second.of_type(r.PushTo)] == ["decode-0"]
    await handle.commit(commit_of(3))
    _, done = await answer_of(handle)
    assert (done.prefill_server, done.decode_server) == ("prefill-1", "decode-0")


async def in_mid_answer(
    cluster: TestCluster, role: str
) -> tuple[StreamHandle, FakeServer, FakeServer]:
    """A stream with 4 of 8 tokens, the server of this role that has it, and another one."""
    prefill = await cluster.prefill(0)
    server = await cluster.decode(0) if role == "decode" else prefill
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    server.output_limit = 4
    await handle.commit(commit_of(8))
    await until(lambda: handle.status().num_output_tokens == 4)
    return handle, server, await (cluster.decode(1) if role == "decode" else cluster.prefill(1))


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_answers_are_finished_where_they_are(cluster: TestCluster, role: str) -> None:
    """With no time given they are never moved."""
    handle, server, other = await in_mid_answer(cluster, role)
    await drain(cluster, server)
    await asyncio.sleep(0.2)
    assert num_streams(cluster, server) == 1
    server.output_limit = 100
    await expect_answer(cluster, handle, PROMPT)
    await until(lambda: num_streams(cluster, server) == 0)
    assert not other.streams


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_answers_are_moved_when_their_time_is_over(cluster: TestCluster, role: str) -> None:
    """The client sees each token once; that is no failure of the stream."""
    handle, server, other = await in_mid_answer(cluster, role)
    await drain(cluster, server, answers_s=0.1)
    await expect_answer(cluster, handle, PROMPT)
    assert other.of_type(r.Generate)
    await until(lambda: num_streams(cluster, server) == 0 and not server.streams)
    assert cluster.manager.info().num_moves == {"drain": 1}
    assert (
        cluster.manager.metrics.set.registry.get_sample_value(
            "streamfill_router_attempts_failed_total"
        )
        == 0
    )


async def test_a_commit_that_waits_for_its_first_token_is_moved_too(cluster: TestCluster) -> None:
    """Once its time is over, to another prefill server."""
    first = await cluster.prefill(0)
    first.output_limit = 0
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(4))
    await until(lambda: first.of_type(r.Commit))
    second = await cluster.prefill(1)
    await drain(cluster, first, answers_s=0.0)
    assert await expect_answer(cluster, handle, PROMPT) == second.server_id


async def test_a_decode_server_that_waits_for_a_hand_off_is_left(cluster: TestCluster) -> None:
    """The stream has named it in its commit, and goes to another one when its time is over."""
    prefill = await cluster.prefill(0)
    decode = await cluster.decode(0)
    prefill.output_limit = 0
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(4))
    await until(lambda: prefill.of_type(r.Commit))
    other = await cluster.decode(1)
    await drain(cluster, decode, answers_s=0.0)
    await until(lambda: num_streams(cluster, decode) == 0)
    prefill.output_limit = 100
    await expect_answer(cluster, handle, PROMPT)
    assert other.of_type(r.Generate)
    assert not decode.of_type(r.Generate)
    cluster.assert_no_load()


async def test_nothing_new_comes_until_it_is_resumed(cluster: TestCluster) -> None:
    """Then it is like any other."""
    first, _ = await cluster.prefill(0), await cluster.prefill(1)
    await drain(cluster, first)
    for _ in range(4):
        await cluster.open()
    await asyncio.sleep(0.05)
    assert not first.streams
    info = await cluster.manager.resume_server(ServerId(first.server_id))
    assert (info.state, info.state_reason) == ("alive", "")
    await cluster.open()
    await until(lambda: first.streams)


async def test_a_drained_server_that_crashes_comes_back_drained(cluster: TestCluster) -> None:
    """The wish is of the server's id. One that left in order and comes back is wanted again."""
    first, _ = await cluster.prefill(0), await cluster.prefill(1)
    await drain(cluster, first)
    await cluster.kill(first)
    await until(lambda: cluster.state_of(first) == "dead")
    again = await cluster.prefill(0)
    assert cluster.state_of(again) == "draining"
    await again.send(s.Draining(server_id=again.server_id))
    await until(lambda: reason_of(cluster, again) == "it is stopping")
    await cluster.kill(again)
    await until(lambda: [x.server_id for x in cluster.manager.info().servers] == ["prefill-1"])
    fresh = await cluster.prefill(0)
    assert cluster.state_of(fresh) == "alive"


async def test_the_last_prefill_server_is_not_drained(cluster: TestCluster) -> None:
    """Without force. With it, its streams are still answered, and new ones are refused."""
    prefill = await cluster.prefill(0)
    await cluster.decode(0)
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    with pytest.raises(FailedPreconditionError, match=r"last prefill server.*servers add prefill"):
        await drain(cluster, prefill)
    assert cluster.state_of(prefill) == "alive"
    await drain(cluster, prefill, force=True)
    info = cluster.manager.info()
    assert (info.ready, info.ready_reason) == (
        False,
        "no prefill server takes new streams (1 draining)",
    )
    with pytest.raises(StreamError, match="no prefill server is alive"):
        await cluster.open()
    await handle.commit(commit_of(4))
    await expect_answer(cluster, handle, PROMPT)


async def test_a_drain_is_given_another_time_when_the_other_server_died(
    cluster: TestCluster,
) -> None:
    """It takes nothing new already, so it is not the last one that does."""
    first, second = await cluster.prefill(0), await cluster.prefill(1)
    await drain(cluster, first)
    await cluster.kill(second)
    await until(lambda: cluster.state_of(second) == "dead")
    await drain(cluster, first, answers_s=5.0)
    assert cluster.state_of(first) == "draining"


async def test_streams_wait_for_a_server_that_can_take_them(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody else can hold stays, and goes when somebody comes."""
    monkeypatch.setattr("router.drains.REPEAT_S", 60.0)
    first = await cluster.prefill(0, pool_tokens=4096)
    handle = await cluster.open()
    await handle.append(ids(*range(20, 90)))
    await until(lambda: handle.stream_id in first.streams)
    await cluster.prefill(1, pool_tokens=64)
    await drain(cluster, first)
    await asyncio.sleep(0.1)
    assert handle.stream_id in first.streams
    third = await cluster.prefill(2)
    await until(lambda: handle.stream_id in third.streams)
    await until(lambda: num_streams(cluster, first) == 0)


async def test_unknown_dead_and_leaving_servers(cluster: TestCluster) -> None:
    """Each is refused in words that say which and what there is."""
    first, second = await cluster.prefill(0), await cluster.prefill(1)
    with pytest.raises(StreamError, match=r"'nobody'; living are: prefill-0, prefill-1") as unknown:
        await cluster.manager.drain_server(ServerId("nobody"), None, force=False)
    assert unknown.value.code is ErrorCode.NOT_FOUND
    await first.send(s.Draining(server_id=first.server_id))
    await until(lambda: cluster.state_of(first) == "draining")
    with pytest.raises(FailedPreconditionError, match="stopping by itself"):
        await cluster.manager.resume_server(ServerId(first.server_id))
    await cluster.kill(second)
    await until(lambda: cluster.state_of(second) == "dead")
    with pytest.raises(StreamError, match="'prefill-1'"):
        await cluster.manager.resume_server(ServerId(second.server_id))


async def test_many_streams_through_drains_of_each_server_in_turn(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load, with lost frames: every answer is right, and nothing is left anywhere."""
    generator = random.Random(7)
    monkeypatch.setattr(timing, "REPLACE_WAIT_S", 20.0)
    servers = [await cluster.prefill(n) for n in range(2)]
    servers += [await cluster.decode(n) for n in range(2)]
    for server in servers:
        server.drop_incoming = lambda message: generator.random() < 0.05
        server.drop_outgoing = lambda message: generator.random() < 0.05

    async def client(seed: int) -> None:
        own, prompt = random.Random(seed), list[int]()
        handle = await cluster.open()
        for _ in range(own.randrange(1, 20)):
            prompt.append(own.randrange(30, 200))
            await handle.append(ids(prompt[-1]))
            await asyncio.sleep(own.random() * 0.02)
        await handle.commit(commit_of(own.randrange(1, 12)))
        await expect_answer(cluster, handle, prompt)

    clients = [asyncio.ensure_future(client(seed)) for seed in range(40)]
    for _ in range(2):
        for server in servers:
            await drain(cluster, server, answers_s=0.05)
            await asyncio.sleep(0.08)
            await cluster.manager.resume_server(ServerId(server.server_id))
    await asyncio.gather(*clients)
    assert cluster.outcomes() == {"DONE": 40}
    await until(lambda: not len(cluster.manager._cluster.cancels))
    cluster.assert_no_load()


@pytest.mark.parametrize(
    ("server_id", "answers_s", "words"),
    [("", None, "server_id"), ("x" * 300, None, "server_id"), ("prefill-0", -1.0, "0 or more")],
)
async def test_wishes_that_are_none(server_id: str, answers_s: float | None, words: str) -> None:
    """Are refused before the core is asked."""
    manager = FakeManager()
    async with serve(manager) as target, Client(target) as client:
        with pytest.raises(InvalidArgumentError, match=words):
            await client.drain_server(server_id, move_answers_after_s=answers_s)
        with pytest.raises(InvalidArgumentError, match="server_id"):
            await client.resume_server("")
    assert not manager.drain_calls
    assert not manager.resume_calls
