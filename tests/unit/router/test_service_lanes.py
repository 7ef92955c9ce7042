"""What streams of one ``Streams`` call have in common; what each is by itself is in
``test_service_stream``."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from router import service_lanes
from router.refusals import Api, Note, Refusal, not_counted
from router.service import StreamfillService
from router.service_server import GrpcServer
from router.traces import TRACE_PARENT
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.lanes import MAX_UNANSWERED
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from tests.unit.router.fake_manager import STEP_S, FakeManager, FakeStream, serve
from tests.unit.router.lane_call import request_of
from tests.unit.router.test_service_stream import append, commit, update

OPEN = pb.StreamRequest(open=pb.Open(mode=pb.STREAM_MODE_APPEND))

CANCEL = pb.StreamRequest(cancel=pb.Cancel())
MANY = 3 * MAX_UNANSWERED


class SharedCall:
    """A ``Streams`` call; what each lane was told."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = StreamfillStub(channel).Streams(None)
        self.told: dict[int, list[pb.StreamEvent]] = defaultdict(list)
        self.sizes: list[int] = []
        """Replies of each message."""

    async def say(self, lane: int, *requests: pb.StreamRequest) -> None:
        await self.call.write(request_of(lane, *requests))

    async def hang_up(self, lane: int) -> None:
        request = pb.LaneRequest(lane=lane, hang_up=pb.HangUp())
        await self.call.write(pb.StreamsRequest(requests=[request]))

    async def read(self) -> bool:
        """One message. Whether there was one."""
        reply = await asyncio.wait_for(self.call.read(), STEP_S)
        if not isinstance(reply, pb.StreamsReply):
            return False
        self.sizes.append(len(reply.replies))
        for each in reply.replies:
            self.told[each.lane].append(each.event)
        return True

    async def until(self, lane: int, kind: str) -> pb.StreamEvent:
        """The first event of this kind in a lane; it is taken away."""
        while True:
            for place, event in enumerate(self.told[lane]):
                if event.WhichOneof("event") == kind:
                    del self.told[lane][: place + 1]
                    return event
            assert await self.read(), f"the call ended before {kind} in lane {lane}"

    async def status(self) -> tuple[str, str]:
        code = await asyncio.wait_for(self.call.code(), STEP_S)
        return code.name, await self.call.details()


@asynccontextmanager
async def shared(manager: FakeManager, on_refused: Note = not_counted) -> AsyncIterator[SharedCall]:
    served = serve(manager, on_refused=on_refused)
    async with served as target, grpc.aio.insecure_channel(target) as channel:
        yield SharedCall(channel)


def streams_of(manager: FakeManager) -> list[FakeStream]:
    return list(manager.streams.values())


@pytest.mark.parametrize("at_once", [False, True])
async def test_many_streams_do_not_disturb_each_other(at_once: bool) -> None:
    """Each has its own prompt, numbers and answer."""
    manager = FakeManager(changes_at_once=at_once)
    num = 40
    async with shared(manager) as call:
        for step in (OPEN, append("abc", 1), append("de", 2)):
            batch = [pb.LaneRequest(lane=lane, request=step) for lane in range(1, num + 1)]
            await call.call.write(pb.StreamsRequest(requests=batch))
        for lane in range(1, num + 1):
            await call.say(lane, append("x" * lane, 3), commit(4))
        ids = set()
        for lane in range(1, num + 1):
            ids.add((await call.until(lane, "opened")).opened.stream_id)
            done = (await call.until(lane, "done")).done
            assert done.usage.num_prompt_tokens == 5 + lane
        assert len(ids) == num


async def test_what_is_due_together_travels_together() -> None:
    """And acknowledgements that wait are merged into the newest."""
    manager = FakeManager()
    async with shared(manager) as call:
        await call.say(1, OPEN)
        await call.until(1, "opened")
        stream = streams_of(manager)[0]
        await call.say(1, *[append("a", seq) for seq in range(1, 11)])
        while not call.told[1] or call.told[1][-1].acknowledged.seq < 10:
            assert await call.read()
        assert len(stream.tokens) == 10
        assert len(call.told[1]) < 10


