"""A stream in a two-way call, message by message, as any gRPC client could send them: in a call of
its own, and as a lane of one that several share."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TypeAlias

import grpc
import grpc.aio
import pytest

from streamfill.api import streamfill_pb2 as pb
from streamfill.api.streamfill_pb2_grpc import StreamfillStub
from streamfill.errors import InternalError
from tests.unit.router.fake_manager import CONTEXT_TOKENS, STEP_S, FakeManager, FakeStream, serve
from tests.unit.router.lane_call import LaneCall

Call: TypeAlias = grpc.aio.StreamStreamCall[pb.StreamRequest, pb.StreamEvent] | LaneCall


@pytest.fixture(params=["Stream", "Streams"])
def form(request: pytest.FixtureRequest) -> str:
    """By which the stream is called."""
    return str(request.param)


def call_of(channel: grpc.aio.Channel, form: str) -> Call:
    return StreamfillStub(channel).Stream(None) if form == "Stream" else LaneCall(channel)


def text(value: str) -> pb.Segment:
    return pb.Segment(text=value)


def append(value: str, seq: int | None = None) -> pb.StreamRequest:
    return pb.StreamRequest(seq=seq, append=pb.Append(segment=text(value)))


def update(value: str, seq: int | None = None) -> pb.StreamRequest:
    return pb.StreamRequest(seq=seq, update=pb.Update(segment=text(value)))


def commit(seq: int | None = None, **sampling: float) -> pb.StreamRequest:
    options = pb.Sampling(**sampling)  # type: ignore[arg-type]
    return pb.StreamRequest(seq=seq, commit=pb.Commit(sampling=options))


async def read(call: Call, kind: str) -> pb.StreamEvent:
    """The next event of this kind; acknowledgements may come at any time."""
    while True:
        event = await asyncio.wait_for(call.read(), STEP_S)
        assert isinstance(event, pb.StreamEvent), "the call ended"
        if event.WhichOneof("event") == kind:
            return event
        assert event.WhichOneof("event") == "acknowledged", event


async def status(call: Call) -> tuple[str, str]:
    """How the call ended; a bad end is told by its last event too."""
    last = None
    with suppress(grpc.aio.AioRpcError):
        while isinstance(event := await asyncio.wait_for(call.read(), STEP_S), pb.StreamEvent):
            last = event
    code = await asyncio.wait_for(call.code(), STEP_S)
    if code is not grpc.StatusCode.OK:
        assert last is not None
        assert pb.Code.Name(last.failed.code) == f"CODE_{code.name}"
        assert await call.details() in last.failed.message
    return code.name, await call.details()


@asynccontextmanager
async def opened(
    manager: FakeManager, form: str, mode: pb.StreamMode = pb.STREAM_MODE_APPEND
) -> AsyncIterator[Call]:
    async with serve(manager) as target, grpc.aio.insecure_channel(target) as channel:
        call = call_of(channel, form)
        await call.write(pb.StreamRequest(open=pb.Open(mode=mode)))
        await read(call, "opened")
        yield call


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_stream_is_opened_filled_committed_and_answered(at_once: bool, form: str) -> None:
    """Open, append, commit; opened, acknowledged, tokens, done, status OK."""
    manager = FakeManager(changes_at_once=at_once)
    async with opened(manager, form) as call:
        await call.write(append("abc", seq=1))
        event = await read(call, "acknowledged")
        assert event.acknowledged == pb.Acknowledged(seq=1, num_received_tokens=3)
        await call.write(commit(seq=2, max_tokens=5))
        texts = [(await read(call, "token")).token.text for _ in range(3)]
        assert texts == ["Hello", " ", "world"]
        done = (await read(call, "done")).done
        assert done.text_tail == "!"
        assert done.matched_stop_string == "END"
        assert done.usage.num_prompt_tokens == 3
        assert done.metadata.decoded_by_prefill
        assert [event.name for event in done.metadata.lifetime] == [
            *("OPENED", "COMMIT_RECEIVED", "DONE")
        ]
        assert await status(call) == ("OK", "")
    (stream,) = manager.streams.values()
    assert stream.committed is not None
    assert stream.committed.sampling.max_new_tokens == 5
    assert stream.committed.sampling.temperature == 1.0
    assert stream.cancelled_because is None


async def test_an_update_replaces_the_context_and_says_what_it_invalidated(form: str) -> None:
    """The acknowledgement of an update counts computed tokens that were thrown away."""
    manager = FakeManager()
    async with opened(manager, form, pb.STREAM_MODE_UPDATE) as call:
        await call.write(update("abcdef", seq=1))
        await read(call, "acknowledged")
        (stream,) = manager.streams.values()
        stream.compute()
        while not (await read(call, "acknowledged")).acknowledged.num_computed_tokens:
            pass
        await call.write(update("abX", seq=2))
        while (event := await read(call, "acknowledged")).acknowledged.seq < 2:
            pass
        assert event.acknowledged == pb.Acknowledged(
            seq=2, num_received_tokens=3, num_computed_tokens=2, num_invalidated_tokens=4
        )


@pytest.mark.parametrize(
    ("mode", "request_", "code", "words"),
    [
        (1, update("x", 7), pb.CODE_FAILED_PRECONDITION, "append mode"),
        (2, append("x", 7), pb.CODE_FAILED_PRECONDITION, "update mode"),
        (1, commit(7), pb.CODE_INVALID_ARGUMENT, "empty prompt"),
        (1, commit(7, temperature=-0.5), pb.CODE_INVALID_ARGUMENT, "temperature is -0.5"),
        (1, append("x" * (CONTEXT_TOKENS + 1), 7), pb.CODE_INVALID_ARGUMENT, "101 tokens"),
        (1, pb.StreamRequest(seq=7, append=pb.Append()), pb.CODE_INVALID_ARGUMENT, "no content"),
        (1, pb.StreamRequest(seq=7), pb.CODE_INVALID_ARGUMENT, "no operation"),
        (1, pb.StreamRequest(seq=7, open=pb.Open()), pb.CODE_FAILED_PRECONDITION, "already open"),
    ],
)
async def test_a_refused_operation_is_answered_in_the_call_and_harms_nothing(
    mode: pb.StreamMode, request_: pb.StreamRequest, code: pb.Code, words: str, form: str
) -> None:
    """The error names the operation and the value; afterwards the stream can be completed."""
    manager = FakeManager()
    async with opened(manager, form, mode) as call:
        await call.write(request_)
        error = (await read(call, "error")).error
        assert (error.seq, error.code) == (7, code)
        assert words in error.message
        (stream,) = manager.streams.values()
        assert stream.refused_seqs == [7]
        await call.write(append("ok", 8) if mode == 1 else update("ok", 8))
        await call.write(commit(9))
        assert (await read(call, "token")).token.index == 0


@pytest.mark.parametrize("at_once", [False, True])
async def test_an_operation_that_breaks_ends_the_call(
    monkeypatch: pytest.MonkeyPatch, at_once: bool, form: str
) -> None:
    """At once, though the client sends nothing more; the status says what it was."""

    async def broken(*args: object) -> None:
        raise RuntimeError("a bug")

    def broken_at_once(*args: object) -> bool:
        raise RuntimeError("a bug")

    if at_once:
        monkeypatch.setattr(FakeStream, "change_at_once", broken_at_once)
    else:
        monkeypatch.setattr(FakeStream, "append", broken)
    async with opened(FakeManager(changes_at_once=at_once), form) as call:
        await call.write(append("abc", 1))
        code, message = await status(call)
        assert code == "INTERNAL"
        assert "RuntimeError('a bug')" in message


async def test_operations_after_the_commit_are_refused_and_the_answer_goes_on(form: str) -> None:
    """Append and a second commit after the commit get FAILED_PRECONDITION."""
    manager = FakeManager(hold_answer=True)
    async with opened(manager, form) as call:
        await call.write(append("abc", 1))
        await call.write(commit(2))
        for request in (append("more", 3), commit(4)):
            await call.write(request)
            error = (await read(call, "error")).error
            assert (error.seq, error.code) == (request.seq, pb.CODE_FAILED_PRECONDITION)
        (stream,) = manager.streams.values()
        assert stream.failure is None
        assert len(stream.tokens) == 3


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_repeated_number_is_acknowledged_and_not_applied(at_once: bool, form: str) -> None:
    """The same append sent twice grows the context once."""
    manager = FakeManager(changes_at_once=at_once)
    async with opened(manager, form) as call:
        for _ in range(2):
            await call.write(append("abc", 1))
        await call.write(append("d", 2))
        num_answers = 0
        while (event := await read(call, "acknowledged")).acknowledged.seq < 2:
            num_answers += 1
        assert num_answers >= 2
        assert event.acknowledged.num_received_tokens == 4


@pytest.mark.parametrize("field", ["text", "text_utf8"])
async def test_text_that_is_not_utf8_is_named_with_offset_and_byte(field: str) -> None:
    """Also in a string field, which gRPC itself would answer with INTERNAL; the call goes on."""
    manager = FakeManager()
    async with serve(manager) as target, grpc.aio.insecure_channel(target) as channel:
        call = channel.stream_stream(
            "/streamfill.v1.Streamfill/Stream", None, pb.StreamEvent.FromString
        )(None)
        await call.write(pb.StreamRequest(open=pb.Open()).SerializeToString())
        await read(call, "opened")
        good = pb.StreamRequest(
            seq=3, append=pb.Append(segment=pb.Segment(text_utf8=b"ab\xc3(cd"))
        ).SerializeToString()
        # On the wire `text` and `text_utf8` differ in their number only: 1 and 2.
        await call.write(good.replace(b"\x12\x06ab", b"\x0a\x06ab") if field == "text" else good)
        error = (await read(call, "error")).error
        assert (error.seq, error.code) == (3, pb.CODE_INVALID_ARGUMENT)
        assert f".{field} is not UTF-8: byte 0xc3 at offset 2" in error.message
        await call.write(append("fine", 4).SerializeToString())
        assert (await read(call, "acknowledged")).acknowledged.num_received_tokens == 4


async def test_bytes_that_are_no_message_are_refused() -> None:
    """A truncated message gets INVALID_ARGUMENT, not INTERNAL."""
    async with serve(FakeManager()) as target, grpc.aio.insecure_channel(target) as channel:
        call = channel.stream_stream(
            "/streamfill.v1.Streamfill/Stream", None, pb.StreamEvent.FromString
        )(None)
        await call.write(b"\x12\xff")
        code, details = await status(call)
        assert code == "INVALID_ARGUMENT"
        assert "2 bytes that are no streamfill.v1.StreamRequest" in details


async def test_the_first_message_must_open(form: str) -> None:
    """A call that begins with anything else fails, and no stream is made."""
    manager = FakeManager()
    async with serve(manager) as target, grpc.aio.insecure_channel(target) as channel:
        call = call_of(channel, form)
        await call.write(append("abc"))
        assert await status(call) == (
            *("FAILED_PRECONDITION", "the first message of a call is open or resume, not append"),
        )
    assert not manager.streams


async def test_without_a_prefill_server_the_call_is_unavailable(form: str) -> None:
    """What goes wrong while opening ends the call."""
    async with (
        serve(FakeManager(ready=False)) as target,
        grpc.aio.insecure_channel(target) as channel,
    ):
        call = call_of(channel, form)
        await call.write(pb.StreamRequest(open=pb.Open()))
        assert (await status(call))[0] == "UNAVAILABLE"


@pytest.mark.parametrize("when", ["before the commit", "before the first token", "among tokens"])
async def test_a_client_that_goes_away_cancels_its_stream(when: str, form: str) -> None:
    """At any moment."""
    manager = FakeManager(hold_answer=when == "before the first token")
    manager.answer = lambda: iter("x" * 1000 for _ in range(100_000))
    async with opened(manager, form) as call:
        await call.write(append("abc", 1))
        await read(call, "acknowledged")
        if when != "before the commit":
            await call.write(commit(2))
        if when == "among tokens":
            await read(call, "token")
        (stream,) = manager.streams.values()
        call.cancel()
        await asyncio.wait_for(stream.ended.wait(), STEP_S)
        assert stream.cancelled_because == "the client went away"


async def test_a_cancel_message_ends_the_stream_with_its_reason(form: str) -> None:
    """The call ends with CANCELLED."""
    manager = FakeManager()
    async with opened(manager, form) as call:
        await call.write(pb.StreamRequest(cancel=pb.Cancel(reason="changed my mind")))
        assert await status(call) == ("CANCELLED", "cancelled: changed my mind")
        (stream,) = manager.streams.values()
        assert stream.cancelled_because == "changed my mind"


async def test_closing_the_clients_side_without_a_commit_gives_the_stream_up(form: str) -> None:
    """Nothing could ever complete it."""
    manager = FakeManager()
    async with opened(manager, form) as call:
        await call.write(append("abc", 1))
        await read(call, "acknowledged")
        await call.done_writing()
        assert await status(call) == ("CANCELLED", "the client ended the call without a commit")
        (stream,) = manager.streams.values()
        await asyncio.wait_for(stream.ended.wait(), STEP_S)


async def test_closing_the_clients_side_right_behind_the_opening_gives_the_stream_up(
    form: str,
) -> None:
    """Before anything was answered; the client hears that it was open."""
    manager = FakeManager()
    async with serve(manager) as target, grpc.aio.insecure_channel(target) as channel:
        call = call_of(channel, form)
        await call.write(pb.StreamRequest(open=pb.Open(mode=pb.STREAM_MODE_APPEND)))
        await call.done_writing()
        await read(call, "opened")
        assert await status(call) == ("CANCELLED", "the client ended the call without a commit")
        (stream,) = manager.streams.values()
        await asyncio.wait_for(stream.ended.wait(), STEP_S)


async def test_closing_the_clients_side_after_the_commit_leaves_the_answer(form: str) -> None:
    """A client that has said everything may close its side."""
    async with opened(FakeManager(), form) as call:
        await call.write(append("abc", 1))
        await call.write(commit(2))
        await call.done_writing()
        assert (await read(call, "token")).token.text == "Hello"
        while isinstance(await call.read(), pb.StreamEvent):
            pass
        assert await status(call) == ("OK", "")


async def test_a_stream_that_fails_ends_the_call_with_its_error(form: str) -> None:
    """Code, message and rich details are those of the stream's error."""
    manager = FakeManager()
    async with opened(manager, form) as call:
        (stream,) = manager.streams.values()
        stream.fail(InternalError("the ledger is off", details={"num_tokens": 3}))
        assert await status(call) == ("INTERNAL", "the ledger is off")
        if isinstance(call, LaneCall):
            return  # what happens to one stream is not how the call ends
        details = dict(await call.trailing_metadata())["grpc-status-details-bin"]
        assert isinstance(details, bytes)
        (info,) = pb.RpcStatus.FromString(details).details
        assert pb.RpcErrorInfo.FromString(info.value).metadata == {"num_tokens": "3"}


async def test_a_client_that_does_not_read_makes_nothing_pile_up(form: str) -> None:
    """Tokens are fetched from the core only as fast as the client takes them."""
    num_tokens = 20_000
    manager = FakeManager(answer=lambda: iter("x" * 4096 for _ in range(num_tokens)))
    async with opened(manager, form) as call:
        await call.write(append("abc", 1))
        await call.write(commit(2))
        await read(call, "token")
        (stream,) = manager.streams.values()
        before = -1
        while stream.num_fetched_events != before:
            before = stream.num_fetched_events
            await asyncio.sleep(0.2)
        assert before < num_tokens / 2
        await read(call, "token")
