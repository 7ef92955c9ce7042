"""A client whose router vanishes, against a router that follows a script."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from streamfill.api import Client
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.resumption import resume_call
from streamfill.api.streamfill_pb2_grpc import (
    StreamfillServicer,
    add_StreamfillServicer_to_server,
)
from streamfill.errors import (
    CancelledStreamError,
    ErrorCode,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    StreamError,
    UnavailableError,
)

PATIENCE_S = 30.0


class Call:
    """One ``Stream`` call, or the first lane of a ``Streams`` call, as the router sees it."""

    def __init__(self, requests: Any, context: Any, *, is_lane: bool) -> None:
        self._requests = _first_lane(requests) if is_lane else requests
        self._context = context
        self._is_lane = is_lane

    async def read(self, operation: str) -> Any:
        """The next message, which must be this one; with its number where it has one."""
        request = await asyncio.wait_for(anext(self._requests), PATIENCE_S)
        assert request.WhichOneof("operation") == operation
        return request

    async def say(self, **event: Any) -> None:
        told: Any = pb.StreamEvent(**event)
        if self._is_lane:
            told = pb.StreamsReply(replies=[pb.LaneReply(lane=1, event=told)])
        await self._context.write(told)

    async def vanish(self) -> None:
        """As a connection that breaks: without a word."""
        await self._context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


async def _first_lane(requests: Any) -> AsyncIterator[Any]:
    async for request in requests:
        for each in request.requests:
            if each.lane == 1 and each.HasField("request"):
                yield each.request


Script = Callable[[Call], Awaitable[None]]


class Router(StreamfillServicer):
    """Follows one script per call, in their order."""

    def __init__(self, scripts: Sequence[Script]) -> None:
        self.scripts = list(scripts)
        self.failure: BaseException | None = None

    async def Stream(self, requests: Any, context: Any) -> None:  # noqa: N802
        await self._follow(Call(requests, context, is_lane=False))

    async def Streams(self, requests: Any, context: Any) -> None:  # noqa: N802
        await self._follow(Call(requests, context, is_lane=True))

    async def _follow(self, call: Call) -> None:
        try:
            await self.scripts.pop(0)(call)
        except AssertionError as failure:
            self.failure = failure
            raise


ONE_CALL = False
"""Of the clients; see ``one_call``."""


@pytest.fixture(params=[False, True], ids=["a call each", "one call"], autouse=True)
def one_call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether all streams of a client share one."""
    monkeypatch.setattr(f"{__name__}.ONE_CALL", request.param)
    return bool(request.param)


@asynccontextmanager
async def client_of(*scripts: Script, reconnect_s: float = PATIENCE_S) -> AsyncIterator[Client]:
    """A client of a router that follows the scripts; each must be followed to its end."""
    router, server = Router(scripts), grpc.aio.server()
    add_StreamfillServicer_to_server(router, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        target = f"127.0.0.1:{port}"
        async with Client(target, reconnect_s=reconnect_s, one_call=ONE_CALL) as client:
            yield client
    finally:
        await server.stop(None)
        if router.failure is not None:
            raise router.failure
    assert not router.scripts


def opened(**fields: Any) -> dict[str, Any]:
    return {"opened": pb.Opened(stream_id=7, is_resumable=True, **fields)}


def acknowledged(seq: int) -> pb.Acknowledged:
    return pb.Acknowledged(seq=seq, num_received_tokens=10 * seq)


async def test_what_was_not_answered_is_sent_again() -> None:
    """Under the old numbers and in the old order, behind what the router says it has; what it
    refused is told, and not sent again."""

    async def first(call: Call) -> None:
        await call.read("open")
        await call.say(**opened())
        await call.read("append")
        await call.say(acknowledged=acknowledged(1))
        for _ in range(4):
            await call.read("append")
        await call.vanish()

    async def second(call: Call) -> None:
        resume = (await call.read("resume")).resume
        assert (resume.stream_id, resume.next_seq, resume.next_token_index) == (7, 2, 0)
        refusal = pb.Error(seq=2, code=pb.CODE_RESOURCE_EXHAUSTED, message="no room")
        await call.say(**opened(acknowledged=acknowledged(3), refused=[refusal]))
        for seq in (4, 5):
            assert (await call.read("append")).seq == seq
            await call.say(acknowledged=acknowledged(seq))
        assert (await call.read("append")).seq == 6
        await call.say(acknowledged=acknowledged(6))

    async with client_of(first, second) as client, client.stream() as stream:
        await stream.append("1")
        tasks = [asyncio.create_task(stream.append(str(n))) for n in range(2, 6)]
        done = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), PATIENCE_S)
        assert isinstance(done[0], ResourceExhaustedError)
        assert [isinstance(each, BaseException) for each in done] == [True, False, False, False]
        assert (await stream.append("6")).seq == 6
        assert stream.num_resumptions == 1


async def test_numbers_that_were_refused_are_told_to_the_new_router() -> None:
    """An operation still open in front of one that was refused: both numbers are known there."""

    async def first(call: Call) -> None:
        await call.read("open")
        await call.say(**opened())
        await call.read("append")
        await call.read("append")
        error = pb.Error(seq=2, code=pb.CODE_INVALID_ARGUMENT, message="bad")
        await call.say(error=error)
        await call.vanish()

    async def second(call: Call) -> None:
        resume = (await call.read("resume")).resume
        assert (resume.next_seq, list(resume.refused_seqs)) == (1, [2])
        await call.say(**opened(acknowledged=acknowledged(0)))
        assert (await call.read("append")).seq == 1
        await call.say(acknowledged=acknowledged(1))

    async with client_of(first, second) as client, client.stream() as stream:
        one = asyncio.create_task(stream.append("1"))
        await asyncio.sleep(0)
        with pytest.raises(InvalidArgumentError):
            await stream.append("2")
        assert (await asyncio.wait_for(one, PATIENCE_S)).seq == 1


