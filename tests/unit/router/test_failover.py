"""What a client notices of lost messages and dead servers: nothing, or one clean error."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router import timing
from streamfill.errors import InvalidArgumentError, UnavailableError
from streamfill.links.faults import VARIABLE as LINK_FAULTS
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import pack_ids
from streamfill.messages.common import Finish, FinishReason, StreamMode
from streamfill.stream.ids import ServerId, StreamId
from streamfill.stream.state import StreamState
from tests.unit.router.cluster_for_tests import (
    TestCluster,
    answer_of,
    commit_of,
    fast_timing,
    ids,
    until,
)
from tests.unit.router.fake_server import FakeServer, expected_answer

PROMPT = [20, 21, 22, 23]


@pytest.fixture
async def cluster(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TestCluster]:
    fast_timing(monkeypatch)
    async with TestCluster(tiny_model) as started:
        yield started


async def test_duplicated_frames_change_nothing(cluster: TestCluster) -> None:
    """Every frame three times in both directions: each operation and token counts once."""
    for server in (await cluster.prefill(), await cluster.decode()):
        server.num_copies = 3
    handle = await cluster.open(StreamMode.UPDATE)
    for last in range(30, 40):
        await handle.update(ids(*PROMPT, last))
    await handle.commit(commit_of(20))
    tokens, done = await answer_of(handle)
    expected = expected_answer([*PROMPT, 39], 20, cluster.vocab_size)
    assert [token.token_id for token in tokens] == expected
    assert done.num_attempts == 1


@pytest.mark.parametrize("seed", range(4))
async def test_dropped_frames_are_sent_again(cluster: TestCluster, seed: int) -> None:
    """A fifth of all frames lost in both directions: prompt and answer are right all the same."""
    generator = random.Random(seed)
    servers = (await cluster.prefill(), await cluster.decode())
    for server in servers:
        server.drop_incoming = lambda message: generator.random() < 0.2
        server.drop_outgoing = lambda message: generator.random() < 0.2
    handle = await cluster.open()
    for token_id in range(30, 50):
        await handle.append(ids(token_id))
    await handle.commit(commit_of(20))
    tokens, _ = await answer_of(handle)
    expected = expected_answer(list(range(30, 50)), 20, cluster.vocab_size)
    assert [token.token_id for token in tokens] == expected
    await until(lambda: not len(cluster.manager._cluster.cancels))
    cluster.assert_no_load()


@pytest.mark.parametrize("seed", range(3))
async def test_link_faults_of_the_router_change_nothing(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A third of what it sends lost, doubled, late or slow: prompt and answer are right."""
    fast_timing(monkeypatch)
    monkeypatch.setenv(LINK_FAULTS, f"every=3,seed={seed}")
    async with TestCluster(tiny_model) as cluster:
        await cluster.prefill()
        await cluster.decode()
        handle = await cluster.open()
        for token_id in range(30, 50):
            await handle.append(ids(token_id))
        await handle.commit(commit_of(20))
        tokens, _ = await answer_of(handle)
        expected = expected_answer(list(range(30, 50)), 20, cluster.vocab_size)
        assert [token.token_id for token in tokens] == expected
        faults = cluster.manager._cluster._link._faults
        assert faults is not None
        assert faults.num_by_kind.total() > 3
        await until(lambda: not len(cluster.manager._cluster.cancels))
        cluster.assert_no_load()


async def test_a_lost_forget_is_said_again(cluster: TestCluster) -> None:
    """So that no server keeps an answer that nobody needs any more."""
    servers = (await cluster.prefill(), await cluster.decode())
    lost: list[r.RouterToServer] = []

    def lose_first(message: r.RouterToServer) -> bool:
        if isinstance(message, r.Forget) and len(lost) < len(servers):
            lost.append(message)
            return True
        return False

    for server in servers:
        server.drop_incoming = lose_first
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(5))
    await answer_of(handle)
    await until(lambda: not any(server.streams for server in servers))
    await until(lambda: not len(cluster.manager._cluster.cancels))
    assert len(lost) == 2


async def test_a_stream_that_comes_late_to_a_server_is_ended_there(cluster: TestCluster) -> None:
    """The server acknowledges an opening that was delayed past the stream's end."""
    prefill = await cluster.prefill()
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await until(lambda: prefill.of_type(r.Splice))
    (opening,) = prefill.of_type(r.OpenStream)
    await handle.cancel("not needed")
    await until(lambda: not prefill.streams and not len(cluster.manager._cluster.cancels))
    await prefill._take(opening)
    assert prefill.streams
    await until(lambda: not prefill.streams)
    await until(lambda: not len(cluster.manager._cluster.cancels))


