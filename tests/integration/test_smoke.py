"""The shortest way through a whole cluster."""

from __future__ import annotations

import pytest

from streamfill.api import Client
from tests.support.cluster import RunningCluster

pytestmark = pytest.mark.integration


async def test_streamed_answer_equals_one_shot(cluster: RunningCluster) -> None:
    """A prompt that was streamed in pieces is answered with the same tokens as the same prompt at
    once."""
    pieces = [f"Part {number} of a text. " * 5 for number in range(6)]
    async with Client(cluster.address) as client:
        async with client.stream() as stream:
            for piece in pieces:
                await stream.append(piece)
            answer = [
                token async for token in stream.commit("Why?", max_tokens=16, temperature=0.0)
            ]
        assert [token.token_id for token in answer] == list(stream.result.token_ids)
        assert stream.result.metadata.handoff == "done"
        await client.flush_caches()
        whole = await client.complete("".join(pieces) + "Why?", max_tokens=16, temperature=0.0)
    assert whole.token_ids == stream.result.token_ids
