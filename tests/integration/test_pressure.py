"""More context than the KV pool holds, and pages of several tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamfill.api import Client
from streamfill.api.types import ClusterInfo, Result, SamplingOptions
from streamfill.observability.lifetime import LifetimeEvent
from streamfill.stream.tokenizer import load_tokenizer
from tests.support.cluster import RunningCluster, start_cluster
from tests.support.comparing import assert_same
from tests.support.counters import FRESH_S, empty_caches, wait_until_at_rest
from tests.support.playing import one_shots, play_all
from tests.support.stories import StoryTeller

pytestmark = [pytest.mark.integration, pytest.mark.clusters]

_NUM_STREAMS = 32
_NUM_PIECES = 5
_PIECE_TOKENS = 40
_MAX_TOKENS = 16
_POOL_TOKENS = 1950
"""A third of the prompts, which are a little shorter than their pieces add up to."""
_WAIT_S = 60.0
_COUNTERS = ("num_swap_outs", "num_swap_ins", "num_computed_tokens", "num_recomputed_tokens")


@pytest.fixture(scope="module")
def tight_cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[RunningCluster]:
    """Its prefill server's pool holds a third of what the test needs at once, its host memory all
    of it."""
    toml = f"[prefill]\npool_tokens = {_POOL_TOKENS}\nhost_pool_tokens = {4 * _POOL_TOKENS}"
    running = start_cluster(tmp_path_factory.mktemp("tight"), tiny_model, "tight", toml)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def paged_cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[RunningCluster]:
    """Pages of 16 tokens on both servers, a tight pool, and host memory for a stream or two."""
    toml = (
        f"[prefill]\npage_size = 16\npool_tokens = {_POOL_TOKENS}\nhost_pool_tokens = 320\n"
        "[decode]\npage_size = 16"
    )
    running = start_cluster(tmp_path_factory.mktemp("paged"), tiny_model, "paged", toml)
    yield running
    running.stop()


@pytest.fixture
def split_cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[RunningCluster]:
    """One server of two tensor-parallel ranks with a tight pool."""
    toml = f"[prefill]\ntp_size = 2\nthreads = 1\npool_tokens = {_POOL_TOKENS}\n[decode]\ncount = 0"
    running = start_cluster(tmp_path_factory.mktemp("split"), tiny_model, "split", toml)
    yield running
    running.stop()


async def test_streams_three_times_the_pool(
    cluster: RunningCluster, tight_cluster: RunningCluster, tiny_model: Path
) -> None:
    """All finish with the answers of an ample cluster, and next to nothing is computed twice: what
    memory has no room for waits in host memory. Told to swap, since what is cheaper on the tiny
    model changes with every measurement."""
    async with Client(tight_cluster.address) as client:
        await client.set_policy("adaptive", {"preemption": "swap"})
        try:
            total = await _assert_all_finish(tight_cluster, cluster, tiny_model, seed=1)
        finally:
            await client.set_policy("adaptive")
    assert total["num_swap_outs"] > 0
    assert total["num_swap_ins"] > 0
    assert total["num_recomputed_tokens"] < total["num_computed_tokens"] / 10


@pytest.mark.parametrize("mode", ["auto", "swap", "recompute", "none"])
async def test_every_preemption_mode(
    cluster: RunningCluster, tight_cluster: RunningCluster, tiny_model: Path, mode: str
) -> None:
    """However KV is taken, the answers are the same."""
    async with Client(tight_cluster.address) as client:
        await client.set_policy("adaptive", {"preemption": mode})
        try:
            total = await _assert_all_finish(tight_cluster, cluster, tiny_model, seed=6)
        finally:
            await client.set_policy("adaptive")
    if mode == "auto":
        assert total["num_swap_outs"] + total["num_recomputed_tokens"] > 0
    else:
        assert (total["num_swap_outs"] > 0) == (mode == "swap")
    if mode in {"recompute", "none"}:
        assert total["num_recomputed_tokens"] > 0


async def test_streams_three_times_the_pool_without_decode_server(
    cluster: RunningCluster, lone_cluster: RunningCluster, tiny_model: Path
) -> None:
    """The same where prompts and answers share one pool, and there is no host memory."""
    total = await _assert_all_finish(lone_cluster, cluster, tiny_model, seed=2)
    assert total["num_swap_outs"] == 0
    assert total["num_recomputed_tokens"] > 0


async def test_streams_three_times_the_pool_in_pages(
    cluster: RunningCluster, paged_cluster: RunningCluster, tiny_model: Path
) -> None:
    """The same with pages of 16 tokens, and far too little host memory."""
    total = await _assert_all_finish(paged_cluster, cluster, tiny_model, seed=3)
    assert total["num_swap_outs"] > 0
    assert total["num_recomputed_tokens"] > 0


async def test_streams_three_times_the_pool_on_two_ranks(
    split_cluster: RunningCluster, tiny_model: Path
) -> None:
    """Two ranks, each with half of every token's KV and host memory of its own, take and bring back
    the same. Compared with their own answers to whole prompts, since sums of two halves round
    differently."""
    total = await _assert_all_finish(split_cluster, split_cluster, tiny_model, seed=7)
    assert total["num_swap_outs"] > 0
    assert total["num_swap_ins"] > 0


@pytest.mark.parametrize("mode", ["append", "update"])
async def test_pages_of_16_tokens(
    paged_cluster: RunningCluster, tiny_model: Path, mode: str
) -> None:
    """What is not a whole page is neither kept nor handed over, and the answers are the same."""
    tokenizer = load_tokenizer(tiny_model)
    teller = StoryTeller(tokenizer, seed=4)
    stories = [
        teller.story("append" if mode == "append" else "update", 1 + number % 7, 10 + 15 * number)
        for number in range(16)
    ]
    async with Client(paged_cluster.address) as client:
        streamed = await play_all(client, stories, num_at_once=6, max_tokens=24, temperature=0.0)
        await empty_caches(client)
        whole = await one_shots(client, stories, tokenizer, max_tokens=24, temperature=0.0)
        await wait_until_at_rest(client)
    for number, (ours, theirs) in enumerate(zip(streamed, whole, strict=True)):
        assert_same(ours, theirs, f"story {number}")
        if ours.usage.num_prompt_tokens >= 16:
            assert ours.metadata.handoff == "done"


async def test_answers_that_outgrow_the_pool(
    cluster: RunningCluster, lone_cluster: RunningCluster, tiny_model: Path
) -> None:
    """Answers that are taken out of the batch for want of memory go on as if nothing had happened,
    penalties, seeds and log probabilities included."""
    kinds: list[SamplingOptions] = [
        {"temperature": 0.0, "logprobs": 2},
        {"temperature": 1.0, "seed": 4, "logprobs": 0},
        {"temperature": 0.0, "frequency_penalty": 1.0},
        {"temperature": 1.0, "seed": 9, "presence_penalty": 1.0, "min_tokens": 40},
    ]
    teller = StoryTeller(load_tokenizer(tiny_model), seed=5)
    requests: list[tuple[str, SamplingOptions]] = [
        (f"{number}. {teller.text(60)}", {**kinds[number % 4], "max_tokens": 240})
        for number in range(12)
    ]
    async with Client(lone_cluster.address) as lone, Client(cluster.address) as ample:
        needed_tokens = len(requests) * 300
        assert needed_tokens > 1.5 * (await lone.server_info()).pool_tokens
        together, whole = await asyncio.gather(
            *(
                asyncio.wait_for(_complete_all(client, requests), _WAIT_S)
                for client in (lone, ample)
            )
        )
        await wait_until_at_rest(lone)
        for (_, sampling), ours, theirs in zip(requests, together, whole, strict=True):
            assert_same(ours, theirs, f"{sampling}")
            for left, right in zip(ours.tokens, theirs.tokens, strict=True):
                assert left.logprob == pytest.approx(right.logprob, abs=1e-3)


async def _complete_all(
    client: Client, requests: list[tuple[str, SamplingOptions]]
) -> list[Result]:
    answers = (client.complete(prompt, **sampling) for prompt, sampling in requests)
    return await asyncio.gather(*answers)


async def _assert_all_finish(
    tight: RunningCluster, ample: RunningCluster, model: Path, seed: int
) -> dict[str, int]:
    """32 streams that are all open, with all of their context computed, before the first commit:
    most of it has to be taken away again by then. Returns by how much the prefill servers' counters
    grew."""
    prompts = _prompts(model, seed)
    async with Client(tight.address) as client:
        await empty_caches(client)  # copies of the same prompts in host memory would be swapped to
        before = await client.server_info()
        streamed = await _stream_all(client, prompts)
        await wait_until_at_rest(client)
        after = await client.server_info()
    assert sum(result.usage.num_prompt_tokens for result in streamed) >= 3 * before.pool_tokens
    assert _counted(before, after, "num_evicted_tokens") > 0, "there was no pressure"
    _check_accounts(streamed, before, after)
    async with Client(ample.address) as client:
        for number, (pieces, ours) in enumerate(zip(prompts, streamed, strict=True)):
            whole = await client.complete("".join(pieces), max_tokens=_MAX_TOKENS, temperature=0.0)
            assert_same(ours, whole, f"stream {number}")
    return {name: _counted(before, after, name) for name in _COUNTERS}


async def _stream_all(client: Client, prompts: list[list[str]]) -> list[Result]:
    all_sent = asyncio.Barrier(len(prompts) + 1)
    all_computed = asyncio.Event()

    async def one(number: int, pieces: list[str]) -> Result:
        async with client.stream() as stream:
            for piece in pieces[:-1]:
                await stream.append(piece)
                await asyncio.sleep(0.003 * (number % 7))
            await all_sent.wait()
            await all_computed.wait()
            answer = stream.commit(pieces[-1], max_tokens=_MAX_TOKENS, temperature=0.0)
            return await answer.read()

    async def every() -> list[Result]:
        streams = asyncio.gather(*(one(number, pieces) for number, pieces in enumerate(prompts)))
        await all_sent.wait()
        await _wait_until_computed(client)
        all_computed.set()
        return await streams

    return await asyncio.wait_for(every(), _WAIT_S)


async def _wait_until_computed(client: Client) -> None:
    """Returns when prefill servers have computed something, and no more of it for some time."""
    last, since_s = 0, time.monotonic()
    while not last or time.monotonic() - since_s < 2 * FRESH_S:
        num_computed = _total(await client.server_info(), "num_computed_tokens")
        if num_computed != last:
            last, since_s = num_computed, time.monotonic()
        await asyncio.sleep(0.1)


def _prompts(model: Path, seed: int) -> list[list[str]]:
    """Nothing in common but words: each begins with its own number."""
    teller = StoryTeller(load_tokenizer(model), seed)
    return [
        [f"{number}. ", *(teller.text(_PIECE_TOKENS) for _ in range(_NUM_PIECES))]
        for number in range(_NUM_STREAMS)
    ]


def _check_accounts(streamed: list[Result], before: ClusterInfo, after: ClusterInfo) -> None:
    """What was taken and did not come back was computed again, and the streams' accounts add up to
    the servers'."""
    recomputed = sum(result.usage.num_recomputed_tokens for result in streamed)
    assert recomputed == _counted(before, after, "num_recomputed_tokens")
    preemptions = [
        entry
        for result in streamed
        for entry in result.timing.lifetime
        if entry.event in (LifetimeEvent.PREEMPTED_RECOMPUTE, LifetimeEvent.PREEMPTED_SWAP)
    ]
    num_counted = _counted(before, after, "num_preemptions")
    told = [_preemptions_of(result) for result in streamed]
    assert len(preemptions) == num_counted, f"counted {num_counted}, told {told}"
    assert preemptions
    assert sum(entry.num_tokens or 0 for entry in preemptions) >= recomputed
    for result in streamed:
        usage = result.usage
        num_fresh = usage.num_computed_tokens - usage.num_recomputed_tokens
        assert num_fresh + usage.num_reused_tokens >= usage.num_prompt_tokens


def _preemptions_of(result: Result) -> str:
    """For a failure message: attempts, and the tokens and moments of what was told."""
    told = [
        f"{entry.num_tokens}@{entry.at_s:.3f}"
        for entry in result.timing.lifetime
        if entry.event in (LifetimeEvent.PREEMPTED_RECOMPUTE, LifetimeEvent.PREEMPTED_SWAP)
    ]
    return f"{result.metadata.num_attempts}: {' '.join(told)}"


def _counted(before: ClusterInfo, after: ClusterInfo, counter: str) -> int:
    """By how much a counter of the prefill servers grew."""
    return _total(after, counter) - _total(before, counter)


def _total(info: ClusterInfo, counter: str) -> int:
    """A counter of all prefill servers."""
    return sum(server.counters[counter] for server in info.servers if server.role == "prefill")
