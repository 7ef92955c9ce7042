"""The router of a real cluster is killed under load: its clients go on with their streams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfill.api import Client
from tests.support.cluster import RunningCluster, start_cluster
from tests.support.processes import kill, pid_of
from tests.support.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.clusters, pytest.mark.slow]

NUM_STREAMS = 6
NUM_TOKENS = 200
NUM_KILLS = 2
BACK_S = 5.0
"""From the kill to a router that is ready and knows a server, on a machine with other work."""
PATIENCE_S = 120.0
PROMPT = [token % 900 + 20 for token in range(4_000)]


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[RunningCluster]:
    """A cluster whose router keeps a log."""
    folder = tmp_path_factory.mktemp("logged")
    running = start_cluster(folder, tiny_model, "logged", settings=["router.log=sqlite"])
    yield running
    running.stop()


def prompt_of(number: int) -> list[int]:
    return PROMPT[200 * number : 200 * number + 1_000]


async def stream_it(client: Client, number: int, pause_s: float) -> tuple[tuple[int, ...], int]:
    """Tokens of an answer whose prompt came in pieces, and how often its call was made anew."""
    prompt = prompt_of(number)
    async with client.stream() as stream:
        for begin in range(0, len(prompt), 50):
            await stream.append(token_ids=prompt[begin : begin + 50])
            await asyncio.sleep(pause_s)
        answer = stream.commit(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        tokens = [token async for token in answer]
        assert [token.index for token in tokens] == list(range(NUM_TOKENS))
        return tuple(token.token_id for token in tokens), stream.num_resumptions


async def kill_router(logged: RunningCluster) -> float:
    """Seconds until the service is back."""
    old_pid = pid_of(logged, "router")
    kill(logged, "router")
    began_s = time.monotonic()
    async with Client(logged.address) as client:
        await client.wait_ready(PATIENCE_S)
        while not (await client.server_info()).decode_available:
            assert time.monotonic() < began_s + PATIENCE_S
            await asyncio.sleep(0.05)
    back_s = time.monotonic() - began_s
    assert pid_of(logged, "router") != old_pid
    return back_s


async def test_a_drain_outlives_the_router(logged: RunningCluster) -> None:
    """The server registers again and takes nothing new, until the drain is taken back."""
    async with Client(logged.address) as client:

        async def state() -> str:
            servers = (await client.server_info()).servers
            return next((each.state for each in servers if each.server_id == "decode-0"), "")

        async def handed_to() -> str:
            result = await client.complete(token_ids=prompt_of(0), max_tokens=2, temperature=0.0)
            return result.metadata.decode_server

        await client.drain_server("decode-0")
        kill(logged, "router")
        await client.wait_ready(PATIENCE_S)
        await until("decode-0 is back", state, PATIENCE_S)
        assert (await state(), await handed_to()) == ("draining", "")
        await client.resume_server("decode-0")
        assert (await state(), await handed_to()) == ("alive", "decode-0")


async def test_the_router_is_killed_under_load(logged: RunningCluster) -> None:
    """While contexts come and answers stream, twice: each answer is that of one shot, each token
    comes once, and the service is back within seconds."""
    async with Client(logged.address) as client:
        expected = []
        for number in range(NUM_STREAMS):
            result = await client.complete(
                token_ids=prompt_of(number),
                max_tokens=NUM_TOKENS,
                temperature=0.0,
                ignore_eos=True,
            )
            expected.append(result.token_ids)
        runs = [
            asyncio.create_task(stream_it(client, number, 0.02 + 0.03 * number))
            for number in range(NUM_STREAMS)
        ]
        back_s = []
        for _ in range(NUM_KILLS):
            await asyncio.sleep(0.7)
            back_s.append(await kill_router(logged))
        done = await asyncio.wait_for(asyncio.gather(*runs), PATIENCE_S)
    assert [tokens for tokens, _ in done] == expected
    assert sum(resumptions for _, resumptions in done) >= NUM_STREAMS
    assert max(back_s) < BACK_S, back_s