async def test_an_opening_that_comes_after_its_attempt_is_undone(cluster: TestCluster) -> None:
    """The stream has gone elsewhere, because its splice came first and the server knew nothing."""
    first = await cluster.prefill(0)
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await until(lambda: first.of_type(r.Splice))
    second = await cluster.prefill(1)
    (opening,) = first.of_type(r.OpenStream)
    assert isinstance(opening, r.OpenStream)
    await first.send(
        s.ResyncRequest(stream_id=opening.stream_id, attempt=opening.attempt, have_seq=-1)
    )
    await until(lambda: second.streams and not first.streams)
    await until(lambda: not len(cluster.manager._cluster.cancels))
    await first._take(opening)
    assert first.streams
    await until(lambda: not first.streams)
    assert second.streams
    await handle.cancel("not needed")


async def test_gap_is_filled_from_the_log(cluster: TestCluster) -> None:
    """A lost splice is noticed at the next one and sent again, without a new attempt."""
    prefill = await cluster.prefill()
    handle = await cluster.open()
    await handle.append(ids(20))
    lost: list[r.Splice] = []

    def lose_second(message: r.RouterToServer) -> bool:
        if isinstance(message, r.Splice) and message.seq == 2 and not lost:
            lost.append(message)
            return True
        return False

    prefill.drop_incoming = lose_second
    for token_id in (21, 22, 23):
        await handle.append(ids(token_id))
    await until(lambda: handle.status().acknowledged.num_computed_tokens == 4)
    assert lost
    await handle.commit(commit_of(2))
    tokens, done = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 2, cluster.vocab_size)
    assert done.num_attempts == 1


async def test_server_that_fell_far_behind_gets_the_whole_prompt(cluster: TestCluster) -> None:
    """When the log does not reach back to the gap, a new attempt starts with everything."""
    prefill = await cluster.prefill()
    handle = await cluster.open()
    await handle.append(ids(20))
    await until(lambda: handle.status().acknowledged.num_computed_tokens == 1)
    prefill.drop_incoming = lambda message: (
        isinstance(message, r.Splice) and message.attempt == 1 and message.seq < 90
    )
    for token_id in range(100):
        await handle.append(ids(30 + token_id))
    await until(lambda: handle.status().acknowledged.num_computed_tokens == 101)
    await handle.commit(commit_of(2))
    tokens, done = await answer_of(handle)
    expected = expected_answer([20, *range(30, 130)], 2, cluster.vocab_size)
    assert [token.token_id for token in tokens] == expected
    assert done.num_attempts == 2


async def test_lost_output_is_asked_for(cluster: TestCluster) -> None:
    """A gap in the answer, and a lost end, are filled by the same server."""
    await cluster.prefill()
    decode = await cluster.decode()
    lost = {5, 9}

    def lose_once(message: s.ServerToRouter) -> bool:
        if not isinstance(message, s.Output) or message.first_index not in lost:
            return False
        lost.remove(message.first_index)
        return True

    decode.drop_outgoing = lose_once
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(10))
    tokens, done = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 10, cluster.vocab_size)
    assert (done.num_attempts, lost) == (1, set())


@pytest.mark.parametrize("committed", [False, True])
async def test_prefill_server_dies_before_the_first_token(
    cluster: TestCluster, committed: bool
) -> None:
    """The other prefill server gets the whole prompt and answers, with a new transfer id."""
    await cluster.decode()
    first = await cluster.prefill(0)
    first.output_limit = 0
    handle = await cluster.open()
    await handle.append(ids(*PROMPT[:2]))
    await handle.append(ids(*PROMPT[2:]))
    if committed:
        await handle.commit(commit_of(5))
        await until(lambda: first.of_type(r.Commit))
    second = await cluster.prefill(1)
    await cluster.kill(first)
    await until(lambda: second.of_type(r.OpenStream))
    if not committed:
        await handle.commit(commit_of(5))
    tokens, done = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 5, cluster.vocab_size)
    assert (done.prefill_server, done.num_attempts) == (second.server_id, 2)
    commits = [*first.of_type(r.Commit), *second.of_type(r.Commit)]
    transfers = [m.handoff.transfer_id for m in commits if m.handoff is not None]
    assert len(transfers) == len(set(transfers)) == 1 + committed


async def test_restarted_prefill_server_gets_its_streams_again(cluster: TestCluster) -> None:
    """The same server id with a new incarnation: the stream goes on at once."""
    first = await cluster.prefill(0)
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    again = await cluster.prefill(0)
    await until(lambda: again.streams)
    await handle.commit(commit_of(5))
    tokens, _ = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 5, cluster.vocab_size)
    assert first.of_type(r.Commit) == []


