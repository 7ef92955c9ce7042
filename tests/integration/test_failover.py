"""Each process of a cluster is killed while it is needed: streams end with the right answer, each
token comes once, and the process comes back.

The tests are in an order in which a process that one of them killed starts again while others run
that do not need it.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from streamfill.api import Answer, Client, Result, Server, Stream, Token
from streamfill.errors import UnavailableError
from tests.support.cluster import RunningCluster, start_cluster
from tests.support.counters import FRESH_S, wait_until_at_rest
from tests.support.processes import kill, pid_of
from tests.support.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.clusters, pytest.mark.slow]

NUM_EACH = 2
"""Prefill servers and decode servers."""
BACK_S = 120.0
"""A server is back after ten seconds on two quiet cores; three at once after half a minute."""
NOTICED_S = 30.0
NUM_TOKENS = 500
"""An answer of more than a second, with time for a kill in its middle."""
LONG_PROMPT = [token % 900 + 20 for token in range(7_000)]
"""Takes half a second to compute."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningCluster]:
    """Two prefill and two decode servers, whose processes may be killed many times."""
    running = start_cluster(
        tmp_path_factory.mktemp("pairs"),
        tiny_model,
        "pairs",
        settings=[
            f"prefill.count={NUM_EACH}",
            f"decode.count={NUM_EACH}",
            "launcher.max_restarts=20",
            "prefill.threads=1",
            "decode.threads=1",
        ],
    )
    yield running
    running.stop()


@pytest.fixture
async def client(pairs: RunningCluster) -> AsyncIterator[Client]:
    """A client of the cluster, which may lack what earlier tests killed."""
    async with Client(pairs.address) as client:
        yield client


async def alive(client: Client, *, prefill: int, decode: int) -> None:
    """Wait until so many servers are alive."""

    async def are_alive() -> bool:
        try:
            servers = (await client.server_info()).servers
        except UnavailableError:
            return False
        roles = [server.role for server in servers if server.state == "alive"]
        return roles.count("prefill") >= prefill and roles.count("decode") >= decode

    await until(f"{prefill} prefill and {decode} decode servers", are_alive, BACK_S)


async def is_controlled(client: Client) -> bool:
    """Whether every living prefill server hears the controller."""
    servers = (await client.server_info()).servers
    prefill = [x for x in servers if x.role == "prefill" and x.state == "alive"]
    return all(server.controller_alive for server in prefill)


async def state_of(client: Client, server_id: str) -> str:
    """A server, as the router sees it."""
    return (await server_of(client, server_id)).state


async def server_of(client: Client, server_id: str) -> Server:
    """A server, as the router sees it."""
    servers = (await client.server_info()).servers
    return next(server for server in servers if server.server_id == server_id)


async def has_stream(client: Client, role: str) -> str:
    """The one server of this role that has a stream."""

    async def ids() -> list[str]:
        servers = (await client.server_info()).servers
        return [x.server_id for x in servers if x.role == role and x.num_assigned_streams]

    (server_id,) = await until(f"a {role} server has the stream", ids, NOTICED_S)
    return server_id


def commit(stream: Stream, token_ids: list[int] | None = None) -> Answer:
    """The usual commit."""
    return stream.commit(
        token_ids=token_ids, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
    )


async def one_shot(client: Client, prompt: list[int]) -> tuple[int, ...]:
    """What the prompt is answered with when nothing goes wrong."""
    whole = await client.complete(
        token_ids=prompt, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
    )
    return whole.token_ids


async def read_on(answer: Answer, tokens: list[Token], up_to: int) -> None:
    """Read until there are so many tokens."""
    while len(tokens) < up_to:
        tokens.append(await anext(answer))


async def assert_right(client: Client, tokens: list[Token], prompt: list[int]) -> None:
    """Each token came once, in order, and they are those of one shot."""
    assert [token.index for token in tokens] == list(range(NUM_TOKENS))
    assert tuple(token.token_id for token in tokens) == await one_shot(client, prompt)


async def is_new(pairs: RunningCluster, name: str, old_pid: int) -> bool:
    """Whether a process that was killed runs again."""
    record = pairs.process(name)
    return record.state == "ready" and record.pid != old_pid and record.num_restarts > 0


