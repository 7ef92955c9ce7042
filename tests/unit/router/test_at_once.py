"""Segments that are applied without waiting: the same as the others, or nothing happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

from router import handle
from router.interface import Segment, StreamHandle
from router.manager import Manager
from router.session import Session
from streamfill.errors import FailedPreconditionError, InvalidArgumentError
from streamfill.messages import router_to_server as r
from streamfill.messages.codec import unpack_ids
from streamfill.messages.common import StreamMode
from streamfill.stream.ids import ServerId, StreamId
from tests.unit.router.cluster_for_tests import (
    TestCluster,
    answer_of,
    commit_of,
    ids,
    text,
    until,
)
from tests.unit.router.fake_server import FakeServer, expected_answer

CAP_TOKENS = 100
WORDS = ("the ", "quick", " brown", "fox ", "jümps", "🦊", "", " ", "<s>", "\n")


@pytest.fixture
async def cluster(tiny_model: Path) -> AsyncIterator[TestCluster]:
    async with TestCluster(tiny_model, placement="least-loaded") as started:
        yield started


def session_of(manager: Manager, stream: StreamHandle) -> Session:
    return manager._sessions[StreamId(stream.stream_id)]


def splices(server: FakeServer, stream: StreamHandle) -> list[tuple[int, int, list[int]]]:
    """What the server was sent of the stream."""
    return [
        (each.seq, each.keep_tokens, list(unpack_ids(each.token_ids)))
        for each in server.of_type(r.Splice)
        if each.stream_id == stream.stream_id
    ]


async def change(stream: StreamHandle, segment: Segment, client_seq: int | None = None) -> None:
    """The way that may wait."""
    method = stream.append if stream.mode is StreamMode.APPEND else stream.update
    await method(segment, client_seq)


@pytest.mark.parametrize("mode", list(StreamMode))
async def test_the_server_gets_the_same(cluster: TestCluster, mode: StreamMode) -> None:
    """Random segments, applied at once to one stream and in turn to another."""
    server = await cluster.prefill()
    at_once, in_turn = await cluster.open(mode), await cluster.open(mode)
    random = Random(5)
    for number in range(60):
        if random.random() < 0.4:
            segment = ids(*random.choices(range(20, 90), k=random.randint(0, 6)))
        else:
            segment = text("".join(random.choices(WORDS, k=random.randint(0, 5))))
        assert at_once.change_at_once(segment, number + 1)
        await change(in_turn, segment, number + 1)
        received = at_once.acknowledged().num_received_tokens
        assert received == in_turn.acknowledged().num_received_tokens
    assert at_once.acknowledged().client_seq == 60
    events = [
        [(entry.event, entry.segment) for entry in session.lifetime.entries]
        for session in (session_of(cluster.manager, each) for each in (at_once, in_turn))
    ]
    computed = {"SEGMENT_COMPUTED"}
    first, second = ([e for e in each if str(e[0]) not in computed] for each in events)
    assert first == second
    for stream in (at_once, in_turn):
        await stream.commit(commit_of(4))
    assert [t.token_id for t in (await answer_of(at_once))[0]] == [
        t.token_id for t in (await answer_of(in_turn))[0]
    ]
    assert splices(server, at_once) == splices(server, in_turn)


async def test_what_must_wait_or_is_wrong_is_not_done(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing happens; the other way does it, or says what is wrong."""
    await cluster.prefill()
    stream = await cluster.open()
    assert stream.change_at_once(ids(20, 21), 1)
    before = stream.acknowledged()

    assert not stream.change_at_once(ids(22), 1), "applied already"
    assert not stream.change_at_once(ids(22), 3), "behind a gap"
    assert not stream.change_at_once(ids(10**9), 2), "not in the vocabulary"
    with pytest.raises(InvalidArgumentError):
        await stream.append(ids(10**9), 2)
    monkeypatch.setattr(handle, "INLINE_CHARS", 3)
    assert not stream.change_at_once(text("four"), 3), "a thread is to tokenise it"
    assert stream.acknowledged() == before

    assert stream.change_at_once(ids(23), 3), "number 2 was refused, so this is the next"
    await stream.commit(commit_of(3), 4)
    assert not stream.change_at_once(ids(24), 5), "committed"
    with pytest.raises(FailedPreconditionError):
        await stream.append(ids(24), 5)
    tokens, _ = await answer_of(stream)
    prompt = [20, 21, 23]
    assert [t.token_id for t in tokens] == expected_answer(prompt, 3, cluster.vocab_size)