@pytest.mark.parametrize("others", ["decode", "prefill"])
async def test_decode_server_dies_in_the_middle(cluster: TestCluster, others: str) -> None:
    """Another server goes on; the client sees each token once and in order."""
    prefill = await cluster.prefill()
    decode = await cluster.decode(0)
    decode.output_limit = 6
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(12))
    await until(lambda: handle.status().num_output_tokens == 6)
    if others == "decode":
        await cluster.decode(1)
    await cluster.kill(decode)
    tokens, done = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 12, cluster.vocab_size)
    assert done.decoded_by_prefill is (others == "prefill")
    assert done.decode_server == ("decode-1" if others == "decode" else "")
    assert done.num_attempts == 2
    # The prompt's KV goes to the successor too; the prefill server itself needs nothing.
    again = [m for m in prefill.received if isinstance(m, r.HandOff)]
    assert [m.target.server_id for m in again] == (["decode-1"] if others == "decode" else [])
    cluster.assert_no_load()


async def test_kv_that_is_gone_is_computed_by_the_successor(cluster: TestCluster) -> None:
    """It waits for the transfer that it was promised, until it hears that there is none."""
    prefill, decode = await cluster.prefill(), await cluster.decode(0)
    decode.output_limit = 6
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(12))
    await until(lambda: handle.status().num_output_tokens == 6)
    prefill.handoff_error = "evicted"
    successor = await cluster.decode(1)
    successor.output_limit = 6
    await cluster.kill(decode)
    await until(lambda: successor.of_type(r.HandoffFailed))
    successor.output_limit = 12
    tokens, done = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 12, cluster.vocab_size)
    assert done.handoff == "failed: evicted"
    (generate,) = successor.of_type(r.Generate)
    (failed,) = successor.of_type(r.HandoffFailed)
    assert isinstance(generate, r.Generate)
    assert isinstance(failed, r.HandoffFailed)
    assert generate.transfer_id == failed.transfer_id is not None


async def test_prefill_server_dies_while_it_answers_alone(cluster: TestCluster) -> None:
    """Another prefill server goes on behind the tokens that the client has."""
    first = await cluster.prefill(0)
    first.output_limit = 4
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(9))
    await until(lambda: handle.status().num_output_tokens == 4)
    second = await cluster.prefill(1)
    await cluster.kill(first)
    tokens, done = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 9, cluster.vocab_size)
    assert done.decoded_by_prefill
    generate = second.of_type(r.Generate)[0]
    assert isinstance(generate, r.Generate)
    expected = expected_answer(PROMPT, 4, cluster.vocab_size)
    assert (generate.output_ids, generate.transfer_id) == (pack_ids(expected), None)


async def test_prefill_server_dies_during_the_handoff(cluster: TestCluster) -> None:
    """The decode server, which waits for KV, is told that none will come."""
    prefill, decode = await cluster.prefill(), await cluster.decode()
    prefill.drop_outgoing = lambda message: isinstance(message, s.HandoffReport)
    decode.output_limit = 0
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(5))
    await until(lambda: decode.of_type(r.Generate))
    await cluster.kill(prefill)
    await until(lambda: decode.of_type(r.HandoffFailed))
    decode.output_limit = 100
    tokens, done = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 5, cluster.vocab_size)
    assert done.handoff.startswith("failed: ")


async def test_prefill_server_dies_behind_a_handoff_that_went_well(cluster: TestCluster) -> None:
    """The decode server may miss what the KV goes on behind, which nobody sends again now: it is
    told to wait for nothing. The hand-off counts as what it was."""
    prefill, decode = await cluster.prefill(), await cluster.decode()
    decode.output_limit = 0
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(5))
    handoff = cluster.manager._sessions[StreamId(handle.stream_id)].attempts._decoding.handoff
    await until(lambda: handoff.outcome == "done" and decode.of_type(r.Generate))
    await cluster.kill(prefill)
    await until(lambda: decode.of_type(r.HandoffFailed))
    decode.output_limit = 100
    tokens, done = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 5, cluster.vocab_size)
    assert done.handoff == "done"


async def test_open_stream_waits_for_a_server_and_takes_more(cluster: TestCluster) -> None:
    """With no server alive appends are still accepted, and reach the next server."""
    prefill = await cluster.prefill()
    handle = await cluster.open()
    await handle.append(ids(*PROMPT[:2]))
    await cluster.kill(prefill)
    await until(lambda: not cluster.manager.info().ready)
    await handle.append(ids(*PROMPT[2:]))
    again = await cluster.prefill()
    await until(lambda: handle.stream_id in again.streams)
    await until(lambda: again.streams[handle.stream_id].prompt.tolist() == PROMPT)


