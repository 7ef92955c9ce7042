"""The whole router: the Python client, gRPC, the real core, and fake servers behind it.

The table of bad input is walked through as a user meets it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from router.service_server import GrpcServer
from streamfill.api import Client, Stream
from streamfill.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
)
from streamfill.observability.lifetime import ttft_from_commit_s
from tests.unit.router.cluster_for_tests import TestCluster, until
from tests.unit.router.fake_server import FakeServer, expected_answer

WHOLE = "The quick brown fox jumps over the lazy dog."
PIECES = ("The quick bro", "wn fox jum", "ps over", " the lazy dog.")


@asynccontextmanager
async def client_of(cluster: TestCluster) -> AsyncIterator[Client]:
    server = GrpcServer(cluster.manager, "127.0.0.1", 0)
    port = await server.start()
    try:
        async with Client(f"127.0.0.1:{port}") as client:
            yield client
    finally:
        await server.stop(0.0)


@pytest.fixture
async def cluster(tiny_model: Path) -> AsyncIterator[TestCluster]:
    async with TestCluster(tiny_model) as started:
        yield started


@pytest.fixture
async def client(cluster: TestCluster) -> AsyncIterator[Client]:
    async with client_of(cluster) as client:
        yield client


@pytest.fixture
async def servers(cluster: TestCluster) -> tuple[FakeServer, FakeServer]:
    return await cluster.prefill(), await cluster.decode()


def answer_to(cluster: TestCluster, text: str, num_tokens: int) -> tuple[int, ...]:
    return tuple(expected_answer(cluster.encode(text), num_tokens, cluster.vocab_size))


@pytest.mark.usefixtures("servers")
async def test_streamed_and_one_shot_answers_are_the_same(
    cluster: TestCluster, client: Client
) -> None:
    """Append, update and one shot end in the same ids; metadata and timing come along."""
    async with client.stream() as stream:
        for piece in PIECES[:-1]:
            await stream.append(piece)
        await stream.wait_computed(10.0)
        appended = await stream.commit(PIECES[-1], max_tokens=8).read()
    async with client.stream(mode="update") as stream:
        await stream.update("The slow brown fox")
        await stream.update(WHOLE)
        updated = await stream.commit(max_tokens=8).read()
    at_once = await client.complete(WHOLE, max_tokens=8)
    for result in (appended, updated, at_once):
        assert result.token_ids == answer_to(cluster, WHOLE, 8)
        assert result.finish_reason == "length"
        assert result.text == at_once.text
        assert result.usage.num_prompt_tokens == len(cluster.encode(WHOLE))
        assert (result.metadata.prefill_server, result.metadata.decode_server) == (
            *("prefill-0", "decode-0"),
        )
        assert not result.metadata.decoded_by_prefill
        assert (ttft_from_commit_s(result.timing.lifetime) or 0.0) > 0
    cluster.assert_no_load()


async def refused(stream: Stream, cluster: TestCluster, text: str) -> None:
    """After a refusal the stream takes what is left and is answered as if nothing had been."""
    await stream.append(text)
    result = await stream.commit(max_tokens=4).read()
    assert result.token_ids == answer_to(cluster, WHOLE, 4)


@pytest.mark.usefixtures("servers")
async def test_refusals_leave_an_open_stream_unharmed(cluster: TestCluster, client: Client) -> None:
    """Update on an append stream, an empty commit, bad ids, bad text, bad sampling."""
    async with client.stream() as stream:
        with pytest.raises(InvalidArgumentError, match="empty"):
            await stream.commit().read()
        await stream.append(PIECES[0] + PIECES[1])
        with pytest.raises(FailedPreconditionError, match="append mode"):
            await stream.update("x")
        with pytest.raises(InvalidArgumentError, match=r"token_ids\[1\] is 99999999"):
            await stream.append(token_ids=[1, 99999999])
        with pytest.raises(InvalidArgumentError, match="byte 0xfe at offset 2"):
            await stream.append(b"ab\xfe")
        with pytest.raises(InvalidArgumentError, match=r"temperature is -0\.1"):
            await stream.commit(temperature=-0.1).read()
        await refused(stream, cluster, PIECES[2] + PIECES[3])


@pytest.mark.usefixtures("servers")
async def test_append_on_an_update_stream_is_refused(client: Client) -> None:
    """The reverse of the above."""
    async with client.stream(mode="update") as stream:
        await stream.update("x")
        with pytest.raises(FailedPreconditionError, match="update mode"):
            await stream.append("y")
        assert len((await stream.commit(max_tokens=2).read()).tokens) == 2


async def test_a_prompt_longer_than_the_pool_is_refused_where_it_crosses(
    cluster: TestCluster, client: Client
) -> None:
    """Both numbers are named, and what was sent before stays usable."""
    await cluster.prefill(pool_tokens=64)
    async with client.stream() as stream:
        await stream.append(PIECES[0] + PIECES[1])
        with pytest.raises(InvalidArgumentError, match="64") as caught:
            await stream.append(token_ids=[20] * 80)
        assert str(80 + stream.progress.num_received_tokens) in caught.value.message
        await refused(stream, cluster, PIECES[2] + PIECES[3])


async def test_after_the_commit_nothing_more_is_taken(
    cluster: TestCluster, client: Client, servers: tuple[FakeServer, FakeServer]
) -> None:
    """Append and commit again get FAILED_PRECONDITION, and the answer is whole."""
    for server in servers:
        server.output_limit = 1
    async with client.stream() as stream:
        answer = stream.commit(WHOLE, max_tokens=6)
        first = await anext(answer)
        with pytest.raises(FailedPreconditionError, match="committed"):
            await stream.append("x")
        for server in servers:
            server.output_limit = 100
        assert (first.token_id, *[token.token_id async for token in answer]) == answer_to(
            cluster, WHOLE, 6
        )


async def test_without_a_prefill_server_a_stream_is_unavailable(client: Client) -> None:
    """And readiness says so."""
    assert not (await client.server_info()).ready
    with pytest.raises(UnavailableError, match="no prefill server is alive"):
        async with client.stream():
            pass


async def test_without_a_decode_server_the_prefill_server_answers_and_says_so(
    cluster: TestCluster, client: Client
) -> None:
    """In the metadata of the answer, and in the cluster's description."""
    await cluster.prefill()
    result = await client.complete(WHOLE, max_tokens=5)
    assert result.token_ids == answer_to(cluster, WHOLE, 5)
    assert result.metadata.decoded_by_prefill
    assert result.metadata.decode_server == ""
    info = await client.server_info()
    assert (info.ready, info.decode_available) == (True, False)