@pytest.mark.parametrize("at_once", [False, True])
async def test_an_acknowledgement_does_not_overtake_a_refusal(at_once: bool) -> None:
    """Or the client would take it for that of the refused operation too. Here it waits in front of
    the refusal while the operation behind is applied."""
    manager = FakeManager(changes_at_once=at_once)
    steps: asyncio.Queue[pb.StreamsRequest] = asyncio.Queue()
    may_write = asyncio.Event()
    told: list[int] = []

    async def said() -> AsyncIterator[pb.StreamsRequest]:
        while True:
            yield await steps.get()

    class SlowWriter:
        async def write(self, reply: pb.StreamsReply) -> None:
            await may_write.wait()
            events = [each.event for each in reply.replies]
            told.extend(event.error.seq or event.acknowledged.seq for event in events)

    call = asyncio.create_task(StreamfillService(manager).streams(said(), SlowWriter()))
    for step in (OPEN, append("a", 1), update("b", 2), append("c", 3)):
        steps.put_nowait(request_of(1, step))
    while not manager.streams or streams_of(manager)[0].last_seq < 3:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    may_write.set()
    while not {2, 3} <= set(told):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert told == sorted(told)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def test_one_stream_that_waits_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operations wait in its lane, up to a number."""
    let_go = asyncio.Event()
    ordinary = FakeStream.append

    async def slow(stream: FakeStream, *args: Any) -> Any:
        if stream is streams_of(manager)[0]:
            await let_go.wait()
        return await ordinary(stream, *args)

    monkeypatch.setattr(FakeStream, "append", slow)
    manager = FakeManager(changes_at_once=False)
    async with shared(manager) as call:
        await call.say(1, OPEN)
        await call.until(1, "opened")
        await call.say(1, *[append("a", seq) for seq in range(1, MAX_UNANSWERED + 1)])
        await call.say(2, OPEN, append("abc", 1), commit(2))
        assert (await call.until(2, "done")).done.usage.num_prompt_tokens == 3
        let_go.set()
        while (await call.until(1, "acknowledged")).acknowledged.seq < MAX_UNANSWERED:
            pass
        assert len(streams_of(manager)[0].tokens) == MAX_UNANSWERED


@pytest.mark.parametrize("kind", ["append", "cancel"])
async def test_a_stream_that_is_sent_too_much_ends_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The call is read on in any case, so what waits in a lane has to have a limit."""

    async def never(*args: Any) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(FakeStream, "append", never)
    manager = FakeManager(changes_at_once=False)
    refused: list[tuple[Api, Refusal]] = []
    async with shared(manager, lambda api, why: refused.append((api, why))) as call:
        await call.say(1, OPEN)
        await call.until(1, "opened")
        if kind == "cancel":
            await call.say(1, append("a", 1), append("a", 2))
        more = [CANCEL if kind == "cancel" else append("a", n) for n in range(3, MANY)]
        await call.say(1, *more)
        failed = (await call.until(1, "failed")).failed
        assert failed.code == pb.CODE_RESOURCE_EXHAUSTED
        assert failed.details["limit_value"] == str(MAX_UNANSWERED)
        assert refused == [(Api.GRPC, Refusal.LIMITED)]
        stream = streams_of(manager)[0]
        await asyncio.wait_for(stream.ended.wait(), STEP_S)
        await call.say(2, OPEN)
        await call.until(2, "opened")


