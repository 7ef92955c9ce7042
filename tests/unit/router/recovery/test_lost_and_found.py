"""Who may come back to a stream and how, and what becomes of streams whose log does not work."""

from __future__ import annotations

import asyncio
import json
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import connect

from router import timing
from router.access.account import CALLER
from router.access.guarded import GuardedManager
from router.call_messages import CallEvent, ClientMessage, Resume
from router.interface import ResumePoint, TokenEvent
from router.recovery import keeper as keeper_module
from router.recovery import log_file as log_file_module
from router.recovery import records as rec
from router.recovery.keeper import Keeper
from router.recovery.log_file import LogFailedError, LogFile, Row
from router.recovery.log_writer import LogMetrics
from router.stream_call import StreamCall
from streamfill.access.key_file import change_keys
from streamfill.access.keys import KeyLimits, new_key
from streamfill.api import Client
from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import FailedPreconditionError, StreamError, StreamNotFoundError
from streamfill.messages import router_to_server as r
from streamfill.messages.common import NO_SHARE, SHARED_NAMESPACE, Role, StreamMode
from streamfill.observability.metric_values import MetricSet
from streamfill.observability.metrics import Metric
from streamfill.stream.ids import ServerId
from streamfill.stream.state import StreamState
from tests.support.metrics import scrape
from tests.unit.router.cluster_for_tests import TestCluster, answer_of, commit_of, ids, until
from tests.unit.router.fake_server import expected_answer
from tests.unit.router.recovery.router_process import RouterProcess

PATIENCE_S = 60.0


@asynccontextmanager
async def logged(model: Path, file: Path, **config: Any) -> AsyncIterator[TestCluster]:
    """A core with a log, and a prefill server."""
    async with TestCluster(model, log="sqlite", log_file=str(file), **config) as cluster:
        await cluster.prefill()
        yield cluster


async def crash(cluster: TestCluster) -> None:
    """As far as the log can tell, the process ends here."""
    keeper = cluster.manager._keeper
    assert keeper is not None
    await asyncio.to_thread(keeper.close)


async def test_an_answer_goes_on_in_another_core(tiny_model: Path, tmp_path: Path) -> None:
    """Tokens that are out are not generated again; the client names the first that it lacks."""
    file = tmp_path / "log"
    async with logged(tiny_model, file) as cluster:
        cluster.servers[0].output_limit = 4
        handle = await cluster.open(is_resumable=True, needs_call=True)
        await handle.append(ids(20, 21, 22), 1)
        await handle.commit(commit_of(10), 2)
        await until(lambda: handle.status().num_output_tokens == 4)
        stream_id, vocab_size = handle.stream_id, cluster.vocab_size
        await crash(cluster)
    async with logged(tiny_model, file) as cluster:
        handle = cluster.manager.get(stream_id)
        resumed = handle.resume(ResumePoint(next_token_index=0, next_seq=3))
        assert (resumed.is_committed, resumed.acknowledged.client_seq) == (True, 2)
        tokens, done = await answer_of(handle)
        assert [t.token_id for t in tokens] == expected_answer([20, 21, 22], 10, vocab_size)
        assert done.usage.num_output_tokens == 10
        generated = cluster.servers[0].streams
        assert all(stream.first_output == 4 for stream in generated.values())


async def test_an_ended_stream_is_seen_to_have_ended(tiny_model: Path, tmp_path: Path) -> None:
    """By those who look at what is going on, also in another core."""
    file = tmp_path / "log"
    async with logged(tiny_model, file) as cluster:
        handle = await cluster.open(is_resumable=True)
        await handle.cancel("enough")
        await crash(cluster)
    async with logged(tiny_model, file) as cluster:
        (session,) = cluster.manager.newest_ended()
        facts = session.facts(lambda at_s: round(1000 * at_s))
        assert facts.state == "ABORTED"
        assert facts.ended_ms is not None
        assert "enough" in facts.error


