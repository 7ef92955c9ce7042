"""Streaming changes nothing: the answers of a real model are those of sending each prompt at once.

50 random prompts are streamed, several at a time; then the caches are emptied and the same prompts
are sent in one shot. One test per prompt says whether the token ids are the
same. Computing a prompt in other chunks may decide an exact tie the other way, and does so at most
once in 50 prompts.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from streamfill.api import Client
from streamfill.api.types import Result, SamplingOptions
from streamfill.stream.tokenizer import TextTokenizer, load_tokenizer
from tests.support.cluster import RunningCluster
from tests.support.comparing import Difference, assert_same, first_difference
from tests.support.counters import empty_caches, wait_until_at_rest
from tests.support.playing import one_shots, play_all
from tests.support.stories import Story, StoryTeller

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

_NUM_PROMPTS = 50
_MAX_TIES = 1
_SEED = 20_260
_NUM_AT_ONCE = 6
_GREEDY: SamplingOptions = {"max_tokens": 32, "temperature": 0.0}
_WITH_TIES: SamplingOptions = {**_GREEDY, "logprobs": 5}


@dataclass(frozen=True)
class Outcome:
    """One prompt, both ways."""

    story: Story
    streamed: Result
    one_shot: Result

    @property
    def difference(self) -> Difference | None:
        """The first place at which the two answers part."""
        return first_difference(self.streamed, self.one_shot)


@pytest.fixture(scope="module")
def tokenizer(smollm: Path) -> TextTokenizer:
    """SmolLM2's."""
    return load_tokenizer(smollm)


@pytest.fixture(scope="module")
def outcomes(smollm_cluster: RunningCluster, tokenizer: TextTokenizer) -> list[Outcome]:
    """All prompts, streamed and then at once."""
    stories = _stories(tokenizer)
    return asyncio.run(_both_ways(smollm_cluster.address, stories, tokenizer))


@pytest.mark.parametrize("number", range(_NUM_PROMPTS))
def test_prompt(outcomes: list[Outcome], tokenizer: TextTokenizer, number: int) -> None:
    """The streamed token ids are those of the one-shot answer, but for a tie."""
    outcome = outcomes[number]
    story, streamed, whole = outcome.story, outcome.streamed, outcome.one_shot
    assert streamed.usage.num_prompt_tokens == len(story.token_ids(tokenizer))
    assert whole.usage.num_prompt_tokens == len(story.token_ids(tokenizer))
    assert streamed.metadata.num_attempts == whole.metadata.num_attempts == 1
    difference = outcome.difference
    print(
        f"{story.mode}, {len(story.pieces)} pieces, {whole.usage.num_prompt_tokens} + "
        f"{len(whole.token_ids)} tokens: {difference or 'identical'}"
    )
    if difference is not None:
        assert difference.is_tie, f"{difference}\n{story}"
        return  # behind a tie the two are answers to different texts
    assert_same(streamed, whole)


def test_ties_are_rare(outcomes: list[Outcome]) -> None:
    """At most one of all prompts needs a tie for its excuse."""
    ties = {
        number: outcome.difference
        for number, outcome in enumerate(outcomes)
        if outcome.difference is not None
    }
    assert len(ties) <= _MAX_TIES, ties


def test_the_prompts_are_what_they_should_be(outcomes: list[Outcome]) -> None:
    """Both modes, one to twelve pieces, token ids among them, KV that was handed over, and answers
    long enough to show a difference."""
    for mode in ("append", "update"):
        nums_pieces = {len(one.story.pieces) for one in outcomes if one.story.mode == mode}
        assert nums_pieces == set(range(1, 13)), mode
    assert 10 <= sum(one.story.text is None for one in outcomes) <= 40
    assert all(one.streamed.metadata.handoff == "done" for one in outcomes)
    assert sum(one.streamed.usage.num_cached_tokens for one in outcomes) > 0
    assert sum(len(one.one_shot.token_ids) for one in outcomes) >= 0.9 * 32 * _NUM_PROMPTS
    assert len({one.one_shot.token_ids for one in outcomes}) >= 0.9 * _NUM_PROMPTS


async def test_answer_that_ends_by_itself(
    smollm_cluster: RunningCluster, tokenizer: TextTokenizer
) -> None:
    """The model's own end of an answer is neither shown nor passed over, unless that is asked
    for."""
    messages = [{"role": "user", "content": "What is 2 + 2? Say"}]
    async with Client(smollm_cluster.address) as client:
        async with client.stream(messages=messages) as stream:
            await stream.append(" only the")
            streamed = await stream.commit(" number.", max_tokens=64, temperature=0.0).read()
        await empty_caches(client)
        whole_chat = [{"role": "user", "content": "What is 2 + 2? Say only the number."}]
        whole = await client.complete(messages=whole_chat, max_tokens=64, temperature=0.0)
        longer = await client.complete(
            messages=whole_chat,
            max_tokens=len(whole.token_ids) + 4,
            temperature=0.0,
            ignore_eos=True,
        )
    assert_same(streamed, whole)
    assert whole.finish_reason == "stop"
    assert whole.matched_stop == whole.token_ids[-1]
    assert whole.token_ids[-1] in tokenizer.eos_ids
    assert "<|im_end|>" not in whole.text
    assert longer.token_ids[: len(whole.token_ids)] == whole.token_ids
    assert len(longer.token_ids) == len(whole.token_ids) + 4


def _stories(tokenizer: TextTokenizer) -> list[Story]:
    """Each mode with every number of pieces from 1 to 12, and short and long prompts."""
    teller = StoryTeller(tokenizer, _SEED)
    random = Random(_SEED)
    stories = [
        teller.story(
            "append" if number % 2 == 0 else "update",
            1 + number // 2 % 12,
            random.randint(40, 300),
        )
        for number in range(_NUM_PROMPTS)
    ]
    random.shuffle(stories)
    return stories


async def _both_ways(address: str, stories: list[Story], tokenizer: TextTokenizer) -> list[Outcome]:
    async with Client(address) as client:
        streamed = await play_all(client, stories, num_at_once=_NUM_AT_ONCE, **_GREEDY)
        await wait_until_at_rest(client)
        await empty_caches(client)
        # Two, so that the prefill server works on one while the other is decoded.
        whole = await one_shots(client, stories, tokenizer, num_at_once=2, **_WITH_TIES)
    return [Outcome(*each) for each in zip(stories, streamed, whole, strict=True)]
