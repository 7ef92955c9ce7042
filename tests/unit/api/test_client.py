"""The asyncio client against the real gRPC service over a core without servers."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any
from unittest.mock import patch

import grpc
import grpc.aio
import pytest

from streamfill.api import Client, Mode, Token
from streamfill.api import streamfill_pb2 as pb
from streamfill.api.stream_call import _resolve
from streamfill.api.streamfill_pb2_grpc import (
    StreamfillServicer,
    add_StreamfillServicer_to_server,
)
from streamfill.errors import (
    CancelledStreamError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    StreamError,
    UnavailableError,
)
from streamfill.observability.lifetime import LifetimeEvent, e2e_s
from tests.unit.router.fake_manager import STEP_S, FakeManager, FakeStream, serve


@pytest.fixture
def manager() -> FakeManager:
    return FakeManager()


@pytest.fixture(params=[False, True], ids=["a call each", "one call"])
def one_call(request: pytest.FixtureRequest) -> bool:
    """Whether all streams of the client share one."""
    return bool(request.param)


@pytest.fixture
async def client(manager: FakeManager, one_call: bool) -> AsyncIterator[Client]:
    async with serve(manager) as target, Client(target, one_call=one_call) as client:
        yield client


def only_stream(manager: FakeManager) -> FakeStream:
    (stream,) = manager.streams.values()
    return stream


@asynccontextmanager
async def slow_to_answer(target: str, delay_s: float) -> AsyncIterator[str]:
    """An address at which connections are taken at once, and served by ``target`` after a while."""
    host, port = target.split(":")

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await source.read(65_536):
                sink.write(data)

    writers: list[asyncio.StreamWriter] = []
    copying: list[asyncio.Future[None]] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await asyncio.sleep(delay_s)
        from_target, to_target = await asyncio.open_connection(host, int(port))
        writers.append(to_target)
        for each in (copy(reader, to_target), copy(from_target, writer)):
            copying.append(asyncio.ensure_future(each))

    async with await asyncio.start_server(pass_on, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for writer in writers:
            writer.close()
        await asyncio.gather(*copying)


async def cancelled_reason(stream: FakeStream) -> str | None:
    """Waits until the stream has ended."""
    await asyncio.wait_for(stream.ended.wait(), STEP_S)
    return stream.cancelled_because


async def test_a_document_is_streamed_and_answered(client: Client, manager: FakeManager) -> None:
    """Append twice, commit with a last piece, read tokens, look at the result."""
    async with client.stream(
        request_id="doc", priority=2, deadline_s=60.0, ttft_slo_ms=250.0
    ) as stream:
        assert (await stream.append("abc")).num_received_tokens == 3
        assert (await stream.append(token_ids=[1, 2])).num_received_tokens == 5
        tokens = [token async for token in stream.commit("?", max_tokens=9, logprobs=1)]
        assert tokens[0] == Token(
            index=0, token_id=0, text="Hello", logprob=-0.5, top_logprobs=((0, -0.5), (9, -2.0))
        )
        result = stream.result
    assert result.text == "Hello world!"
    assert result.token_ids == (0, 1, 2)
    assert (result.finish_reason, result.matched_stop) == ("stop", "END")
    usage = result.usage
    assert usage.num_prompt_tokens == 6
    assert usage.num_computed_tokens == 7
    assert (usage.num_recomputed_tokens, usage.num_reused_tokens) == (2, 1)
    assert (result.metadata.handoff_bytes, result.metadata.handoff_s) == (None, None)
    assert result.metadata.stream_id == stream.stream_id
    assert result.metadata.prefill_server == "prefill-0"
    assert result.metadata.decoded_by_prefill
    core = only_stream(manager)
    assert (core.options.request_id, core.options.priority) == ("doc", 2)
    assert (core.options.deadline_s, core.options.ttft_slo_s) == (60.0, 0.25)
    assert core.cancelled_because is None


async def test_a_busy_router_may_take_its_time_with_a_connection(manager: FakeManager) -> None:
    """Streams of one client wait for the connection and do not fail."""
    async with (
        serve(manager) as target,
        slow_to_answer(target, 0.6) as slow_target,
        Client(slow_target) as client,
        client.stream() as stream,
    ):
        assert (await stream.append("abc")).num_received_tokens == 3
        assert (await stream.commit("?", max_tokens=9).read()).text == "Hello world!"


async def test_the_timing_is_measured_from_the_commit_and_from_the_last_piece(
    client: Client,
) -> None:
    """Both are the same with a last piece in the commit, and the router's events come along."""
    async with client.stream() as stream:
        await stream.append("abc")
        timing = (await stream.commit().read()).timing
        assert timing.ttft_s is not None
        assert timing.ttft_from_last_segment_s is not None
        assert 0 < timing.ttft_s < timing.ttft_from_last_segment_s
        assert timing.token_times_s[0] == timing.ttft_s
        assert list(timing.token_times_s) == sorted(timing.token_times_s)
        assert timing.total_s >= timing.token_times_s[-1]
        assert [entry.event for entry in timing.lifetime] == [
            *(LifetimeEvent.OPENED, LifetimeEvent.COMMIT_RECEIVED, LifetimeEvent.DONE)
        ]
        assert e2e_s(timing.lifetime) == timing.lifetime[-1].at_s
    async with client.stream() as stream:
        await stream.append("abc")
        timing = (await stream.commit("d").read()).timing
        assert timing.ttft_s == timing.ttft_from_last_segment_s