async def test_an_answer_goes_on_behind_the_tokens_that_came() -> None:
    """The commit is not sent again when it was applied."""

    async def first(call: Call) -> None:
        await call.read("open")
        await call.say(**opened())
        await call.read("commit")
        for index in range(2):
            await call.say(token=pb.Token(index=index, token_id=index, text="t"))
        await call.vanish()

    async def second(call: Call) -> None:
        resume = (await call.read("resume")).resume
        assert resume.next_token_index == 2
        await call.say(**opened(acknowledged=acknowledged(1), is_committed=True))
        await call.say(token=pb.Token(index=2, token_id=2, text="t"))
        await call.say(done=pb.Done(finish_reason="stop"))

    async with client_of(first, second) as client, client.stream() as stream:
        result = await asyncio.wait_for(stream.commit("x").read(), PATIENCE_S)
        assert result.token_ids == (0, 1, 2)


async def test_a_token_out_of_order_is_never_given_out() -> None:
    """One that is missing would else be taken for the whole answer."""

    async def first(call: Call) -> None:
        await call.read("open")
        await call.say(**opened())
        await call.read("commit")
        await call.say(token=pb.Token(index=1, token_id=1, text="t"))

    async with client_of(first) as client, client.stream() as stream:
        with pytest.raises(InternalError, match="token 1 came instead of 0"):
            await asyncio.wait_for(stream.commit("x").read(), PATIENCE_S)


async def test_a_log_that_lost_something_is_noticed() -> None:
    """What was acknowledged and is not there any more ends the stream with DATA_LOSS."""

    async def first(call: Call) -> None:
        await call.read("open")
        await call.say(**opened())
        await call.read("append")
        await call.say(acknowledged=acknowledged(1))
        await call.vanish()

    async def second(call: Call) -> None:
        await call.read("resume")
        await call.say(**opened(acknowledged=acknowledged(0)))

    async with client_of(first, second) as client, client.stream() as stream:
        await stream.append("1")
        with pytest.raises(StreamError, match="knows only of 0") as caught:
            await asyncio.wait_for(stream.append("2"), PATIENCE_S)
        assert caught.value.code is ErrorCode.DATA_LOSS


async def test_what_the_router_says_itself_is_final() -> None:
    """A stream that a router ends as unavailable is not looked for."""

    async def first(call: Call) -> None:
        await call.read("open")
        await call.say(**opened())
        await call.read("append")
        await call.say(failed=pb.Error(code=pb.CODE_UNAVAILABLE, message="shutting down"))
        await call.vanish()

    async with client_of(first) as client, client.stream() as stream:
        with pytest.raises(UnavailableError, match="shutting down"):
            await asyncio.wait_for(stream.append("1"), PATIENCE_S)


@pytest.mark.parametrize("way", ["leave", "cancel"])
async def test_a_stream_may_be_left_while_its_router_is_away(way: str) -> None:
    """At once, and whoever waits for an answer is told."""
    is_looked_for = asyncio.Event()

    async def first(call: Call) -> None:
        await call.read("open")
        await call.say(**opened())
        await call.read("append")
        await call.vanish()

    async def second(call: Call) -> None:
        await call.read("resume")
        is_looked_for.set()
        await asyncio.sleep(PATIENCE_S)  # it never answers

    async with client_of(first, second) as client:
        began_s = 0.0
        async with client.stream() as stream:
            waiting = asyncio.create_task(stream.append("1"))
            await asyncio.wait_for(is_looked_for.wait(), PATIENCE_S)
            began_s = time.monotonic()
            if way == "cancel":
                await stream.cancel("enough")
        assert time.monotonic() - began_s < PATIENCE_S / 2
        with pytest.raises(StreamError):
            await asyncio.wait_for(waiting, PATIENCE_S)


class NewCall:
    """A call that goes on with a stream, once ``answers`` is set. As a lane, it knows nothing of
    the task that reads from it."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.is_read = asyncio.Event()
        self.is_cancelled = False

    async def write(self, request: pb.StreamRequest) -> None:
        """It is taken."""

    async def read(self) -> pb.StreamEvent:
        self.is_read.set()
        await self.answers.wait()
        return pb.StreamEvent(**opened())

    def cancel(self) -> bool:
        self.is_cancelled = True
        return True


@pytest.mark.parametrize("way", ["leave", "give up"])
async def test_a_call_that_nobody_wants_any_more_is_cancelled(way: str) -> None:
    """Else the router would keep the stream of a lane, and the client all that comes on it."""
    call = NewCall()
    is_given_up = False
    looking = asyncio.create_task(
        resume_call(
            lambda: call,
            pb.Resume(stream_id=7),
            reconnect_s=PATIENCE_S,
            is_given_up=lambda: is_given_up,
        )
    )
    await call.is_read.wait()
    if way == "leave":
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
    else:
        is_given_up = True
        call.answers.set()
        with pytest.raises(CancelledStreamError):
            await looking
    assert call.is_cancelled


async def test_the_time_to_look_for_a_router_is_checked() -> None:
    """A time that makes no sense is refused when the client is made."""
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidArgumentError, match="reconnect_s"):
            Client("127.0.0.1:1", reconnect_s=value)