async def test_stream_without_a_server_for_long_fails(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """UNAVAILABLE, in the state FAILED."""
    monkeypatch.setattr(timing, "REPLACE_WAIT_S", 0.1)
    prefill = await cluster.prefill()
    handle = await cluster.open()
    await cluster.kill(prefill)
    with pytest.raises(UnavailableError, match="no server"):
        await answer_of(handle)
    assert handle.status().state is StreamState.FAILED


async def test_stream_that_breaks_every_server_fails_in_the_end(cluster: TestCluster) -> None:
    """After five attempts in a row the last reason is told, and both servers were tried."""
    servers = [await cluster.prefill(0), await cluster.prefill(1)]
    for server in servers:
        server.fail_commit = ("INTERNAL", "bad luck")
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(5))
    with pytest.raises(UnavailableError, match=r"5 attempts.*bad luck"):
        await answer_of(handle)
    assert all(server.of_type(r.Commit) for server in servers)
    assert sum(len(server.of_type(r.Commit)) for server in servers) == timing.MAX_ATTEMPTS
    assert cluster.outcomes() == {"FAILED": 1}
    await until(lambda: not any(server.streams for server in servers))
    cluster.assert_no_load()


async def test_refusal_by_a_server_reaches_the_client(cluster: TestCluster) -> None:
    """A code that speaks of the request is not retried."""
    prefill = await cluster.prefill()
    prefill.fail_commit = ("INVALID_ARGUMENT", "it is too long")
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(5))
    with pytest.raises(InvalidArgumentError, match="it is too long"):
        await answer_of(handle)
    assert cluster.outcomes() == {"REJECTED": 1}
    assert len(prefill.of_type(r.Commit)) == 1


async def test_failing_decode_server_is_replaced(cluster: TestCluster) -> None:
    """An internal error of the decode server after the first token costs the client nothing."""
    await cluster.prefill()
    decode = await cluster.decode()
    decode.fail_generate = ("INTERNAL", "out of memory")
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(5))
    # Avoided from then on, so that the next attempt waits or goes elsewhere.
    await until(lambda: decode.of_type(r.Generate))
    decode.fail_generate = None
    tokens, done = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 5, cluster.vocab_size)
    assert done.num_attempts > 1


async def test_aborted_answer_is_tried_again(cluster: TestCluster) -> None:
    """An abort by a server is a failure of the attempt, never an end for the client."""
    prefill = await cluster.prefill()
    prefill.finish_at[2] = Finish(reason=FinishReason.ABORT, message="retracted")
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await handle.commit(commit_of(5))
    await until(lambda: handle.status().num_output_tokens == 2)
    prefill.finish_at.clear()
    tokens, _ = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 5, cluster.vocab_size)


async def test_server_that_forgot_a_stream_gets_it_again(cluster: TestCluster) -> None:
    """`ResyncRequest` with -1 starts a new attempt with the whole prompt."""
    prefill = await cluster.prefill()
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await until(lambda: prefill.streams)
    prefill._gate.clear()
    prefill.streams.clear()
    await handle.commit(commit_of(3))
    tokens, done = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 3, cluster.vocab_size)
    assert done.num_attempts == 2