async def test_prefill_server_of_an_open_stream(client: Client, pairs: RunningCluster) -> None:
    """A stream whose prefill server dies goes on with another one."""
    await alive(client, prefill=2, decode=1)
    head, tail = LONG_PROMPT[:2_000], LONG_PROMPT[2_000:2_500]
    async with client.stream() as stream:
        await stream.append(token_ids=head)
        await stream.wait_computed(NOTICED_S)
        name = await has_stream(client, "prefill")
        kill(pairs, name)
        await stream.append(token_ids=tail)
        tokens = [token async for token in commit(stream)]
    result = stream.result
    assert result.metadata.num_attempts > 1
    assert result.metadata.prefill_server != name
    await assert_right(client, tokens, head + tail)


@pytest.mark.parametrize("taken_for", ["suspect", "dead"])
async def test_decode_server_that_stands_still(
    client: Client, pairs: RunningCluster, taken_for: str
) -> None:
    """A decode server that is stopped in mid-answer and goes on later spoils nothing, whether or
    not it was taken for dead meanwhile."""
    await alive(client, prefill=1, decode=2)
    prompt = LONG_PROMPT[600:900]
    async with client.stream() as stream:
        await stream.append(token_ids=prompt)
        answer, tokens = commit(stream), list[Token]()
        await read_on(answer, tokens, 30)
        name = await has_stream(client, "decode")
        pid = pid_of(pairs, name)
        os.kill(pid, signal.SIGSTOP)
        try:

            async def is_seen() -> bool:
                return await state_of(client, name) == taken_for

            await until(f"{name} is {taken_for}", is_seen, NOTICED_S)
        finally:
            os.kill(pid, signal.SIGCONT)
        await read_on(answer, tokens, NUM_TOKENS)
        assert await anext(answer, None) is None
    assert (stream.result.metadata.num_attempts > 1) is (taken_for == "dead")
    await assert_right(client, tokens, prompt)
    await alive(client, prefill=1, decode=2)
    assert pid_of(pairs, name) == pid, "it was not started again"


async def test_prefill_server_after_the_commit(client: Client, pairs: RunningCluster) -> None:
    """The commit is on its way to be computed when the prefill server dies: another one does it."""
    await alive(client, prefill=2, decode=1)
    async with client.stream() as stream:
        await stream.append(token_ids=LONG_PROMPT[:100])
        name = await has_stream(client, "prefill")
        answer = commit(stream, LONG_PROMPT[100:])
        first = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0.1)
        assert not first.done(), "the prompt is too short to be caught"
        kill(pairs, name)
        tokens = [await first, *[token async for token in answer]]
    assert stream.result.metadata.num_attempts > 1
    await assert_right(client, tokens, LONG_PROMPT)


async def test_decode_server_in_mid_answer(client: Client, pairs: RunningCluster) -> None:
    """The answer goes on on another server without a missing or doubled token."""
    await alive(client, prefill=1, decode=2)
    prompt = LONG_PROMPT[:2_000]
    async with client.stream() as stream:
        await stream.append(token_ids=prompt)
        answer, tokens = commit(stream), list[Token]()
        await read_on(answer, tokens, 30)
        name = await has_stream(client, "decode")
        (other,) = {"decode-0", "decode-1"} - {name}
        before = (await server_of(client, other)).counters["num_computed_tokens"]
        kill(pairs, name)
        await read_on(answer, tokens, NUM_TOKENS)
        assert await anext(answer, None) is None
    result: Result = stream.result
    assert result.metadata.num_attempts > 1
    assert result.metadata.decode_server == other
    # Its successor did not compute the prompt: the KV came from the prefill server once more.
    assert result.metadata.handoff == "done"
    await asyncio.sleep(2 * FRESH_S)
    after = (await server_of(client, other)).counters["num_computed_tokens"]
    assert after - before <= NUM_TOKENS < len(prompt)  # the answer so far, and no more
    await assert_right(client, tokens, prompt)


async def test_controller(client: Client, pairs: RunningCluster) -> None:
    """Streams go on without the controller; servers notice that it is gone, and that it is back."""
    await alive(client, prefill=1, decode=1)
    await until("control", lambda: is_controlled(client), BACK_S)
    prompt = LONG_PROMPT[900:1_200]
    async with client.stream() as stream:
        await stream.append(token_ids=prompt)
        answer, tokens = commit(stream), list[Token]()
        await read_on(answer, tokens, 30)
        old_pid = kill(pairs, "controller")
        await read_on(answer, tokens, NUM_TOKENS)
        assert await anext(answer, None) is None
    assert stream.result.metadata.num_attempts == 1
    await assert_right(client, tokens, prompt)
    await until("the controller's return", lambda: is_new(pairs, "controller", old_pid), BACK_S)
    await until("control", lambda: is_controlled(client), BACK_S)


