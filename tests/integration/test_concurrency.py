"""Streams that run at the same time, and text that is cut where it must not matter."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import pytest

from streamfill.api import Client
from streamfill.api.types import Result
from streamfill.models.tiny_corpus import CORPUS
from streamfill.stream.tokenizer import load_tokenizer
from tests.support.cluster import RunningCluster
from tests.support.comparing import assert_same
from tests.support.counters import empty_caches
from tests.support.playing import one_shots, play_all
from tests.support.stories import StoryTeller

pytestmark = pytest.mark.integration

_CLUSTERS = (
    "👨\u200d👩\u200d👧 e\u0301a\u0308 🇩🇪🇯🇵 👍🏽 नदी पहाड़ियों भाषा สวัสดี "
    "שָׁלוֹם x\u0304\u0301 ❤\ufe0f 각\u1100\u1161\u11a8 \r\n fi\u200dn"
)
"""Grapheme clusters of several code points each."""


@pytest.mark.parametrize("seed", [1, 2])
async def test_interleaved_streams(cluster: RunningCluster, tiny_model: Path, seed: int) -> None:
    """Twelve streams that append and update at random moments are answered like one-shots."""
    tokenizer = load_tokenizer(tiny_model)
    teller = StoryTeller(tokenizer, seed)
    stories = [
        teller.story("append" if number % 2 else "update", 1 + number, 60 + 25 * number)
        for number in range(12)
    ]
    async with Client(cluster.address) as client:
        streamed = await play_all(client, stories, num_at_once=12, max_tokens=24, temperature=0.0)
        await empty_caches(client)
        whole = await one_shots(client, stories, tokenizer, max_tokens=24, temperature=0.0)
    for number, (story, ours, theirs) in enumerate(zip(stories, streamed, whole, strict=True)):
        assert_same(ours, theirs, f"story {number}")
        assert ours.usage.num_prompt_tokens == len(story.token_ids(tokenizer)), number
    assert len({result.token_ids for result in whole}) == 12, "the model says always the same"


@pytest.mark.parametrize("mode", ["append", "update"])
async def test_identical_streams_at_once(cluster: RunningCluster, mode: str) -> None:
    """Two streams with the same context at the same time both get the right answer."""
    pieces = [f"The same part {number} for both. " * 6 for number in range(4)]
    both_there = asyncio.Barrier(2)

    async def one(client: Client) -> Result:
        async with client.stream(mode="append" if mode == "append" else "update") as stream:
            for number in range(len(pieces)):
                await both_there.wait()
                if mode == "append":
                    await stream.append(pieces[number])
                else:
                    await stream.update("".join(pieces[: number + 1]))
            await both_there.wait()
            return await stream.commit(max_tokens=20, temperature=0.0).read()

    async with Client(cluster.address) as client:
        await empty_caches(client)
        first, second = await asyncio.gather(one(client), one(client))
        await empty_caches(client)
        whole = await client.complete("".join(pieces), max_tokens=20, temperature=0.0)
    assert_same(first, whole, "first")
    assert_same(second, whole, "second")


async def test_identical_one_shots_at_once(cluster: RunningCluster) -> None:
    """The same whole prompt eight times at once, in a cold cache, gives the same answer eight
    times."""
    prompt = "Eight times the very same prompt. " * 12
    async with Client(cluster.address) as client:
        await empty_caches(client)
        results = await asyncio.gather(
            *(client.complete(prompt, max_tokens=20, temperature=0.0) for _ in range(8))
        )
    for result in results[1:]:
        assert_same(result, results[0])


async def test_chat_that_grows(cluster: RunningCluster) -> None:
    """A chat whose last message arrives in pieces is answered like the whole chat at once."""
    opening = [
        {"role": "system", "content": "You answer shortly."},
        {"role": "user", "content": "Read this: "},
    ]
    pieces = ["  leading space. ", *CORPUS[15:20], "\n\nWhat does it say?", "  "]
    content = opening[-1]["content"] + "".join(pieces)
    async with Client(cluster.address) as client:
        async with client.stream(messages=opening) as stream:
            for piece in pieces:
                await stream.append(piece)
            streamed = await stream.commit(max_tokens=20, temperature=0.0).read()
        await empty_caches(client)
        whole = await client.complete(
            messages=[opening[0], {"role": "user", "content": content}],
            max_tokens=20,
            temperature=0.0,
        )
    assert_same(streamed, whole)


async def test_chat_that_gets_messages_and_updates(cluster: RunningCluster) -> None:
    """Further messages, and other messages in the place of all, come to the same as one-shots."""
    first = [{"role": "user", "content": "One two three."}]
    further = [
        {"role": "assistant", "content": "Four five six."},
        {"role": "user", "content": "And then? " + CORPUS[3]},
    ]
    other = [{"role": "system", "content": "Be brief."}, *first, *further]
    async with Client(cluster.address) as client:
        async with client.stream(messages=first) as stream:
            await stream.append(messages=further)
            appended = await stream.commit(max_tokens=16, temperature=0.0).read()
        async with client.stream(mode="update", messages=first) as stream:
            await stream.update(messages=[*first, *further])
            updated = await stream.commit(messages=other, max_tokens=16, temperature=0.0).read()
        await empty_caches(client)
        whole = [
            await client.complete(messages=chat, max_tokens=16, temperature=0.0)
            for chat in ([*first, *further], other)
        ]
    assert_same(appended, whole[0], "appended")
    assert_same(updated, whole[1], "updated")


@pytest.mark.parametrize("seed", range(4))
async def test_text_cut_inside_clusters(cluster: RunningCluster, seed: int) -> None:
    """Text that is cut between any two code points, also as UTF-8, makes the same prompt and the
    same answer as the whole."""
    random = Random(seed)
    text = "".join(random.choice([_CLUSTERS, random.choice(CORPUS)]) for _ in range(4))
    places = sorted(random.sample(range(1, len(text)), 30))
    pieces = [
        text[begin:end] for begin, end in zip([0, *places], [*places, len(text)], strict=True)
    ]
    async with Client(cluster.address) as client:
        async with client.stream() as stream:
            for piece in pieces:
                await stream.append(piece if random.random() < 0.5 else piece.encode())
            streamed = await stream.commit(max_tokens=40, temperature=0.0).read()
        await empty_caches(client)
        whole = await client.complete(text, max_tokens=40, temperature=0.0)
    assert_same(streamed, whole)
    shown = "".join(token.text for token in streamed.tokens)
    assert whole.text.startswith(shown), "the rest is the tail"


async def test_texts_of_tokens_make_the_text(cluster: RunningCluster, tiny_model: Path) -> None:
    """The joined texts of the tokens and the tail are what the token ids decode to."""
    tokenizer = load_tokenizer(tiny_model)
    async with Client(cluster.address) as client:
        for number, prompt in enumerate(CORPUS[20:36]):
            async with client.stream() as stream:
                await stream.append(prompt)
                result = await stream.commit(
                    max_tokens=30, temperature=1.0, seed=number, skip_special_tokens=True
                ).read()
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=True)
            before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
            after = tokenizer.decode([*prompt_ids, *result.token_ids], skip_special_tokens=True)
            assert before + result.text == after