async def test_silent_server_comes_back_without_its_old_streams(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its streams went elsewhere; it is made to drop them and may take new ones."""
    monkeypatch.setattr(timing, "SUSPECT_AFTER_S", 0.3)
    monkeypatch.setattr(timing, "DEAD_AFTER_S", 0.6)
    first = await cluster.prefill(0)
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    second = await cluster.prefill(1)
    first.mute = True
    await until(lambda: cluster.state_of(first) == "suspect")
    await until(lambda: handle.stream_id in second.streams)
    assert cluster.state_of(first) == "dead"
    assert first.streams
    first.mute = False
    await until(lambda: cluster.state_of(first) == "alive")
    assert first.num_router_losses == 1
    assert not first.streams
    await handle.commit(commit_of(3))
    tokens, _ = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 3, cluster.vocab_size)


@pytest.mark.parametrize("comes_back", [True, False], ids=["comes back", "dies"])
async def test_a_commit_is_taken_while_the_only_server_is_silent(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    """It may have stood still for a moment; if it is dead the answer comes from the next one. Only
    what is new is refused."""
    monkeypatch.setattr(timing, "SUSPECT_AFTER_S", 0.3)
    monkeypatch.setattr(timing, "DEAD_AFTER_S", 60.0)
    first = await cluster.prefill(0)
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    first.mute = True
    await until(lambda: cluster.state_of(first) == "suspect")
    with pytest.raises(UnavailableError, match="no prefill server is alive"):
        await cluster.open()
    await handle.commit(commit_of(3))
    if comes_back:
        first.mute = False
    else:
        await cluster.kill(first)
        await cluster.prefill(1)
    tokens, done = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 3, cluster.vocab_size)
    assert done.num_attempts == (1 if comes_back else 2)


async def test_a_draining_server_that_is_gone_takes_no_commit(
    cluster: TestCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is closed, and there is no other: the stream is kept, as with any server."""
    monkeypatch.setattr(timing, "UNREACHABLE_DEAD_AFTER_S", 60.0)
    first = await cluster.prefill(0)
    handle = await cluster.open()
    await handle.append(ids(*PROMPT))
    await first.send(s.Draining(server_id=first.server_id))
    await until(lambda: cluster.state_of(first) == "draining")
    await cluster.kill(first)
    server = cluster.manager._cluster.registry.by_id(ServerId(first.server_id))
    await until(lambda: not server.reachable)
    with pytest.raises(UnavailableError, match="the stream is kept"):
        await handle.commit(commit_of(3))
    await cluster.prefill(1)
    await handle.commit(commit_of(3))
    tokens, _ = await answer_of(handle)
    assert [t.token_id for t in tokens] == expected_answer(PROMPT, 3, cluster.vocab_size)


async def test_draining_server_hands_its_open_streams_on(cluster: TestCluster) -> None:
    """Uncommitted streams move, new ones go elsewhere, committed ones are finished there."""
    first = await cluster.prefill(0)
    moved, stays = await cluster.open(), await cluster.open()
    for handle in (moved, stays):
        await handle.append(ids(*PROMPT))
    first.output_limit = 1
    await stays.commit(commit_of(3))
    await until(lambda: stays.status().num_output_tokens == 1)
    second = await cluster.prefill(1)
    await first.send(s.Draining(server_id=first.server_id))
    await until(lambda: moved.stream_id in second.streams)
    await until(lambda: moved.stream_id not in first.streams)
    new = await cluster.open()
    await until(lambda: new.stream_id in second.streams)
    first.output_limit = 100
    tokens, done = await answer_of(stays)
    assert len(tokens) == 3
    assert done.prefill_server == first.server_id


async def test_late_output_of_an_unknown_stream_is_cancelled(cluster: TestCluster) -> None:
    """The server hears that nobody waits for it; everybody else goes on."""
    prefill = await cluster.prefill()
    await prefill.send(s.Output(stream_id=99, attempt=3, first_index=0, token_ids=b""))
    await until(lambda: prefill.of_type(r.Cancel))
    assert prefill.of_type(r.Cancel) == [r.Cancel(stream_id=99, attempt=3)]
    assert cluster.manager._cluster.num_stale_messages == 1


async def test_many_streams_survive_a_stormy_cluster(cluster: TestCluster) -> None:
    """Lost frames, restarted servers: every answer is right or a clean error, no load stays."""
    generator = random.Random(7)

    def spoil(server: FakeServer) -> None:
        server.drop_incoming = lambda message: generator.random() < 0.02
        server.drop_outgoing = lambda message: generator.random() < 0.02

    for number in range(2):
        spoil(await cluster.prefill(number))
        spoil(await cluster.decode(number))

    async def client(number: int) -> str:
        prompt = [30 + number, *range(40, 60)]
        try:
            handle = await cluster.open()
            for token_id in prompt:
                await handle.append(ids(token_id))
                await asyncio.sleep(0.001)
            if number % 7 == 3:
                await handle.cancel("changed my mind")
                return "cancelled"
            await handle.commit(commit_of(20))
            tokens, _ = await answer_of(handle)
        except UnavailableError:
            return "unavailable"
        expected = expected_answer(prompt, 20, cluster.vocab_size)
        assert [token.token_id for token in tokens] == expected
        return "answered"

    clients = [asyncio.ensure_future(client(number)) for number in range(30)]
    await asyncio.sleep(0.05)
    for role_of in (cluster.prefill, cluster.decode):
        spoil(await role_of(0))
        await asyncio.sleep(0.05)
    outcomes = await asyncio.gather(*clients)
    assert outcomes.count("answered") > 15
    assert sum(cluster.outcomes().values()) <= 30
    await until(lambda: not len(cluster.manager._cluster.cancels))
    cluster.assert_no_load()
    assert not cluster.manager._sessions