async def test_a_call_that_was_taken_over_ends_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """It hangs in a connection that nobody has noticed to be dead, until that is closed."""
    never = asyncio.Event()

    async def messages(resume: ResumePoint) -> AsyncIterator[ClientMessage]:
        yield ClientMessage(None, Resume(lambda: (handle.stream_id, resume)))
        await never.wait()

    async def stuck(event: CallEvent) -> None:
        if isinstance(event, TokenEvent):
            await never.wait()

    async with logged(tiny_model, tmp_path / "log") as cluster:
        prefill = cluster.servers[0]
        prefill.output_limit = 4
        handle = await cluster.open(is_resumable=True, needs_call=True)
        await handle.append(ids(20, 21, 22), 1)
        call = StreamCall(cluster.manager, messages(ResumePoint()), stuck)
        running = asyncio.create_task(call.run())
        await until(lambda: call.handle is not None)
        await handle.commit(commit_of(10), 2)
        await until(lambda: handle.status().num_output_tokens == 4)
        was_over = call.is_over
        handle.resume(ResumePoint(next_token_index=0, next_seq=3))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert (was_over, call.is_over) == (False, True)
        prefill.output_limit = 100
        tokens, _ = await answer_of(handle)
        assert len(tokens) == 10


async def test_a_call_that_was_taken_over_before_it_began_takes_nothing_back(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Its first event hung in a dead connection while its client came back by another one, which
    goes on to get every token."""
    goes_on, never = asyncio.Event(), asyncio.Event()

    async def messages() -> AsyncIterator[ClientMessage]:
        yield ClientMessage(None, Resume(lambda: (handle.stream_id, ResumePoint())))
        await never.wait()

    async def stuck(event: CallEvent) -> None:
        await goes_on.wait()

    async with logged(tiny_model, tmp_path / "log") as cluster:
        prefill = cluster.servers[0]
        prefill.output_limit = 4
        handle = await cluster.open(is_resumable=True, needs_call=True)
        await handle.append(ids(20, 21, 22), 1)
        call = StreamCall(cluster.manager, messages(), stuck)
        running = asyncio.create_task(call.run())
        await until(lambda: call.handle is not None)
        handle.resume(ResumePoint(next_token_index=0, next_seq=2))
        answer = asyncio.create_task(answer_of(handle))
        await handle.commit(commit_of(10), 2)
        await until(lambda: handle.status().num_output_tokens == 4)
        goes_on.set()
        with pytest.raises(FailedPreconditionError, match="another call took over"):
            await asyncio.wait_for(running, PATIENCE_S)
        prefill.output_limit = 100
        tokens, _ = await answer
        assert len(tokens) == 10


async def test_a_commit_that_is_faster_than_the_servers_waits(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a restart a client may be there before the servers are; it is not refused for that."""
    file = tmp_path / "log"
    async with logged(tiny_model, file) as cluster:
        handle = await cluster.open(is_resumable=True)
        await handle.append(ids(20), 1)
        await crash(cluster)
    monkeypatch.setattr(timing, "PLACE_WAIT_S", 0.0)
    async with TestCluster(tiny_model, log="sqlite", log_file=str(file)) as cluster:
        again = cluster.manager.get(handle.stream_id)
        committing = asyncio.create_task(again.commit(commit_of(3), 2))
        await asyncio.sleep(0.2)
        await cluster.prefill()
        await asyncio.wait_for(committing, PATIENCE_S)
        tokens, _ = await answer_of(again)
        assert [t.token_id for t in tokens] == expected_answer([20], 3, cluster.vocab_size)


async def test_whom_nobody_comes_back_to(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream with a call ends soon after a restart, on its server too; one without stays; one
    whose client came stays."""
    file = tmp_path / "log"
    monkeypatch.setattr(timing, "HOUSEKEEPING_INTERVAL_S", 0.01)
    async with logged(tiny_model, file) as cluster:
        lonely = await cluster.open(is_resumable=True, needs_call=True)
        unary = await cluster.open(is_resumable=True)
        visited = await cluster.open(is_resumable=True, needs_call=True)
        await lonely.append(ids(20), 1)
        await crash(cluster)
    monkeypatch.setattr(timing, "RESUME_WAIT_S", 3.0)
    async with logged(tiny_model, file) as cluster:
        get = cluster.manager.get
        get(visited.stream_id).resume(ResumePoint())
        await until(lambda: lonely.stream_id in cluster.servers[0].streams)
        await until(lambda: get(lonely.stream_id).status().state is StreamState.ABORTED)
        with pytest.raises(StreamError, match=r"did not come back within 3\.0 s of a restart"):
            await answer_of(get(lonely.stream_id))
        await until(lambda: lonely.stream_id not in cluster.servers[0].streams)
        states = [get(each.stream_id).status().state for each in (unary, visited)]
        assert states == [StreamState.OPEN, StreamState.OPEN]


async def test_ended_streams_leave_the_log(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When they are not told of any more either."""
    file = tmp_path / "log"
    monkeypatch.setattr(timing, "HOUSEKEEPING_INTERVAL_S", 0.01)
    monkeypatch.setattr(timing, "FINISHED_RETENTION_S", 0.1)
    async with logged(tiny_model, file) as cluster:
        handle = await cluster.open(is_resumable=True)
        kept = await cluster.open(is_resumable=True)
        await handle.append(ids(20), 1)
        await handle.commit(commit_of(2), 2)
        await answer_of(handle)

        def is_forgotten() -> bool:
            try:
                cluster.manager.get(handle.stream_id)
            except StreamNotFoundError:
                return True
            return False

        await until(is_forgotten)
        await crash(cluster)
    async with logged(tiny_model, file) as cluster:
        assert cluster.manager.info().num_open_streams == 1
        assert cluster.manager.get(kept.stream_id).status().state is StreamState.OPEN
        with pytest.raises(StreamNotFoundError):
            cluster.manager.get(handle.stream_id)


async def test_one_shot_requests_are_not_logged(tiny_model: Path, tmp_path: Path) -> None:
    """Nobody could come back to them."""
    file = tmp_path / "log"
    async with logged(tiny_model, file) as cluster:
        handle = await cluster.open()
        assert not handle.is_resumable
        await crash(cluster)
    async with logged(tiny_model, file) as cluster:
        assert cluster.manager.info().num_open_streams == 0


async def test_streams_of_another_model_are_dropped(
    tiny_model: Path, tiny_sentencepiece_model: Path, tmp_path: Path
) -> None:
    """Their token ids mean nothing to it."""
    file = tmp_path / "log"
    async with logged(tiny_model, file) as cluster:
        await cluster.open(is_resumable=True)
        await crash(cluster)
    async with logged(tiny_sentencepiece_model, file) as cluster:
        assert cluster.manager.info().num_open_streams == 0


def test_a_router_that_dies_at_once_leaves_no_streams_of_another_model(tmp_path: Path) -> None:
    """From when the file is signed for the new model, nothing of the old one is in it."""
    path = tmp_path / "log"

    def found(model_facts: str) -> list[int]:
        keeper = Keeper(path, model_facts, LogMetrics(MetricSet("router", lambda: 0.0)))
        try:
            return [each.stream_id for each in keeper.open()]
        finally:
            keeper._file.close()

    assert found("one 100") == []
    file = LogFile(path)
    file.open()
    record = rec.Opened(mode=StreamMode.APPEND, opened_s=0.0)
    file.insert([Row(1, 7, rec.encode_record(record))])
    file.close()
    assert found("one 100") == [7]
    assert found("another 100") == []
    assert found("another 100") == []


async def test_a_limit_that_lies_behind_the_restart(tiny_model: Path, tmp_path: Path) -> None:
    """The deadline counts from the opening, not from the restart."""
    file = tmp_path / "log"
    async with logged(tiny_model, file) as cluster:
        handle = await cluster.open(is_resumable=True, deadline_s=0.5)
        await crash(cluster)
    await asyncio.sleep(0.5)
    async with logged(tiny_model, file) as cluster:
        await until(
            lambda: cluster.manager.get(handle.stream_id).status().state is StreamState.DEADLINE
        )


async def test_only_the_owner_comes_back(tiny_model: Path, tmp_path: Path) -> None:
    """A key of another tenant does not find the stream; the owner's place is taken again, also
    beyond its limit, and given back with the end. Servers get it in the same cache namespace, and
    on the same account."""
    key_file, keys = tmp_path / "keys.jsonl", dict[str, str]()
    entries = []
    for name in ("alice", "bob"):
        keys[name], entry = new_key(name, limits=KeyLimits(max_streams=1))
        entries.append(entry)
    change_keys(key_file, lambda old: [*old, *entries], "--file")
    async with RouterProcess(tmp_path, tiny_model, api_keys_file=str(key_file)) as router:
        prefill, _ = await router.pair()
        async with (
            Client(router.target, api_key=keys["alice"]) as alice,
            Client(router.target, api_key=keys["bob"]) as bob,
        ):
            async with alice.stream() as stream:
                await stream.append("abc")
                await router.restart()
                await asyncio.wait_for(stream.append("def"), PATIENCE_S)
                # An operation counts as taken when it is in the log: the server may get it later.
                await until(lambda: len(prefill.of_type(r.OpenStream)) == 2)
                before, after = prefill.of_type(r.OpenStream)
                assert after.namespace == before.namespace != SHARED_NAMESPACE
                assert after.share == before.share != NO_SHARE
                call = bob.stub.Stream(None)
                resume = pb.Resume(stream_id=stream.stream_id)
                await call.write(pb.StreamRequest(resume=resume))
                event = await call.read()
                assert isinstance(event, pb.StreamEvent)
                assert event.failed.code == pb.CODE_NOT_FOUND
                with pytest.raises(StreamError, match="max_streams"):
                    async with alice.stream():
                        pass
                result = await stream.commit("?", max_tokens=3).read()
                assert result.usage.num_output_tokens == 3
            async with alice.stream() as another:
                await another.append("x")


async def test_a_web_socket_goes_on(tiny_model: Path, tmp_path: Path) -> None:
    """`resume` by the id that came with `opened`: what was acknowledged is there."""
    async with RouterProcess(tmp_path, tiny_model) as router:
        _, decode = await router.pair()
        url = f"ws://127.0.0.1:{router.http_port}/v1/streams"

        async def read(socket: Any, kind: str) -> dict[str, Any]:
            while (message := json.loads(await socket.recv()))["type"] != kind:
                assert message["type"] == "acknowledged"
            return dict(message)

        async with connect(url) as socket:
            await socket.send(json.dumps({"type": "open"}))
            opened = await read(socket, "opened")
            assert opened["is_resumable"] is True
            await socket.send(json.dumps({"type": "append", "seq": 1, "token_ids": [20, 21]}))
            await read(socket, "acknowledged")
            decode.output_limit = 5
            commit = {"type": "commit", "seq": 2, "max_tokens": 8, "temperature": 0}
            await socket.send(json.dumps(commit))
            tokens = [await read(socket, "token") for _ in range(3)]
            await router.kill()
        await router.start()
        decode.output_limit = 100
        stream_id = opened["stream_id"]
        async with connect(url) as socket:
            resume = {"type": "resume", "stream_id": stream_id, "next_token_index": 3}
            await socket.send(json.dumps({**resume, "next_seq": 2}))
            opened = await read(socket, "opened")
            assert (opened["acknowledged"]["seq"], opened["is_committed"]) == (2, True)
            assert opened["refused"] == []
            tokens += [await read(socket, "token") for _ in range(5)]
            assert (await read(socket, "done"))["usage"]["num_output_tokens"] == 8
        assert [token["index"] for token in tokens] == list(range(8))
        expected = expected_answer([20, 21], 8, router.vocab_size)
        assert [token["token_id"] for token in tokens] == expected
        async with connect(url) as socket:
            await socket.send(json.dumps({"type": "resume", "stream_id": "x"}))
            assert "stream_id" in (await read(socket, "failed"))["error"]["message"]


async def test_a_full_disk_costs_no_stream(tiny_model: Path, tmp_path: Path) -> None:
    """The router goes on in memory, and says so. A new log has room for what is opened later."""
    async with RouterProcess(tmp_path, tiny_model) as router:
        await router.pair()
        async with Client(router.target) as client, client.stream() as stream:
            await stream.append(token_ids=[20] * 50)
            size = max(file.stat().st_size for file in _files(router))
            resource.prlimit(router.pid, resource.RLIMIT_FSIZE, (size, size))
            for _ in range(40):
                await asyncio.wait_for(stream.append(token_ids=[21] * 100), PATIENCE_S)
            page = await asyncio.to_thread(scrape, router.metrics_port)
            assert (page.value(Metric.LOG_ON), page.value(Metric.LOG_FAILURES)) == (0, 1)
            result = await stream.commit(max_tokens=5, temperature=0.0).read()
            prompt = [20] * 50 + [21] * 4_000
            assert list(result.token_ids) == expected_answer(prompt, 5, router.vocab_size)
            assert "stream_log_failed" in router.output.read_text()
            assert not _files(router)
            async with client.stream() as another:
                await another.append("x")
                await router.restart()
                await asyncio.wait_for(another.append("y"), PATIENCE_S)
                assert another.num_resumptions == 1
        page = await asyncio.to_thread(scrape, router.metrics_port)
        assert page.value(Metric.LOG_ON) == 1


def _files(router: RouterProcess) -> list[Path]:
    return sorted(router.log_file.parent.glob(f"{router.log_file.name}*"))


def _fail(*_: object) -> None:
    raise LogFailedError("the disk is full")


def _spoil(router: RouterProcess) -> None:
    router.log_file.write_bytes(b"not a database, " * 500)
    Path(f"{router.log_file}-wal").unlink()  # all of it may still be there


async def test_a_log_begins_again_when_there_is_room(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams that are opened then outlive the router again; those from before do not."""
    file = tmp_path / "log"
    monkeypatch.setattr(keeper_module, "TRY_AGAIN_S", 0.0)
    async with logged(tiny_model, file) as cluster:
        old = await cluster.open(is_resumable=True)
        keeper = cluster.manager._keeper
        assert keeper is not None
        with monkeypatch.context() as full:
            full.setattr(LogFile, "insert", _fail)
            full.setattr(LogFile, "set_meta", _fail)
            await old.append(ids(20), 1)
            unlucky = await cluster.open(is_resumable=True)
            assert not unlucky.is_resumable
        lucky = await cluster.open(is_resumable=True)
        assert lucky.is_resumable
        assert cluster.manager.metrics.log.is_on
        for each in (old, unlucky, lucky):
            await each.append(ids(21), 2 if each is old else 1)
        await crash(cluster)
    async with logged(tiny_model, file) as cluster:
        assert cluster.manager.info().num_open_streams == 1
        found = cluster.manager.get(lucky.stream_id).status()
        assert found.acknowledged.client_seq == 1


async def test_a_log_that_another_router_began_meanwhile_is_left_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that failed does not begin again in a file that is in use, nor removes it."""
    path = tmp_path / "log"
    monkeypatch.setattr(keeper_module, "TRY_AGAIN_S", 0.0)
    monkeypatch.setattr(log_file_module, "BUSY_S", 0.0)
    async with logged(tiny_model, path) as cluster:
        old = await cluster.open(is_resumable=True)
        with monkeypatch.context() as full:
            full.setattr(LogFile, "insert", _fail)
            await old.append(ids(20), 1)
        assert not path.exists()
        other = LogFile(path)
        other.open()
        other.insert([Row(1, 7, b"record")])
        assert not (await cluster.open(is_resumable=True)).is_resumable
        other.close()
        other.open()
        assert [row.stream_id for row in other.rows()] == [7]
        other.close()


async def test_a_log_that_begins_again_has_nothing_of_the_one_that_failed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though that could not be removed: its streams went on in memory."""
    file = tmp_path / "log"
    monkeypatch.setattr(keeper_module, "TRY_AGAIN_S", 0.0)
    async with logged(tiny_model, file) as cluster:
        old = await cluster.open(is_resumable=True)
        await old.append(ids(20), 1)
        with monkeypatch.context() as full:
            full.setattr(LogFile, "insert", _fail)
            full.setattr("router.recovery.log_file._discard", lambda file: False)
            await old.append(ids(21), 2)
        new = await cluster.open(is_resumable=True)
        await new.append(ids(22), 1)
        assert new.is_resumable
        await crash(cluster)
    async with logged(tiny_model, file) as cluster:
        assert list(cluster.manager._sessions) == [new.stream_id]


async def test_drains_are_answered_when_a_log_began_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in force was written with the new log's beginning: nobody waits for the old one."""
    monkeypatch.setattr(keeper_module, "TRY_AGAIN_S", 0.0)
    async with logged(tiny_model, tmp_path / "log") as cluster:
        await cluster.prefill(1)
        old = await cluster.open(is_resumable=True)
        for seq in range(1, 20):
            await old.append(ids(20), seq)
        drained = ServerId("prefill-0")
        await cluster.manager.drain_server(drained, None, force=False)
        with monkeypatch.context() as full:
            full.setattr(LogFile, "insert", _fail)
            await old.append(ids(20), 20)
        assert (await cluster.open(is_resumable=True)).is_resumable
        for server_id, wish in (
            (drained, cluster.manager.drain_server(drained, None, force=False)),
            (ServerId("prefill-1"), cluster.manager.resume_server(ServerId("prefill-1"))),
        ):
            assert (await asyncio.wait_for(wish, PATIENCE_S)).server_id == server_id


async def test_a_damaged_log_is_set_aside(tiny_model: Path, tmp_path: Path) -> None:
    """The router starts without the streams that were in it, and says so."""
    async with RouterProcess(tmp_path, tiny_model) as router:
        await router.pair()
        async with Client(router.target) as client:
            async with client.stream() as stream:
                await stream.append("abc")
                await router.kill()
                _spoil(router)
                await router.start()
                with pytest.raises(StreamNotFoundError):
                    await asyncio.wait_for(stream.append("def"), PATIENCE_S)
            await client.wait_ready(PATIENCE_S)  # servers find the new router by and by
            async with client.stream() as stream:
                assert (await stream.append("abc")).num_received_tokens > 0
        assert "stream_log_damaged" in router.output.read_text()
        assert router.log_file.with_name("router_log.sqlite.damaged").exists()
        page = await asyncio.to_thread(scrape, router.metrics_port)
        assert page.value(Metric.LOG_FAILURES) == 1


async def test_an_idle_stream_ends_with_notice(tiny_model: Path, tmp_path: Path) -> None:
    """Its client, which has a call open, is told why in the call's last event."""
    config = {"log": "memory", "idle_stream_timeout_s": 0.3}
    async with RouterProcess(tmp_path, tiny_model, **config) as router:
        await router.serve("prefill-0", Role.PREFILL)
        async with Client(router.target) as client:
            call = client.stub.Stream(None)
            await call.write(pb.StreamRequest(open=pb.Open()))
            events: list[pb.StreamEvent] = []
            while not events or not events[-1].HasField("failed"):
                event = await asyncio.wait_for(call.read(), PATIENCE_S)
                assert isinstance(event, pb.StreamEvent)
                events.append(event)
            assert events[-1].failed.code == pb.CODE_ABORTED
            assert "not touched for 0.3 s" in events[-1].failed.message


def test_the_guard_needs_a_caller() -> None:
    """Nobody comes to a stream past the keys."""
    assert CALLER.get() is None
    with pytest.raises(StreamError, match="without the API key"):
        GuardedManager(None).get(1)  # type: ignore[arg-type]
