"""A document that two agents read is computed once, where the policy knows what is cached."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path

import pytest

from streamfill.api import Client
from streamfill.api.types import Result
from tests.support.cluster import RunningCluster, start_cluster
from tests.support.counters import empty_caches, wait_until_at_rest
from tests.support.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.clusters, pytest.mark.slow]

_PIECES = [f"Chapter {number} of the report that all agents read. " * 8 for number in range(5)]
_WAIT_S = 60.0
_SEAM_TOKENS = 12
"""Computed by each reader for itself: less than a page, tokens that change at a seam, its own
question and the last token of the prompt."""


def _start(folder: Path, model: Path, placement: str) -> RunningCluster:
    settings = [
        "prefill.count=2",
        "decode.count=0",
        "prefill.threads=1",
        "prefill.pool_tokens=8000",
        "prefill.host_pool_tokens=0",
        f"router.placement={placement}",
    ]
    return start_cluster(folder, model, placement, settings=settings)


@pytest.fixture(params=["cache-aware", "round-robin"])
def two_servers(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path
) -> Iterator[RunningCluster]:
    """Two prefill servers under a placement policy."""
    running = _start(tmp_path, tiny_model, request.param)
    yield running
    running.stop()


async def _read_twice(client: Client, question: str) -> tuple[Result, Result]:
    """By two readers, of whom the first is always ahead by a piece that is computed."""
    async with client.stream() as first:
        await first.append(_PIECES[0])
        async with client.stream() as second:
            for computed, following in pairwise(_PIECES):
                await first.wait_computed(_WAIT_S)
                await second.append(computed)
                await first.append(following)
            answered = await first.commit(question, max_tokens=4, temperature=0.0).read()
            await second.append(_PIECES[-1])
            return answered, await second.commit(question, max_tokens=4, temperature=0.0).read()


async def test_two_readers_of_one_document(two_servers: RunningCluster) -> None:
    """Cache-aware placement brings them together, and the second one computes next to nothing;
    round-robin computes the document on both servers. Both give the same answers."""
    shares = two_servers.name == "cache-aware"
    async with Client(two_servers.address) as client:
        await empty_caches(client)
        first, second = await _read_twice(client, "Who wrote it?")
        assert first.text == second.text
        num_prompt_tokens = first.usage.num_prompt_tokens
        assert num_prompt_tokens > 300
        assert first.usage.num_computed_tokens >= num_prompt_tokens
        assert first.usage.num_reused_tokens == 0
        together = first.metadata.prefill_server == second.metadata.prefill_server
        assert together == shares
        computed, reused = second.usage.num_computed_tokens, second.usage.num_reused_tokens
        if shares:
            assert computed <= _SEAM_TOKENS * len(_PIECES)
            assert reused >= num_prompt_tokens - _SEAM_TOKENS * len(_PIECES)
        else:
            assert computed >= num_prompt_tokens
            assert reused == 0
        await wait_until_at_rest(client)
        info = await client.server_info()
        assert info.placement == two_servers.name
        total = sum(server.counters["num_computed_tokens"] for server in info.servers)
        assert (total < 1.5 * num_prompt_tokens) == shares
        if shares:
            await _check_that_reports_count(client, first.metadata.prefill_server)


async def _check_that_reports_count(client: Client, home: str) -> None:
    """A whole prompt goes where the servers say that its beginning is, although the other one is
    idle, until they say that it is gone."""
    cached = await _complete_while_busy(client, home)
    assert cached.metadata.prefill_server == home
    assert cached.usage.num_reused_tokens > 0.9 * cached.usage.num_prompt_tokens

    async def goes_elsewhere() -> Result | None:
        await empty_caches(client)
        await asyncio.sleep(1.5)  # an idle server reports within a second, on a quiet machine
        fresh = await _complete_while_busy(client, home)
        return fresh if fresh.metadata.prefill_server != home else None

    fresh = await until("it goes to the idle server", goes_elsewhere, _WAIT_S)
    assert fresh is not None
    assert fresh.usage.num_reused_tokens == 0


async def _complete_while_busy(client: Client, home: str) -> Result:
    """The document in one piece, while one stream is on ``home`` and none on the other server."""
    async with AsyncExitStack() as streams:
        busy = await streams.enter_async_context(client.stream())
        await busy.append("Something else, with a beginning of its own. " * 8)
        if await _num_streams(client, home) == 0:
            # Load alone decides about these, so the next one is where the first one is not.
            first, busy = busy, await streams.enter_async_context(client.stream())
            await busy.append("Then a text unlike all others. " * 8)
            await first.cancel()
        assert await _num_streams(client, home) == 1
        result = await client.complete("".join(_PIECES), max_tokens=1, temperature=0.0)
        await busy.cancel()
    await wait_until_at_rest(client)
    return result


async def _num_streams(client: Client, server_id: str) -> int:
    info = await client.server_info()
    return next(s.num_assigned_streams for s in info.servers if s.server_id == server_id)