async def test_the_context_of_an_update_stream_is_replaced(
    client: Client, manager: FakeManager
) -> None:
    """Progress says what the update invalidated."""
    async with client.stream(mode="update") as stream:
        await stream.update("abcdef")
        only_stream(manager).compute()
        await stream.wait_computed(STEP_S)
        progress = await stream.update(b"abX")
        assert progress.num_received_tokens == 3
        assert progress.num_invalidated_tokens == 4
        assert not progress.is_computed


async def test_waiting_for_the_prefill(client: Client, manager: FakeManager) -> None:
    """It returns when everything is computed, times out before, and fails with the stream."""
    async with client.stream() as stream:
        await stream.append("abc")
        with pytest.raises(asyncio.TimeoutError):
            await stream.wait_computed(0.01)
        only_stream(manager).compute()
        assert (await stream.wait_computed(STEP_S)).num_computed_tokens == 3
        await stream.append("d")
        waiter = asyncio.create_task(stream.wait_computed(STEP_S))
        only_stream(manager).fail(InternalError("broken"))
        with pytest.raises(InternalError, match="broken"):
            await waiter


class _ServerOfBadEnds(StreamfillServicer):
    """Says why the stream ended, and ends the call as gRPC does whose client is just writing."""

    async def Stream(self, request_iterator: Any, context: Any) -> None:  # noqa: N802
        await anext(request_iterator)
        await context.write(pb.StreamEvent(opened=pb.Opened(stream_id=1)))
        await anext(request_iterator)
        why = pb.Error(code=pb.CODE_RESOURCE_EXHAUSTED, message="no room", details={"limit": "3"})
        await context.write(pb.StreamEvent(failed=why))
        await context.abort(grpc.StatusCode.INTERNAL, "Failed to execute the batch")


