"""What a cluster says of its work for a stream is what it did."""

from __future__ import annotations

import asyncio

import pytest

from streamfill.api import Client
from streamfill.api.types import Result
from streamfill.observability.lifetime import compute_intervals, compute_s, overlap_ratio
from tests.support.cluster import RunningCluster
from tests.support.counters import empty_caches

pytestmark = pytest.mark.integration

_GAP_S = 0.25
"""Many times what the tiny model takes for a piece."""
_PIECES = [f"Part {number} of a report on accounts. " * 12 for number in range(5)]
_MAX_TOKENS = 32


async def _stream(client: Client) -> Result:
    async with client.stream() as stream:
        for piece in _PIECES:
            await stream.append(piece)
            await asyncio.sleep(_GAP_S)
        return await stream.commit("Why?", max_tokens=_MAX_TOKENS, temperature=0.0).read()


def _check_sums(result: Result) -> None:
    usage, lifetime = result.usage, result.timing.lifetime
    num_tokens = sum(run.num_tokens for run in compute_intervals(lifetime))
    assert num_tokens == usage.num_computed_tokens
    num_fresh = usage.num_computed_tokens - usage.num_recomputed_tokens
    assert num_fresh + usage.num_reused_tokens >= usage.num_prompt_tokens
    assert [entry.at_s for entry in lifetime] == sorted(entry.at_s for entry in lifetime)
    assert 0 < compute_s(lifetime) < result.timing.lifetime[-1].at_s


async def test_compute_is_hidden_in_long_gaps(cluster: RunningCluster) -> None:
    """Most of a streamed prompt is computed before its last piece comes, nothing of a whole one."""
    async with Client(cluster.address) as client:
        await empty_caches(client)
        streamed = await _stream(client)
        await empty_caches(client)
        prompt = "".join(_PIECES) + "Why?"
        whole = await client.complete(prompt, max_tokens=_MAX_TOKENS, temperature=0.0)
    for result in (streamed, whole):
        _check_sums(result)
        assert result.usage.num_recomputed_tokens == result.usage.num_reused_tokens == 0
        assert result.metadata.handoff == "done"
        assert (result.metadata.handoff_bytes or 0) > 0
        assert (result.metadata.handoff_s or 0.0) > 0
    assert (overlap_ratio(streamed.timing.lifetime) or 0.0) > 0.5
    assert overlap_ratio(whole.timing.lifetime) == 0.0
    assert whole.usage.num_computed_tokens == whole.usage.num_prompt_tokens
    # A token at a seam that changed when the next piece came was sent ahead, and then again.
    streamed_bytes, whole_bytes = (r.metadata.handoff_bytes or 0 for r in (streamed, whole))
    assert whole_bytes <= streamed_bytes < 1.1 * whole_bytes


async def test_what_an_earlier_stream_left_is_reused(cluster: RunningCluster) -> None:
    """The same prompt again: all but the last token is found, and that one is computed."""
    async with Client(cluster.address) as client:
        await empty_caches(client)
        await _stream(client)
        again = await client.complete(
            "".join(_PIECES) + "Why?", max_tokens=_MAX_TOKENS, temperature=0.0
        )
    _check_sums(again)
    assert again.usage.num_computed_tokens == 1
    assert again.usage.num_reused_tokens == again.usage.num_prompt_tokens - 1
