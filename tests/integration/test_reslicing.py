"""Hand-offs between servers of different tensor-parallel sizes, with a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfill.api import Client
from streamfill.api.types import ClusterInfo
from streamfill.stream.tokenizer import load_tokenizer
from tests.support.cluster import RunningCluster, start_cluster
from tests.support.comparing import assert_same, first_difference
from tests.support.counters import empty_caches, wait_until_at_rest
from tests.support.playing import one_shots, play_all
from tests.support.stories import StoryTeller

pytestmark = [pytest.mark.integration, pytest.mark.clusters]

_NUM_STORIES = 10
_MAX_TOKENS = 16


@pytest.fixture(scope="module", params=[(2, 1), (1, 2)], ids=["2 to 1", "1 to 2"])
def uneven_cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[RunningCluster]:
    """The tiny model's two KV heads on one rank of one server, and on two of the other."""
    prefill, decode = request.param
    toml = (
        f"[prefill]\ntp_size = {prefill}\nthreads = 1\npool_tokens = 8000\nhost_pool_tokens = 0\n"
        f"[decode]\ntp_size = {decode}\nthreads = 1\npool_tokens = 8000"
    )
    name = f"uneven{prefill}{decode}"
    running = start_cluster(tmp_path_factory.mktemp(name), tiny_model, name, toml)
    yield running
    running.stop()


async def test_the_decode_server_finds_every_prompt(
    cluster: RunningCluster, uneven_cluster: RunningCluster, tiny_model: Path
) -> None:
    """It computes none of them, and answers as to whole prompts. A server that has all heads in one
    place says the same, up to ties that rounding decides: no head went to the wrong place."""
    tokenizer = load_tokenizer(tiny_model)
    teller = StoryTeller(tokenizer, seed=8)
    stories = [
        teller.story("append", 1 + number % 4, 40 + 20 * number) for number in range(_NUM_STORIES)
    ]
    async with Client(uneven_cluster.address) as client:
        before = await client.server_info()
        streamed = await play_all(
            client, stories, num_at_once=3, max_tokens=_MAX_TOKENS, temperature=0.0
        )
        await wait_until_at_rest(client)
        after = await client.server_info()
        await empty_caches(client)
        whole = await one_shots(client, stories, tokenizer, max_tokens=_MAX_TOKENS, temperature=0.0)
        await wait_until_at_rest(client)
    for number, (ours, theirs) in enumerate(zip(streamed, whole, strict=True)):
        assert ours.metadata.handoff == theirs.metadata.handoff == "done", f"story {number}"
        assert_same(ours, theirs, f"story {number}")
    num_prompt_tokens = sum(result.usage.num_prompt_tokens for result in streamed)
    assert _grown(before, after, "decode", "num_computed_tokens") <= len(stories)
    assert _grown(before, after, "prefill", "num_handoff_bytes") >= num_prompt_tokens
    async with Client(cluster.address) as client:
        in_one_place = await one_shots(
            client, stories, tokenizer, max_tokens=_MAX_TOKENS, temperature=0.0, logprobs=2
        )
    for number, (ours, theirs) in enumerate(zip(streamed, in_one_place, strict=True)):
        difference = first_difference(ours, theirs)
        assert difference is None or difference.is_tie, f"story {number}: {difference}"


def _grown(before: ClusterInfo, after: ClusterInfo, role: str, counter: str) -> int:
    """By how much a counter of the servers of one role grew."""
    old, new = (
        sum(server.counters[counter] for server in info.servers if server.role == role)
        for info in (before, after)
    )
    return new - old