async def test_controller_that_stays_away(client: Client, pairs: RunningCluster) -> None:
    """Without a controller for longer than servers wait for one they say so, and prefill on."""
    await alive(client, prefill=1, decode=1)
    await until("control", lambda: is_controlled(client), BACK_S)
    pid = pid_of(pairs, "controller")
    os.kill(pid, signal.SIGSTOP)
    try:

        async def is_missed() -> bool:
            servers = (await client.server_info()).servers
            return not any(server.controller_alive for server in servers)

        await until("servers miss the controller", is_missed, NOTICED_S)
        tokens = await client.complete(
            token_ids=LONG_PROMPT[:3_000], max_tokens=5, temperature=0.0, ignore_eos=True
        )
        assert len(tokens.token_ids) == 5
    finally:
        os.kill(pid, signal.SIGCONT)
    await until("control", lambda: is_controlled(client), BACK_S)


async def test_prefill_server_during_the_hand_off(client: Client, pairs: RunningCluster) -> None:
    """It dies right after the first token: the decode server has the KV, or does without."""
    await alive(client, prefill=2, decode=1)
    async with client.stream() as stream:
        await stream.append(token_ids=LONG_PROMPT)
        await stream.wait_computed(NOTICED_S)
        name = await has_stream(client, "prefill")
        answer = commit(stream)
        tokens = [await anext(answer)]
        kill(pairs, name)
        await read_on(answer, tokens, NUM_TOKENS)
        assert await anext(answer, None) is None
    await assert_right(client, tokens, LONG_PROMPT)


async def test_every_decode_server_in_mid_answer(client: Client, pairs: RunningCluster) -> None:
    """With no decode server left a prefill server goes on, and the answer says so."""
    await alive(client, prefill=1, decode=2)
    prompt = LONG_PROMPT[300:600]
    async with client.stream() as stream:
        await stream.append(token_ids=prompt)
        answer, tokens = commit(stream), list[Token]()
        await read_on(answer, tokens, 30)
        for number in range(NUM_EACH):
            kill(pairs, f"decode-{number}")
        await read_on(answer, tokens, NUM_TOKENS)
        assert await anext(answer, None) is None
    assert stream.result.metadata.decoded_by_prefill
    await assert_right(client, tokens, prompt)


async def test_router(client: Client, pairs: RunningCluster) -> None:
    """Its streams are lost, which clients are told; it comes back at the same address, servers
    drop what they had and register anew, and new streams work."""
    await alive(client, prefill=NUM_EACH, decode=NUM_EACH)
    prompt = LONG_PROMPT[:500]
    usual = await one_shot(client, prompt)
    address = pairs.address
    pids = {record.name: record.pid for record in pairs.state.processes}
    async with client.stream() as idle, client.stream() as busy:
        await idle.append(token_ids=prompt)
        await busy.append(token_ids=prompt)
        answer, tokens = commit(busy), list[Token]()
        await read_on(answer, tokens, 30)
        old_pid = kill(pairs, "router")
        with pytest.raises(UnavailableError):
            await read_on(answer, tokens, NUM_TOKENS)
        with pytest.raises(UnavailableError):
            await idle.append(token_ids=[20])
    await alive(client, prefill=NUM_EACH, decode=NUM_EACH)
    assert pairs.address == address
    assert await one_shot(client, prompt) == usual
    await wait_until_at_rest(client)
    after = {record.name: record.pid for record in pairs.state.processes}
    assert after.pop("router") != old_pid == pids.pop("router")
    assert after == pids, "only the router was started again"


async def test_all_of_it_came_back(client: Client, pairs: RunningCluster) -> None:
    """What was killed above was started again by the launcher, and holds nothing any more."""
    await alive(client, prefill=NUM_EACH, decode=NUM_EACH)
    await until("control", lambda: is_controlled(client), BACK_S)
    records = pairs.state.processes
    assert all(record.state == "ready" for record in records)
    assert sum(record.num_restarts for record in records) >= 7
    await wait_until_at_rest(client)
