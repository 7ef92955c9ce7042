"""Caches of tenants on a whole cluster: counters show that one's prompts are computed anew for the
other, on both servers, and that tenants who want to share do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from streamfill.access.key_file import change_keys
from streamfill.access.keys import new_key
from streamfill.api import Client
from streamfill.api.types import Result
from tests.support.cluster import RunningCluster, start_cluster
from tests.support.counters import wait_until_at_rest

pytestmark = [pytest.mark.integration, pytest.mark.clusters]

TOML = """
[prefill]
threads = 1
pool_tokens = 8192
host_pool_tokens = 0
early_push = "{early_push}"
[decode]
threads = 1
pool_tokens = 8192
[router]
api_keys_file = "{keys}"
"""
# Cut in front of spaces: the last token of none becomes another when the next one comes, and would
# be computed twice or once, as it happens.
PIECES = tuple(f" Part {number} of what the tenants both read." * 6 for number in range(5))
QUESTION = " What is it about?"
NUM_TOKENS = 40
"""Of each answer: a shorter one may be over before what its hand-off took is known."""


@dataclass(frozen=True)
class Tenants:
    """A cluster, and a key of each tenant."""

    cluster: RunningCluster
    keys: dict[str, str]


@dataclass(frozen=True)
class Served:
    """What one stream of the prompt took."""

    result: Result
    num_prefilled: int
    """Tokens that the prefill server computed meanwhile, by its own count."""
    num_decode_side: int
    """Prompt tokens that the decode server prefilled meanwhile, likewise."""


@pytest.fixture(scope="module", params=["off", "on"])
def tenants(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("tenants")
    made = {
        name: new_key(name, shared_cache=name.startswith("open"))
        for name in ("a", "b", "open-1", "open-2")
    }
    path = folder / "keys.jsonl"
    change_keys(path, lambda _: [entry for _, entry in made.values()], "--file")
    toml = TOML.format(keys=path, early_push=request.param)
    cluster = start_cluster(folder, tiny_model, f"tenants-{request.param}", toml)
    yield Tenants(cluster, {name: key for name, (key, _) in made.items()})
    assert cluster.stop() == 0


async def _serve(tenants: Tenants, name: str) -> Served:
    """The prompt, piece by piece, as this tenant."""
    async with Client(tenants.cluster.address, api_key=tenants.keys[name]) as client:
        await wait_until_at_rest(client, 30.0)
        before = await _computed(client)
        async with client.stream() as stream:
            for piece in PIECES:
                await stream.append(piece)
            async for _ in stream.commit(QUESTION, max_tokens=NUM_TOKENS, temperature=0.0):
                pass
        after = await _computed(client)
        end_s = time.monotonic() + 30.0
        while any(after[role] <= before[role] for role in before):  # heartbeats bring them
            assert time.monotonic() < end_s, f"no server says what it computed: {after}"
            await asyncio.sleep(0.1)
            after = await _computed(client)
        await wait_until_at_rest(client, 30.0)
        after = await _computed(client)
    return Served(
        stream.result, after["prefill"] - before["prefill"], after["decode"] - before["decode"]
    )


async def _computed(client: Client) -> dict[str, int]:
    info = await client.server_info()
    return {server.role: server.counters["num_computed_tokens"] for server in info.servers}


async def test_no_tenant_is_served_from_anothers_prompts(tenants: Tenants) -> None:
    """The second tenant's first stream costs what the first tenant's did, to the token and to the
    byte of the hand-off; its second stream finds its own."""
    first = await _serve(tenants, "a")
    num_prompt = first.result.usage.num_prompt_tokens
    assert first.num_prefilled == num_prompt
    other = await _serve(tenants, "b")
    assert other.result.token_ids == first.result.token_ids
    assert other.result.usage.num_reused_tokens == 0
    assert other.result.usage.num_computed_tokens == num_prompt
    assert other.num_prefilled == num_prompt
    assert other.num_decode_side == first.num_decode_side
    assert other.result.metadata.handoff == "done"
    assert other.result.metadata.handoff_bytes == first.result.metadata.handoff_bytes
    again = await _serve(tenants, "b")
    assert again.result.token_ids == first.result.token_ids
    assert again.result.usage.num_reused_tokens > 0.9 * num_prompt
    assert again.num_prefilled < 0.1 * num_prompt


async def test_tenants_that_share_a_cache_do(tenants: Tenants) -> None:
    """Among themselves; what they leave is of no use to one that keeps to itself, nor the other
    way round."""
    first = await _serve(tenants, "open-1")
    num_prompt = first.result.usage.num_prompt_tokens
    assert first.result.usage.num_reused_tokens == 0
    assert first.num_prefilled == num_prompt
    other = await _serve(tenants, "open-2")
    assert other.result.usage.num_reused_tokens > 0.9 * num_prompt
    assert other.num_prefilled < 0.1 * num_prompt