async def test_a_client_that_hangs_up_is_told_nothing_more() -> None:
    """Its stream ends on every server, and what it sent before it knew is ignored."""
    manager = FakeManager()
    async with shared(manager) as call:
        for lane in (3, 5):
            await call.say(lane, OPEN)
            await call.until(lane, "opened")
        first, second = streams_of(manager)
        await call.hang_up(3)
        await asyncio.wait_for(first.ended.wait(), STEP_S)
        assert first.cancelled_because == "the client went away"
        await call.say(3, append("abc", 1), commit(2))
        await call.hang_up(3)
        await call.hang_up(9)
        await call.say(5, append("abc", 1), commit(2))
        await call.until(5, "done")
        assert not call.told[3]
        assert not call.told[9]
        assert not first.tokens
        assert second.done


async def test_a_stream_that_is_given_up_before_it_began() -> None:
    """In the same message, so its task never runs."""
    manager = FakeManager()
    async with shared(manager) as call:
        lane = pb.LaneRequest(lane=1, request=OPEN), pb.LaneRequest(lane=1, hang_up=pb.HangUp())
        await call.call.write(pb.StreamsRequest(requests=lane))
        await call.say(2, OPEN, append("abc", 1), commit(2))
        await call.until(2, "done")
        await call.call.done_writing()
        assert await call.status() == ("OK", "")
        assert not call.told[1]


async def test_a_client_that_opens_streams_and_does_not_read_is_held_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Refusals wait for nobody, so they must not pile up either."""
    monkeypatch.setattr(service_lanes, "MAX_LANES", 0)
    monkeypatch.setattr(service_lanes, "MAX_WAITING_REPLIES", 8)
    manager = FakeManager()
    num = 20_000
    async with shared(manager) as call:

        async def send() -> None:
            for lane in range(1, num + 1):
                await call.say(lane, OPEN)

        sending = asyncio.create_task(send())
        await asyncio.wait({sending}, timeout=3.0)
        assert not sending.done()
        while len(call.told) < num:
            assert await call.read()
        await sending
        assert all(events[-1].HasField("failed") for events in call.told.values())


async def test_a_message_has_a_limit_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have to wait for all of them."""
    monkeypatch.setattr(service_lanes, "MAX_REQUESTS", 3)
    async with shared(FakeManager()) as call:
        await call.say(1, OPEN, append("a", 1), append("b", 2), append("c", 3))
        assert await call.status() == (
            *("INVALID_ARGUMENT", "a message with 4 requests; 3 are the most"),
        )


async def test_a_call_that_goes_away_takes_its_streams_along() -> None:
    """As many calls of their own would."""
    manager = FakeManager()
    async with shared(manager) as call:
        for lane in (1, 2, 3):
            await call.say(lane, OPEN)
            await call.until(lane, "opened")
        call.call.cancel()
        for stream in streams_of(manager):
            await asyncio.wait_for(stream.ended.wait(), STEP_S)
            assert stream.cancelled_because == "the client went away"


async def test_a_lane_needs_a_number() -> None:
    async with shared(FakeManager()) as call:
        await call.say(0, OPEN)
        assert await call.status() == (
            *("INVALID_ARGUMENT", "lane 0: streams are numbered from 1 on"),
        )


async def test_bytes_that_are_no_message_end_the_call() -> None:
    """Nobody knows whose they are."""
    manager = FakeManager()
    async with serve(manager) as target, grpc.aio.insecure_channel(target) as channel:
        path = "/streamfill.v1.Streamfill/Streams"
        call = channel.stream_stream(path, None, pb.StreamsReply.FromString)(None)
        await call.write(request_of(1, OPEN).SerializeToString())
        assert isinstance(await call.read(), pb.StreamsReply)
        bad = request_of(1, append("ab?cd", 1)).SerializeToString().replace(b"ab?", b"ab\xc3")
        await call.write(bad)
        assert (await asyncio.wait_for(call.code(), STEP_S)).name == "INVALID_ARGUMENT"
        assert "text is not UTF-8: byte 0xc3 at offset 2" in await call.details()
        await asyncio.wait_for(streams_of(manager)[0].ended.wait(), STEP_S)


