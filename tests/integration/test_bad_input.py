"""Bad input, line by line: what a client, an operator or a broken cluster gets for it.

Frames that are no messages are in ``test_garbage``, a start that cannot work in ``test_bad_start``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from streamfill.api import Client
from streamfill.api import streamfill_pb2 as pb
from streamfill.errors import (
    ErrorCode,
    FailedPreconditionError,
    InvalidArgumentError,
    StreamError,
    StreamNotFoundError,
    UnavailableError,
)
from tests.support.cli import run_cli
from tests.support.cluster import RunningCluster, start_cluster
from tests.support.forms import APPEND, UPDATE, Bidi, Form, Lane, Unary, greedy, ids, reply_of, text
from tests.support.processes import kill
from tests.support.waiting import until

pytestmark = pytest.mark.integration

PROMPT = "A river runs through the valley, and nobody knows where it begins. " * 4
NUM_TOKENS = 12
LONG_ANSWER_TOKENS = 150
"""Takes a third of a second, so that what follows the commit at once comes in its middle."""

POOL_TOKENS = 600
"""Of the small cluster, far below the tiny model's context of 8,192."""

READINESS = pb.DESCRIPTOR.services_by_name["Streamfill"].full_name
NOTICED_S = 30.0
RESTART_S = 90.0
"""A server is back after about ten seconds on two quiet cores."""


@pytest.fixture
async def client(cluster: RunningCluster) -> AsyncIterator[Client]:
    """A client of the shared cluster."""
    async with Client(cluster.address) as client:
        yield client


@pytest.fixture(params=[Bidi, Lane, Unary], ids=["bidi", "lane", "unary"])
def form(request: pytest.FixtureRequest) -> type[Form]:
    """The form of the API."""
    chosen: type[Form] = request.param
    return chosen


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_model: object) -> Iterator[RunningCluster]:
    """A cluster whose KV pools are smaller than the context, and whose servers may be killed."""
    running = start_cluster(
        tmp_path_factory.mktemp("small"),
        tiny_model,  # type: ignore[arg-type]
        "small",
        settings=[
            f"prefill.pool_tokens={POOL_TOKENS}",
            f"decode.pool_tokens={POOL_TOKENS}",
            "launcher.max_restarts=20",
        ],
    )
    yield running
    running.stop()


async def one_shot(client: Client, prompt: str | list[int], num_tokens: int) -> list[int]:
    """What a prompt at once is answered with."""
    whole = await client.complete(
        prompt if isinstance(prompt, str) else None,
        token_ids=None if isinstance(prompt, str) else prompt,
        max_tokens=num_tokens,
        temperature=0.0,
        ignore_eos=True,
    )
    return list(whole.token_ids)


# Wrong operation for the state or the mode of the stream.


@pytest.mark.parametrize("mode", [APPEND, UPDATE], ids=["append", "update"])
@pytest.mark.parametrize("operation", ["append", "update", "commit"])
async def test_operation_after_commit(
    client: Client, form: type[Form], mode: pb.StreamMode, operation: str
) -> None:
    """After the commit every further operation is refused, and the answer comes as if it had never
    been sent."""
    async with form(client.stub, mode) as stream:
        await (stream.append if mode == APPEND else stream.update)(text(PROMPT))
        await stream.commit(greedy(LONG_ANSWER_TOKENS))
        late: dict[str, Callable[[], Awaitable[object]]] = {
            "append": lambda: stream.append(text("Too late.")),
            "update": lambda: stream.update(text("Too late.")),
            "commit": lambda: commit_again(client, stream),
        }
        # On a machine with much else to do the answer may be complete before the operation comes.
        with pytest.raises(FailedPreconditionError, match=r"already committed|has ended: DONE"):
            await late[operation]()
        answer = await stream.answer()
    assert answer == await one_shot(client, PROMPT, LONG_ANSWER_TOKENS)


async def commit_again(client: Client, stream: Form) -> None:
    """A second commit under a new number, in a call of its own where the form has one."""
    if isinstance(stream, Bidi):
        await stream.commit(greedy(3))
        return
    call = client.stub.CommitStream(
        pb.CommitStreamRequest(stream_id=stream.stream_id, commit=pb.Commit(sampling=greedy(3)))
    )
    await reply_of(call.read())


