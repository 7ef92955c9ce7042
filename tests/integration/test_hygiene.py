"""However streams end, nothing of them is left."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import pytest

from streamfill.api import Client
from tests.support.cluster import RunningCluster
from tests.support.counters import wait_until_at_rest
from tests.support.fates import Fate, act, drop_while_opening, kill_client

pytestmark = pytest.mark.integration

_NUM_AT_ONCE = 16
_REST_WITHIN_S = 5.0
_FATES = {
    Fate.FINISHED: 46,
    Fate.FINISHED_AT_ONCE: 16,
    Fate.CANCELLED_OPEN: 16,
    Fate.CANCELLED_COMMITTED: 18,
    Fate.CANCELLED_ANSWERING: 18,
    Fate.LEFT_OPEN: 12,
    Fate.LEFT_COMMITTED: 14,
    Fate.LEFT_ANSWERING: 14,
    Fate.LEFT_AT_ANY_MOMENT: 24,
    Fate.ONE_SHOT_LEFT: 10,
}
_NUM_KILLED_CLIENTS, _STREAMS_OF_EACH = 4, 3
_NUM_STREAMS = sum(_FATES.values()) + _NUM_KILLED_CLIENTS * _STREAMS_OF_EACH


async def _assert_at_work(client: Client) -> None:
    result = await client.complete("Is anybody there?", max_tokens=4, temperature=0.0)
    assert len(result.token_ids) == 4
    assert result.metadata.handoff == "done"


async def _outcomes(client: Client) -> Counter[str]:
    return Counter((await client.server_info()).num_streams_by_outcome)


@pytest.mark.parametrize("seed", [1])
async def test_nothing_is_left_of_200_streams(cluster: RunningCluster, seed: int) -> None:
    """Finished, cancelled and disconnected streams in any mixture leave all counters at their base
    within five seconds, and each is counted with exactly one outcome."""
    assert _NUM_STREAMS == 200
    random = Random(seed)
    gate = asyncio.Semaphore(_NUM_AT_ONCE)

    async with Client(cluster.address) as client:
        await wait_until_at_rest(client, _REST_WITHIN_S)
        before = await _outcomes(client)

        async def one(fate: Fate | None, its_random: Random) -> None:
            async with gate:
                if fate is None:
                    await kill_client(cluster.address, _STREAMS_OF_EACH, its_random)
                else:
                    await act(cluster.address, client, fate, its_random)

        fates: list[Fate | None] = [fate for fate, count in _FATES.items() for _ in range(count)]
        fates += [None] * _NUM_KILLED_CLIENTS
        random.shuffle(fates)
        await asyncio.gather(*(one(fate, Random(random.random())) for fate in fates))

        await wait_until_at_rest(client, _REST_WITHIN_S)
        ended = await _outcomes(client) - before
        await _assert_at_work(client)
    assert ended.total() == _NUM_STREAMS, ended
    assert set(ended) == {"DONE", "ABORTED"}, ended
    assert ended["DONE"] >= _FATES[Fate.FINISHED] + _FATES[Fate.FINISHED_AT_ONCE]


async def test_calls_dropped_while_opening(cluster: RunningCluster) -> None:
    """A call that is given up while its stream is being opened leaves nothing either."""
    random = Random(3)
    async with Client(cluster.address) as client:
        await asyncio.gather(*(drop_while_opening(cluster.address, random) for _ in range(24)))
        await wait_until_at_rest(client, _REST_WITHIN_S)
        await _assert_at_work(client)