async def test_a_client_that_says_nothing_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_lanes, "FIRST_MESSAGE_S", 0.05)
    async with shared(FakeManager()) as call:
        assert await call.status() == ("ABORTED", "no message within 0.05 s of the connection")


async def test_a_call_without_streams_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not while it has one, however long that says nothing."""
    monkeypatch.setattr(service_lanes, "FIRST_MESSAGE_S", 1.0)
    monkeypatch.setattr(service_lanes, "IDLE_S", 0.05)
    async with shared(FakeManager()) as call:
        await call.say(1, OPEN)
        await call.until(1, "opened")
        await asyncio.sleep(1.3)
        assert not call.call.done()
        await call.say(1, append("abc", 1), commit(2))
        await call.until(1, "done")
        assert await call.status() == ("OK", "")


@pytest.mark.parametrize("has_stream", [False, True])
async def test_a_router_that_ends_waits_for_streams_and_not_for_calls(has_stream: bool) -> None:
    manager = FakeManager()
    server = GrpcServer(manager, "127.0.0.1", 0)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = SharedCall(channel)
        await call.say(1, OPEN, append("abc", 1))
        await call.until(1, "acknowledged")
        if not has_stream:
            await call.say(1, commit(2))
            await call.until(1, "done")
        stopping = asyncio.create_task(server.stop(STEP_S))
        if has_stream:
            await asyncio.sleep(0.1)
            assert not stopping.done()
            await call.say(2, OPEN)
            assert (await call.until(2, "failed")).failed.code == pb.CODE_UNAVAILABLE
            await call.say(1, commit(2))
            await call.until(1, "done")
        assert await call.status() == ("OK", "")
        await asyncio.wait_for(stopping, STEP_S)


async def test_a_call_has_a_limit_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_lanes, "MAX_LANES", 2)
    manager = FakeManager()
    refused: list[tuple[Api, Refusal]] = []
    async with shared(manager, lambda api, why: refused.append((api, why))) as call:
        for lane in (1, 2, 3):
            await call.say(lane, OPEN)
        failed = (await call.until(3, "failed")).failed
        assert failed.code == pb.CODE_RESOURCE_EXHAUSTED
        assert "2 streams" in failed.message
        assert refused == [(Api.GRPC, Refusal.LIMITED)]
        await call.hang_up(1)
        await call.until(2, "opened")
        await asyncio.wait_for(streams_of(manager)[0].ended.wait(), STEP_S)
        await call.say(4, OPEN)
        await call.until(4, "opened")


async def test_each_stream_has_its_own_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    manager = FakeManager()
    ordinary = manager.open

    async def noted(options: Any) -> FakeStream:
        seen.append(TRACE_PARENT.get())
        return await ordinary(options)

    monkeypatch.setattr(manager, "open", noted)
    async with shared(manager) as call:
        for lane, parent in ((1, "00-a"), (2, "00-b"), (3, "")):
            item = pb.LaneRequest(lane=lane, request=OPEN, traceparent=parent)
            await call.call.write(pb.StreamsRequest(requests=[item]))
            await call.until(lane, "opened")
    assert seen == ["00-a", "00-b", ""]


async def test_a_client_that_does_not_read_makes_its_streams_wait() -> None:
    """All of them together have room for so many replies."""
    num_tokens = 20_000
    manager = FakeManager(answer=lambda: iter("x" * 512 for _ in range(num_tokens)))
    async with shared(manager) as call:
        for lane in range(1, 9):
            await call.say(lane, OPEN, append("abc", 1), commit(2))
        await call.until(1, "token")

        def fetched() -> int:
            return sum(stream.num_fetched_events for stream in streams_of(manager))

        before = -1
        while fetched() != before:
            before = fetched()
            await asyncio.sleep(0.2)
        assert before < num_tokens
        for lane in range(1, 9):
            await call.until(lane, "done")
        assert max(call.sizes) <= service_lanes.MAX_WAITING_REPLIES