async def test_second_commit_of_the_client_library(client: Client) -> None:
    """A stream of the Python client that is committed twice refuses the second and goes on with
    the first."""
    async with client.stream() as stream:
        await stream.append(PROMPT)
        first = stream.commit(max_tokens=LONG_ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
        token_ids = [(await anext(first)).token_id for _ in range(3)]
        await asyncio.sleep(0.05)  # tokens of the first answer wait to be read
        with pytest.raises(FailedPreconditionError, match=r"already committed|is complete"):
            await anext(stream.commit(max_tokens=2))
        token_ids += [token.token_id async for token in first]
    assert token_ids == await one_shot(client, PROMPT, LONG_ANSWER_TOKENS)


@pytest.mark.parametrize("mode", [APPEND, UPDATE], ids=["append", "update"])
async def test_operation_of_the_other_mode(
    client: Client, form: type[Form], mode: pb.StreamMode
) -> None:
    """An update on an append stream and the reverse are refused; the stream goes on."""
    async with form(client.stub, mode) as stream:
        right, wrong = stream.append, stream.update
        if mode == UPDATE:
            right, wrong = wrong, right
        await right(text(PROMPT))
        with pytest.raises(FailedPreconditionError, match="mode"):
            await wrong(text("Something else."))
        await stream.commit(greedy(NUM_TOKENS))
        answer = await stream.answer()
    assert answer == await one_shot(client, PROMPT, NUM_TOKENS)


@pytest.mark.parametrize("operation", ["append", "update", "commit", "cancel", "get"])
async def test_unknown_stream(client: Client, operation: str) -> None:
    """A stream id that the router never gave away is not found, and the message names it."""
    gone, stub = 4_711, client.stub
    requests: dict[str, Callable[[], Awaitable[object]]] = {
        "append": lambda: stub.AppendSegment(
            pb.AppendSegmentRequest(stream_id=gone, segment=text("x"))
        ),
        "update": lambda: stub.UpdateContext(
            pb.UpdateContextRequest(stream_id=gone, segment=text("x"))
        ),
        "commit": lambda: stub.CommitStream(pb.CommitStreamRequest(stream_id=gone)).read(),
        "cancel": lambda: stub.CancelStream(pb.CancelStreamRequest(stream_id=gone)),
        "get": lambda: stub.GetStream(pb.GetStreamRequest(stream_id=gone)),
    }
    with pytest.raises(StreamNotFoundError, match=str(gone)):
        await reply_of(requests[operation]())


async def test_foreign_and_repeated_numbers(client: Client, form: type[Form]) -> None:
    """An operation under a number that was used, or that leaves a gap, is acknowledged and
    ignored."""
    async with form(client.stub) as stream:
        await stream.append(text(PROMPT))
        second = await stream.append(text("The end."))
        await stream.all_computed()
        for seq in (1, 2, 4, 2**63):
            acknowledged = await stream.append(text("Ignore me."), seq)
            assert acknowledged.seq == 2, seq
            assert acknowledged.num_received_tokens == second.num_received_tokens, seq
        await stream.commit(greedy(NUM_TOKENS))
        answer = await stream.answer()
    assert answer == await one_shot(client, PROMPT + "The end.", NUM_TOKENS)


# Prompts that are too long.


async def test_longer_than_the_context(client: Client, form: type[Form]) -> None:
    """The append that crosses the context is refused with both numbers; what was sent stays."""
    context_tokens = (await client.server_info()).context_tokens
    fits = [token % 800 + 10 for token in range(context_tokens - 200)]
    async with form(client.stub) as stream:
        await stream.append(ids(fits))
        with pytest.raises(InvalidArgumentError) as refusal:
            await stream.append(ids([7] * 300))
        names_both(refusal.value, context_tokens + 100, context_tokens)
        await stream.commit(greedy(NUM_TOKENS))
        answer = await stream.answer()
    assert answer == await one_shot(client, fits, NUM_TOKENS)


@pytest.mark.parametrize("at", ["append", "update", "commit"])
async def test_longer_than_the_pool(
    client: Client, small: RunningCluster, form: type[Form], at: str
) -> None:
    """As for the context, for a KV pool that is smaller; also where an update or the commit's final
    segment crosses it."""
    fits, too_many = [token + 10 for token in range(400)], [7] * 300
    async with Client(small.address) as small_client:
        pool_tokens = (await small_client.wait_ready()).pool_tokens
        assert POOL_TOKENS * 0.9 < pool_tokens <= POOL_TOKENS
        async with form(small_client.stub, UPDATE if at == "update" else APPEND) as stream:
            await (stream.update if at == "update" else stream.append)(ids(fits))
            crossing: dict[str, Callable[[], Awaitable[object]]] = {
                "append": lambda: stream.append(ids(too_many)),
                "update": lambda: stream.update(ids(fits + too_many)),
                "commit": lambda: stream.commit(greedy(NUM_TOKENS), ids(too_many)),
            }
            with pytest.raises(InvalidArgumentError) as refusal:
                await crossing[at]()
            names_both(refusal.value, 700, pool_tokens)
            await stream.commit(greedy(NUM_TOKENS))
            answer = await stream.answer()
    assert answer == await one_shot(client, fits, NUM_TOKENS)


async def test_one_shot_longer_than_the_pool(small: RunningCluster) -> None:
    """``Generate`` says the same."""
    async with Client(small.address) as client:
        pool_tokens = (await client.wait_ready()).pool_tokens
        with pytest.raises(InvalidArgumentError) as refusal:
            await client.complete(token_ids=[7] * 700)
        names_both(refusal.value, 700, pool_tokens)


async def test_prompt_that_just_fits_the_pool(client: Client, small: RunningCluster) -> None:
    """The longest prompt that is taken is also answered; one token more is refused."""
    async with Client(small.address) as small_client:
        pool_tokens = (await small_client.wait_ready()).pool_tokens
        longest = [token % 900 + 10 for token in range(pool_tokens - 1)]
        answer = await small_client.complete(token_ids=longest, max_tokens=5, temperature=0.0)
        with pytest.raises(InvalidArgumentError):
            await small_client.complete(token_ids=[*longest, 7], max_tokens=1)
    assert list(answer.token_ids) == await one_shot(client, longest, 1)
    assert answer.finish_reason == "length"


async def test_prompt_that_just_fits_the_context(client: Client) -> None:
    """The same for the context."""
    context_tokens = (await client.server_info()).context_tokens
    longest = [token % 900 + 10 for token in range(context_tokens - 1)]
    answer = await client.complete(token_ids=longest, max_tokens=5, temperature=0.0)
    assert (len(answer.tokens), answer.finish_reason) == (1, "length")
    with pytest.raises(InvalidArgumentError):
        await client.complete(token_ids=[*longest, 7], max_tokens=1)


def names_both(error: StreamError, num_tokens: int, limit_tokens: int) -> None:
    """The message and the details of a prompt that is too long."""
    assert str(num_tokens) in error.message
    assert str(limit_tokens) in error.message
    assert error.details["num_tokens"] == str(num_tokens)
    assert error.details["limit_tokens"] == str(limit_tokens)


# Values that no stream can have.


async def test_commit_of_an_empty_stream(client: Client, form: type[Form]) -> None:
    """It is refused, and can still be filled and committed."""
    async with form(client.stub) as stream:
        with pytest.raises(InvalidArgumentError, match="0 tokens"):
            await stream.commit(greedy(NUM_TOKENS))
        await stream.append(text(PROMPT))
        await stream.commit(greedy(NUM_TOKENS))
        answer = await stream.answer()
    assert answer == await one_shot(client, PROMPT, NUM_TOKENS)


@pytest.mark.parametrize("bad", [-1, -(2**40), 1024, 2**40])
async def test_token_outside_the_vocabulary(client: Client, form: type[Form], bad: int) -> None:
    """It is refused by its value, as context and as stop token, and the stream goes on."""
    assert (await client.server_info()).vocab_size == 1024
    good = list(range(20, 60))
    async with form(client.stub) as stream:
        await stream.append(ids(good))
        with pytest.raises(InvalidArgumentError, match=rf"is {bad},.* 1024"):
            await stream.append(ids([30, bad]))
        sampling = greedy(NUM_TOKENS)
        sampling.stop_token_ids.append(bad)
        with pytest.raises(InvalidArgumentError, match=rf"is {bad},.* 1024"):
            await stream.commit(sampling)
        await stream.commit(greedy(NUM_TOKENS))
        answer = await stream.answer()
    assert answer == await one_shot(client, good, NUM_TOKENS)


async def test_bytes_that_are_not_utf8(client: Client, form: type[Form]) -> None:
    """The refusal names byte and place, and the stream goes on."""
    async with form(client.stub) as stream:
        await stream.append(text(PROMPT))
        with pytest.raises(InvalidArgumentError, match="0xff at offset 2"):
            await stream.append(pb.Segment(text_utf8=b"ab\xffcd"))
        with pytest.raises(InvalidArgumentError, match="0xc3 at offset 4"):  # half a character
            await stream.append(pb.Segment(text_utf8="abcdé".encode()[:-1]))
        await stream.commit(greedy(NUM_TOKENS))
        answer = await stream.answer()
    assert answer == await one_shot(client, PROMPT, NUM_TOKENS)


async def test_string_field_that_is_not_utf8(client: Client, cluster: RunningCluster) -> None:
    """Bytes that no protobuf library would put into a ``string`` are named too, in both forms."""
    segment = pb.Segment(text="ab?cd")
    append = pb.StreamRequest(seq=1, append=pb.Append(segment=segment))
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stream = channel.stream_stream(f"/{READINESS}/Stream", bytes, bytes)
        call = stream(None)
        await call.write(pb.StreamRequest(open=pb.Open()).SerializeToString())
        await call.read()
        await call.write(append.SerializeToString().replace(b"?", b"\xff"))
        event = pb.StreamEvent()
        while event.WhichOneof("event") != "error":
            data = await call.read()
            assert isinstance(data, bytes)
            event = pb.StreamEvent.FromString(data)
        assert (event.error.seq, event.error.code) == (1, pb.CODE_INVALID_ARGUMENT)
        assert "0xff at offset 2" in event.error.message
        call.cancel()

        async with Unary(client.stub) as unary:
            request = pb.AppendSegmentRequest(stream_id=unary.stream_id, segment=segment)
            send = channel.unary_unary(f"/{READINESS}/AppendSegment", bytes, bytes)
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await send(request.SerializeToString().replace(b"?", b"\xff"))
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "0xff at offset 2" in (refusal.value.details() or "")


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("temperature", -0.5, "temperature is -0.5"),
        ("temperature", float("nan"), "temperature is nan"),
        ("top_p", 1.5, "top_p is 1.5"),
        ("top_k", 0, "top_k is 0"),
        ("max_tokens", 0, "max_tokens is 0"),
    ],
)
async def test_sampling_out_of_range(
    client: Client, form: type[Form], field: str, value: float, named: str
) -> None:
    """A negative temperature and its like are refused by value; the commit can be corrected."""
    async with form(client.stub) as stream:
        await stream.append(text(PROMPT))
        sampling = greedy(NUM_TOKENS)
        setattr(sampling, field, value)
        with pytest.raises(InvalidArgumentError, match=named):
            await stream.commit(sampling)
        await stream.commit(greedy(NUM_TOKENS))
        answer = await stream.answer()
    assert answer == await one_shot(client, PROMPT, NUM_TOKENS)