@pytest.mark.parametrize("when", ["open", "before the first token", "decoding"])
async def test_a_client_that_goes_away_frees_both_servers(
    cluster: TestCluster,
    client: Client,
    servers: tuple[FakeServer, FakeServer],
    when: str,
) -> None:
    """At any moment; nothing of the stream is left anywhere."""
    limit = {"open": 100, "before the first token": 0, "decoding": 3}[when]
    for server in servers:
        server.output_limit = limit
    async with client.stream() as stream:
        await stream.append(WHOLE)
        await until(lambda: servers[0].streams)
        answer = stream.commit(max_tokens=50)
        if when == "before the first token":
            waiter = asyncio.create_task(answer.read())
            await until(lambda: any(known.committed for known in servers[0].streams.values()))
            waiter.cancel()
        elif when == "decoding":
            await anext(answer)
            await until(lambda: servers[1].streams)
    await until(lambda: not servers[0].streams and not servers[1].streams)
    assert cluster.outcomes() == {"ABORTED": 1}
    cluster.assert_no_load()


async def test_a_deadline_ends_the_call(
    cluster: TestCluster, client: Client, servers: tuple[FakeServer, FakeServer]
) -> None:
    """With DEADLINE_EXCEEDED, on every server, however long the answer would take."""
    servers[0].output_limit = 0
    async with client.stream(deadline_s=0.2) as stream:
        with pytest.raises(DeadlineExceededError):
            await stream.commit(WHOLE, max_tokens=2).read()
    await until(lambda: not servers[0].streams)
    assert cluster.outcomes() == {"DEADLINE": 1}


@pytest.mark.usefixtures("servers")
async def test_caches_are_flushed_when_no_stream_is_open(client: Client) -> None:
    """Per server, whether it did."""
    assert await client.flush_caches(5.0) == {"prefill-0": True, "decode-0": True}


async def test_draining_takes_nothing_new(cluster: TestCluster, client: Client) -> None:
    """What is open when the time is over ends with UNAVAILABLE."""
    await cluster.prefill()
    async with client.stream() as stream:
        await stream.append("x")
        await cluster.manager.drain(0.0)
        with pytest.raises(UnavailableError, match="shutting down"):
            await stream.commit().read()
        with pytest.raises(UnavailableError, match="shutting down"):
            await client.complete("x")