async def test_nobody_is_overtaken(cluster: TestCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """While an operation has its turn, the next one waits for its own."""
    await cluster.prefill()
    stream = await cluster.open()
    monkeypatch.setattr(handle, "INLINE_CHARS", 3)
    first = asyncio.ensure_future(stream.append(text("first"), 1))
    await asyncio.sleep(0)
    assert not stream.change_at_once(ids(20), 2)
    await first
    assert stream.change_at_once(ids(20), 2)


async def test_a_full_server_makes_it_wait(tiny_model: Path) -> None:
    """Without room for all of it nothing of the draft is left."""
    async with TestCluster(tiny_model, max_uncommitted_tokens=CAP_TOKENS) as cluster:
        await cluster.prefill()
        holder = await cluster.open()
        assert holder.change_at_once(ids(*[20] * (CAP_TOKENS - 10)))
        stream = await cluster.open()
        before = stream.acknowledged()
        assert not stream.change_at_once(text("one two three four five six seven eight nine ten"))
        assert stream.acknowledged() == before
        assert stream.change_at_once(ids(*[21] * 10)), "there is room for so many"
        waiting = asyncio.ensure_future(stream.append(text(" eleven")))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        assert not holder.change_at_once(ids(22)), "somebody waits already"
        await holder.cancel("room")
        await waiting
        await stream.commit(commit_of(2))
        tokens, _ = await answer_of(stream)
        prompt = [21] * 10 + cluster.tokenizer.encode(" eleven", add_special_tokens=False)
        assert [t.token_id for t in tokens] == expected_answer(prompt, 2, cluster.vocab_size)
        await until(lambda: not cluster.manager._sessions)
        cluster.assert_no_load()


async def test_streams_of_the_log_wait_for_it(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing is acknowledged before it is durable."""
    log_file = str(tmp_path / "router.db")
    async with TestCluster(tiny_model, log="sqlite", log_file=log_file) as cluster:
        await cluster.prefill()
        stream = await cluster.open(is_resumable=True)
        assert not stream.change_at_once(ids(20), 1)
        assert (await stream.append(ids(20), 1)).num_received_tokens == 1


async def test_a_new_server_changes_the_limits(cluster: TestCluster) -> None:
    """The smallest pool counts, from the moment on that its server is there until it is gone."""
    await cluster.prefill(0, pool_tokens=500)
    stream = await cluster.open()
    assert stream.change_at_once(ids(*[20] * 300))
    small = await cluster.prefill(1, pool_tokens=350)
    assert not stream.change_at_once(ids(*[20] * 100))
    with pytest.raises(InvalidArgumentError, match="takes 350"):
        await stream.append(ids(*[20] * 100))
    await cluster.kill(small)
    await until(lambda: cluster.state_of(small) == "dead")
    assert stream.change_at_once(ids(*[20] * 100))


async def test_what_a_server_has_is_forgotten(cluster: TestCluster) -> None:
    """An idle stream keeps its ids and not the way that they came."""
    await cluster.prefill()
    stream = await cluster.open()
    for number in range(20):
        assert stream.change_at_once(ids(20 + number))
    log = session_of(cluster.manager, stream).prompt.log
    await until(lambda: stream.acknowledged().num_computed_tokens == 20)
    assert not log._history
    assert list(log.ids) == list(range(20, 40))


async def test_nothing_is_forgotten_that_the_other_server_of_a_move_lacks(
    cluster: TestCluster,
) -> None:
    """The new server is deaf, so the old one goes on; it lost what came meanwhile."""
    old = await cluster.prefill(0)
    stream = await cluster.open()
    assert stream.change_at_once(ids(20, 21))
    await until(lambda: stream.acknowledged().num_computed_tokens == 2)
    new = await cluster.prefill(1)
    new.drop_incoming = lambda message: True
    session = session_of(cluster.manager, stream)
    await cluster.manager.drain_server(ServerId(old.server_id), None, force=False)
    assert session.prefilling.moves.is_under_way
    old.drop_incoming = lambda message: isinstance(message, r.Splice)
    assert stream.change_at_once(ids(22))
    assert stream.change_at_once(ids(23))
    await cluster.manager.resume_server(ServerId(old.server_id))
    await cluster.kill(new)
    old.drop_incoming = lambda message: False
    await until(lambda: not session.prefilling.moves.is_under_way)
    await stream.commit(commit_of(3))
    tokens, done = await answer_of(stream)
    assert [t.token_id for t in tokens] == expected_answer([20, 21, 22, 23], 3, cluster.vocab_size)
    assert done.prefill_server == old.server_id