async def test_bad_values_of_a_one_shot(client: Client) -> None:
    """``Generate`` refuses them as a stream does."""
    with pytest.raises(InvalidArgumentError, match="temperature is -1"):
        await client.complete("x", temperature=-1.0)
    with pytest.raises(InvalidArgumentError, match="1024"):
        await client.complete(token_ids=[1024])
    with pytest.raises(InvalidArgumentError, match="0xff at offset 1"):
        await client.complete(b"x\xff")
    with pytest.raises(InvalidArgumentError, match="0 tokens"):
        await client.complete("")


# Servers that are not there.


async def test_no_decode_server(client: Client, small: RunningCluster) -> None:
    """The prefill server answers by itself, the answer says so, and so does the status."""
    async with Client(small.address) as small_client:
        await whole(small_client)
        kill(small, "decode-0")
        await until("no decode server", lambda: decode_is(small_client, False), NOTICED_S)
        async with small_client.stream() as stream:
            await stream.append(PROMPT)
            answer = stream.commit(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
            token_ids = [token.token_id async for token in answer]
        metadata = stream.result.metadata
        status = run_cli("status", "--address", small.address)
        assert (await small_client.server_info()).decode_available is False, "it was back too soon"
        assert metadata.decoded_by_prefill
        assert (metadata.decode_server, metadata.prefill_server) == ("", "prefill-0")
        assert status.returncode == 0
        assert "no decode server is alive" in status.stdout
        assert token_ids == await one_shot(client, PROMPT, NUM_TOKENS)
        await until("the decode server's return", lambda: decode_is(small_client, True), RESTART_S)
        after = await small_client.complete(PROMPT, max_tokens=NUM_TOKENS, temperature=0.0)
    assert after.metadata.decode_server == "decode-0"


async def test_no_prefill_server(client: Client, small: RunningCluster) -> None:
    """Requests get UNAVAILABLE within a second and readiness is NOT_SERVING, until one is back;
    a stream that was open then goes on."""
    async with Client(small.address) as small_client, small_client.stream() as stream:
        await whole(small_client)
        await stream.append(PROMPT)
        kill(small, "prefill-0")
        await until("not ready", lambda: is_ready(small_client, False), NOTICED_S)
        assert await health(small, READINESS) == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await health(small, "") == health_pb2.HealthCheckResponse.SERVING
        delays_s = []
        for ask in (open_bidi, open_unary, generate):
            started_s = time.monotonic()
            with pytest.raises(UnavailableError, match="no prefill server is alive"):
                await ask(small_client)
            delays_s.append(time.monotonic() - started_s)
        assert min(delays_s) < 1.0, delays_s
        with pytest.raises(UnavailableError, match="commit again"):
            await anext(stream.commit(max_tokens=2))
        status = run_cli("status", "--address", small.address)
        assert not (await small_client.server_info()).ready, "it was back too soon"
        assert status.returncode == 1
        assert "NOT READY: no prefill server" in status.stdout
        await until("the prefill server's return", lambda: is_ready(small_client, True), RESTART_S)
        assert await health(small, READINESS) == health_pb2.HealthCheckResponse.SERVING
        answer = stream.commit(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        token_ids = [token.token_id async for token in answer]
    assert token_ids == await one_shot(client, PROMPT, NUM_TOKENS)


async def open_bidi(client: Client) -> None:
    """Opens a stream with a call."""
    async with Bidi(client.stub):
        pass


async def open_unary(client: Client) -> None:
    """Opens a stream without one."""
    async with Unary(client.stub):
        pass


async def generate(client: Client) -> None:
    """One shot."""
    await client.complete("x", max_tokens=1)


async def whole(client: Client) -> None:
    """Wait until every server is there; an earlier test may have killed one."""
    await until("a prefill server", lambda: is_ready(client, True), RESTART_S)
    await until("a decode server", lambda: decode_is(client, True), RESTART_S)


async def is_ready(client: Client, wanted: bool) -> bool:
    """Whether the cluster is, or is not, ready."""
    return (await client.server_info()).ready is wanted


async def decode_is(client: Client, wanted: bool) -> bool:
    """Whether a decode server is, or is not, alive."""
    return (await client.server_info()).decode_available is wanted


async def health(cluster: RunningCluster, service: str) -> int:
    """The answer of the health service."""
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10.0)
        return int(reply.status)


def test_error_codes_of_this_table() -> None:
    """The classes above stand for the codes that the table names."""
    assert FailedPreconditionError.code is ErrorCode.FAILED_PRECONDITION
    assert StreamNotFoundError.code is ErrorCode.NOT_FOUND
    assert InvalidArgumentError.code is ErrorCode.INVALID_ARGUMENT
    assert UnavailableError.code is ErrorCode.UNAVAILABLE