async def test_the_reason_of_an_end_is_not_lost_in_a_write() -> None:
    server = grpc.aio.server()
    add_StreamfillServicer_to_server(_ServerOfBadEnds(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with Client(f"127.0.0.1:{port}") as client, client.stream() as stream:
        with pytest.raises(ResourceExhaustedError, match="no room") as refusal:
            await stream.append("abc")
        assert refusal.value.details == {"limit": "3"}
        with pytest.raises(ResourceExhaustedError, match="no room"):
            await stream.append("d")
    await server.stop(None)


async def test_a_chat_is_opened_and_grows(client: Client, manager: FakeManager) -> None:
    """Messages reach the core as they are."""
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": ""}]
    async with client.stream(messages=messages) as stream:
        await stream.append(messages=[{"role": "user", "content": "hi"}])
        assert only_stream(manager).options.messages == messages
        assert stream.progress.num_received_tokens == 2


async def test_a_refused_operation_raises_and_the_stream_goes_on(client: Client) -> None:
    """Each operation gets its own error, with the core's fields, also among several at once."""
    async with client.stream() as stream:
        with pytest.raises(FailedPreconditionError, match="append mode"):
            await stream.update("abc")
        good, bad, also_good = await asyncio.gather(
            stream.append("abc"),
            stream.append("x" * 1000),
            stream.append("de"),
            return_exceptions=True,
        )
        assert isinstance(bad, InvalidArgumentError)
        assert bad.details == {"limit_tokens": "100"}
        assert not isinstance(good, BaseException)
        assert not isinstance(also_good, BaseException)
        assert stream.progress.num_received_tokens == 5
        with pytest.raises(InvalidArgumentError, match=r"byte 0xff at offset 1"):
            await stream.append(b"a\xff")
        with pytest.raises(InvalidArgumentError, match=r"temperature is -1\.0"):
            await stream.commit(temperature=-1.0).read()
        assert (await stream.commit().read()).text == "Hello world!"


async def test_operations_after_the_commit_are_refused(
    client: Client, manager: FakeManager
) -> None:
    """During the answer and after it."""
    manager.answer = lambda: iter("x" for _ in range(20_000))
    async with client.stream() as stream:
        answer = stream.commit("abc")
        await anext(answer)
        with pytest.raises(FailedPreconditionError, match="committed"):
            await asyncio.wait_for(_read_meanwhile(stream.append("d"), answer), STEP_S)
        await answer.read()
        with pytest.raises(FailedPreconditionError, match="complete"):
            await stream.append("d")
        with pytest.raises(FailedPreconditionError, match="complete"):
            await stream.commit().read()


async def _read_meanwhile(work: object, answer: AsyncIterator[Token]) -> None:
    task = asyncio.ensure_future(work)  # type: ignore[call-overload]
    async for _ in answer:
        if task.done():
            break
    await task


async def test_leaving_before_the_commit_cancels_the_stream(
    client: Client, manager: FakeManager
) -> None:
    """And further use of it fails."""
    async with client.stream() as stream:
        await stream.append("abc")
    assert await cancelled_reason(only_stream(manager)) == "the client went away"
    with pytest.raises(CancelledStreamError):
        await stream.append("d")
    with pytest.raises(FailedPreconditionError, match="not complete"):
        stream.result  # noqa: B018


async def test_leaving_in_the_middle_of_an_answer_cancels_the_stream(
    client: Client, manager: FakeManager
) -> None:
    """Nobody reads the rest."""
    manager.answer = lambda: iter("x" for _ in range(1_000_000))
    async with client.stream() as stream:
        async for _ in stream.commit("abc"):
            break
    assert await cancelled_reason(only_stream(manager)) == "the client went away"


@pytest.mark.parametrize("how", ["break", "aclose"])
async def test_an_abandoned_one_shot_answer_is_cancelled(
    client: Client, manager: FakeManager, how: str
) -> None:
    """Whether it is closed or only forgotten."""
    manager.answer = lambda: iter("x" for _ in range(1_000_000))
    if how == "break":
        async for _ in client.generate("abc"):
            break
        gc.collect()
    else:
        async with client.generate("abc") as answer:
            await anext(answer)
    assert await cancelled_reason(only_stream(manager)) == "the client went away"


async def test_a_cancelled_caller_leaves_its_stream_alive(
    client: Client, manager: FakeManager
) -> None:
    """gRPC itself would cancel the whole call with the task that writes or reads."""
    manager.hold_answer = True
    async with client.stream() as stream:
        task = asyncio.create_task(stream.append("abc"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await stream.append("d")
        assert stream.progress.num_received_tokens == 4
        answer = stream.commit()
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(answer), 0.05)
        assert only_stream(manager).failure is None
        only_stream(manager).fail(DeadlineExceededError("too late"))
        with pytest.raises(DeadlineExceededError, match="too late"):
            await answer.read()


async def test_a_caller_that_gave_up_before_the_call_ended_leaves_no_noise(
    client: Client, manager: FakeManager
) -> None:
    """Nobody waits for the operation any more, so its error is nobody's, and is not printed."""
    said: list[str] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: said.append(context["message"]))
    try:
        async with client.stream() as stream:
            await stream.append("abc")
            with patch.object(pb.StreamEvent, "WhichOneof", lambda event, name: None):
                task = asyncio.create_task(stream.append("never answered"))
                await asyncio.sleep(0.05)
                task.cancel()
                await asyncio.wait({task})
                await client.close()
        await asyncio.sleep(0)
        gc.collect()
    finally:
        loop.set_exception_handler(None)
    assert said == []


def test_an_error_of_an_operation_that_was_never_awaited_leaves_no_noise() -> None:
    """As of one whose task was cancelled while it wrote."""
    said: list[str] = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: said.append(context["message"]))
    future: asyncio.Future[None] = loop.create_future()
    _resolve(future, CancelledStreamError("gone"))
    del future
    gc.collect()
    loop.close()
    assert said == []


async def test_a_stream_is_used_inside_async_with(client: Client) -> None:
    """Before, nothing is open."""
    stream = client.stream()
    for work in (stream.append("a"), stream.cancel()):
        with pytest.raises(FailedPreconditionError, match="inside `async with`"):
            await work
    with pytest.raises(FailedPreconditionError, match="inside `async with`"):
        stream.commit("a")


async def test_cancel_says_why(client: Client, manager: FakeManager) -> None:
    """And may be repeated."""
    async with client.stream() as stream:
        await stream.append("abc")
        await stream.cancel("found it elsewhere")
        await stream.cancel()
        assert await cancelled_reason(only_stream(manager)) == "found it elsewhere"
        with pytest.raises(CancelledStreamError, match="found it elsewhere"):
            await stream.append("d")


async def test_whole_prompts(client: Client, manager: FakeManager) -> None:
    """As text, as ids, as messages; token by token, or all at once."""
    answer = client.generate("abc", stop=["\n"])
    assert [token.text async for token in answer] == ["Hello", " ", "world"]
    assert answer.result.text == "Hello world!"
    assert (await client.complete(token_ids=[1, 2])).usage.num_prompt_tokens == 2
    messages = [{"role": "user", "content": "hello"}]
    assert list(manager.streams.values())[-1].options.ttft_slo_s is None
    result = await client.complete(
        messages=messages, priority=4, request_id="r", deadline_s=9.0, ttft_slo_ms=50.0
    )
    assert result.usage.num_prompt_tokens == 5
    options = list(manager.streams.values())[-1].options
    assert (options.priority, options.request_id, options.deadline_s) == (4, "r", 9.0)
    assert options.ttft_slo_s == 0.05


async def test_the_texts_of_an_answer_are_its_whole_text(
    client: Client, manager: FakeManager
) -> None:
    """With the tail, and without the tokens that show nothing."""
    manager.answer = lambda: iter(("Hel", "", "lo"))
    assert [text async for text in client.generate("abc").texts()] == ["Hel", "lo", "!"]


async def test_errors_carry_code_message_fields_and_cause(client: Client) -> None:
    """gRPC's error is the cause."""
    with pytest.raises(InvalidArgumentError, match=r"101 tokens") as caught:
        await client.complete("x" * 101)
    assert caught.value.details == {"limit_tokens": "100"}
    assert type(caught.value.__cause__).__name__ == "AioRpcError"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "not none"),
        ({"text": "a", "token_ids": [1]}, "not text and token_ids"),
        ({"text": "a\ud800"}, "offset 1 is half a surrogate pair"),
        ({"token_ids": [2**70]}, "token_ids cannot be sent"),
        ({"messages": [{"role": "user"}]}, "the keys role and content, not role"),
    ],
)
async def test_what_cannot_be_sent_is_refused_at_once(
    client: Client, arguments: dict[str, object], words: str
) -> None:
    """With the same error class as the router's refusals."""
    async with client.stream() as stream:
        with pytest.raises(InvalidArgumentError, match=words):
            await stream.append(**arguments)  # type: ignore[arg-type]


