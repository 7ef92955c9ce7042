"""Prompts that are committed while the context of others is computed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from streamfill.api import Client
from streamfill.api.types import Result
from streamfill.stream.tokenizer import load_tokenizer
from tests.support.cluster import RunningCluster
from tests.support.comparing import assert_same
from tests.support.counters import empty_caches, wait_until_at_rest
from tests.support.stories import StoryTeller

pytestmark = [pytest.mark.integration, pytest.mark.clusters]

_NUM_LONG = 6
_LONG_TOKENS = 1500
_NUM_SHORT = 24
_MAX_TOKENS = 12
_WAIT_S = 60.0


async def _play(client: Client, contexts: list[str], prompts: list[str]) -> list[Result]:
    """All contexts at once, and meanwhile the prompts one after the other; then the contexts are
    committed. The answers to all, prompts first."""
    async with asyncio.TaskGroup() as group:
        all_asked = asyncio.Event()

        async def retrieve(context: str) -> Result:
            async with client.stream() as stream:
                await stream.append(context)
                await all_asked.wait()
                answer = stream.commit("And then?", max_tokens=_MAX_TOKENS, temperature=0.0)
                return await answer.read()

        contexts_under_way = [group.create_task(retrieve(context)) for context in contexts]
        answered = [
            await client.complete(prompt, max_tokens=_MAX_TOKENS, temperature=0.0)
            for prompt in prompts
        ]
        all_asked.set()
    return [*answered, *(task.result() for task in contexts_under_way)]


async def _num_interruptions(client: Client) -> int:
    info = await client.server_info()
    return sum(server.counters["num_interruptions"] for server in info.servers)


async def test_answers_are_the_same(cluster: RunningCluster, tiny_model: Path) -> None:
    """Prompts are computed in the middle of others' steps, and neither they nor what they interrupt
    is answered otherwise than alone."""
    teller = StoryTeller(load_tokenizer(tiny_model), seed=12)
    contexts = [f"{number}. {teller.text(_LONG_TOKENS)}" for number in range(_NUM_LONG)]
    prompts = [f"{number}? {teller.text(15 + 4 * number)}" for number in range(_NUM_SHORT)]
    async with Client(cluster.address) as client:
        await empty_caches(client)
        before = await _num_interruptions(client)
        together = await asyncio.wait_for(_play(client, contexts, prompts), _WAIT_S)
        await wait_until_at_rest(client)
        assert await _num_interruptions(client) > before, "nothing was interrupted"
        await empty_caches(client)
        whole = [*prompts, *(f"{context}And then?" for context in contexts)]
        for number, (prompt, ours) in enumerate(zip(whole, together, strict=True)):
            alone = await client.complete(prompt, max_tokens=_MAX_TOKENS, temperature=0.0)
            assert_same(ours, alone, f"prompt {number}")


async def test_the_option_turns_it_off(cluster: RunningCluster, tiny_model: Path) -> None:
    """As with every other policy."""
    teller = StoryTeller(load_tokenizer(tiny_model), seed=13)
    contexts = [f"{number}. {teller.text(_LONG_TOKENS)}" for number in range(2)]
    prompts = [f"{number}? {teller.text(20)}" for number in range(6)]
    async with Client(cluster.address) as client:
        await client.set_policy("adaptive", {"interrupts": "off"})
        try:
            before = await _num_interruptions(client)
            await asyncio.wait_for(_play(client, contexts, prompts), _WAIT_S)
            await wait_until_at_rest(client)
            assert await _num_interruptions(client) == before
        finally:
            await client.set_policy("adaptive")
