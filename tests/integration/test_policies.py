"""Policies on a real cluster: switched while it runs, with the same answers under each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from streamfill.api import Client
from streamfill.api.types import Result
from streamfill.errors import InvalidArgumentError
from streamfill.scheduling.registry import parse_policy_spec
from tests.support.cluster import RunningCluster
from tests.support.counters import empty_caches

pytestmark = pytest.mark.integration

_SPECS = (
    "default",
    "fcfs",
    "lcas",
    "lcas(order=newest)",
    "mcps",
    "laps",
    "edf",
    "adaptive",
)
_NUM_STREAMS = 6
_MAX_TOKENS = 12


def _pieces(number: int) -> list[str]:
    return [f"Note {number}.{part} of the harbour master. " * 8 for part in range(4)]


@pytest.fixture
async def client(cluster: RunningCluster) -> AsyncIterator[Client]:
    """A client; afterwards the default policy is in force again."""
    async with Client(cluster.address) as connected:
        yield connected
        await connected.set_policy("adaptive")


async def _stream(client: Client, number: int) -> Result:
    async with client.stream(priority=number % 2, ttft_slo_ms=200.0 * (number + 1)) as stream:
        for piece in _pieces(number):
            await stream.append(piece)
            await asyncio.sleep(0.02)
        return await stream.commit("Who?", max_tokens=_MAX_TOKENS, temperature=0.0).read()


@pytest.mark.parametrize("spec", _SPECS)
async def test_answers_do_not_depend_on_the_policy(client: Client, spec: str) -> None:
    """Streams that compete give the tokens of the same prompts at once, whoever goes first."""
    name, options = parse_policy_spec(spec)
    (result,) = (await client.set_policy(name, options)).values()
    assert (result.ok, result.policy) == (True, spec)
    await empty_caches(client)
    streamed = await asyncio.gather(*(_stream(client, number) for number in range(_NUM_STREAMS)))
    await empty_caches(client)
    for number, answer in enumerate(streamed):
        whole = await client.complete(
            "".join(_pieces(number)) + "Who?", max_tokens=_MAX_TOKENS, temperature=0.0
        )
        assert answer.token_ids == whole.token_ids


async def test_switching_in_mid_stream_loses_nothing(client: Client) -> None:
    """Every policy takes over the streams of the one before it."""
    running = asyncio.gather(*(_stream(client, number) for number in range(_NUM_STREAMS)))
    for spec in _SPECS:
        await client.set_policy(*parse_policy_spec(spec))
        await asyncio.sleep(0.01)
    assert all(len(answer.token_ids) == _MAX_TOKENS for answer in await running)


async def test_a_wrong_policy_changes_nothing(client: Client) -> None:
    """The refusal names the value and what there is; the old policy stays in force."""
    await client.set_policy("edf")
    with pytest.raises(InvalidArgumentError, match=r"'sjf'.*known: adaptive"):
        await client.set_policy("sjf")
    with pytest.raises(InvalidArgumentError, match=r"newest"):
        await client.set_policy("lcas", {"order": "random"})
    info = await client.server_info()
    assert [server.policy for server in info.servers if server.role == "prefill"] == ["edf"]


async def test_every_stream_has_a_reason(client: Client) -> None:
    """An idle stream is described as what it is, with what is known of it."""
    async with client.stream(priority=3) as stream:
        await stream.append("A beginning without an end. " * 20)
        async with asyncio.timeout(20):
            while True:
                servers = await client.describe_streams()
                decisions = [
                    each
                    for described in servers.values()
                    for each in described.streams
                    if each.priority == 3
                ]
                if decisions and decisions[0].decision == "idle":
                    break
                await asyncio.sleep(0.05)
        (decision,) = decisions
        assert decision.state == "open"
        assert decision.num_computed_tokens == decision.num_known_tokens > 0
        assert "computed" in decision.reason


async def test_runs_say_why(client: Client) -> None:
    """The events of an answer say why each run was made."""
    await empty_caches(client)
    answer = await _stream(client, 0)
    reasons = [entry.reason for entry in answer.timing.lifetime if entry.reason]
    assert "segment" in reasons
    assert reasons[-1] == "commit"