async def test_what_cannot_be_sent_besides_the_prompt(client: Client) -> None:
    """It is refused in the same way in every call."""
    with pytest.raises(InvalidArgumentError, match="cannot be sent"):
        client.stream(priority=2**40)
    with pytest.raises(InvalidArgumentError, match="cannot be sent"):
        client.generate("x", priority=2**40)
    for call in (client.drain_server, client.resume_server):
        with pytest.raises(InvalidArgumentError, match="cannot be sent"):
            await call("a\ud800")


def test_a_url_is_no_target() -> None:
    """The client speaks gRPC; the router's URL is for others."""
    for url in ("http://127.0.0.1:8000/v1", "HTTPS://llm.example.org:50051"):
        with pytest.raises(InvalidArgumentError, match="give HOST:PORT of gRPC"):
            Client(url)


async def test_mistakes_of_the_program_are_type_errors(client: Client) -> None:
    """An unknown option, a stop that is one string, and values of a wrong type, by their names."""
    with pytest.raises(TypeError, match="unknown sampling options: temprature"):
        client.generate("a", temprature=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="sequence of strings"):
        client.generate("a", stop="END")
    number: Any = 5
    with pytest.raises(TypeError, match="stop has a wrong type, or holds one: list"):
        client.generate("a", stop=[number])
    with pytest.raises(TypeError, match="request_id has a wrong type, or holds one: int"):
        client.stream(request_id=number)
    with pytest.raises(TypeError, match="text has a wrong type, or holds one: int"):
        client.generate(number)
    with pytest.raises(TypeError, match="ids has a wrong type, or holds one: list"):
        client.generate(token_ids=["5"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="content has a wrong type, or holds one: int"):
        client.generate(messages=[{"role": "user", "content": number}])
    mode: Mode = "prepend"  # type: ignore[assignment]
    with pytest.raises(InvalidArgumentError, match="'append' or 'update'"):
        client.stream(mode=mode)


async def test_the_cluster_is_described(client: Client) -> None:
    """As plain typed data."""
    info = await client.server_info()
    assert (info.model, info.ready, info.decode_available) == ("fake", True, False)
    assert info.num_streams_by_outcome == {"DONE": 3}
    assert info.servers[0].role == "prefill"
    assert info.servers[0].counters["num_free_tokens"] == 9
    assert await client.flush_caches() == {"prefill-0": True}


async def test_waiting_until_ready(client: Client, manager: FakeManager) -> None:
    """It returns when a prefill server is alive, and says what is missing when it gives up."""
    manager.set_ready(False)
    with pytest.raises(UnavailableError, match="no prefill server is alive"):
        await client.wait_ready(0.0)
    waiter = asyncio.create_task(client.wait_ready(STEP_S))
    await asyncio.sleep(0.01)
    manager.set_ready(True)
    assert (await waiter).ready


async def test_no_router_is_unavailable(one_call: bool) -> None:
    """A stream, a one-shot call and the wait all say so."""
    with socket.socket() as deaf:  # it is held, so that nobody else listens there
        deaf.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{deaf.getsockname()[1]}"
        async with Client(target, one_call=one_call) as client:
            with pytest.raises(UnavailableError):
                await client.complete("abc")
            with pytest.raises(UnavailableError):
                async with client.stream():
                    pass
            with pytest.raises(UnavailableError, match=f"{target} is not ready after 0 s"):
                await client.wait_ready(0.0)


async def test_a_router_that_stops_ends_its_streams(manager: FakeManager, one_call: bool) -> None:
    """Whoever waits hears of it."""
    async with AsyncExitStack() as stack:
        async with serve(manager) as target:
            client = await stack.enter_async_context(Client(target, one_call=one_call))
            stream = await stack.enter_async_context(client.stream())
            await stream.append("abc")
            waiter = asyncio.create_task(stream.wait_computed(STEP_S))
            await asyncio.sleep(0)
        with pytest.raises(StreamError):
            await waiter


async def test_a_slow_reader_loses_nothing(client: Client, manager: FakeManager) -> None:
    """The queue in the client is shorter than the answer; every token comes, in order."""
    manager.answer = lambda: iter(f"{n}," for n in range(3000))
    async with client.stream() as stream:
        answer = stream.commit("abc")
        first = await anext(answer)
        await asyncio.sleep(0.05)
        indexes = [first.index] + [token.index async for token in answer]
    assert indexes == list(range(3000))
