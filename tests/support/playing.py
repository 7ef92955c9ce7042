"""Stories told to a cluster, streamed and in one shot."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Unpack

from streamfill.api import Client
from streamfill.api.stream import Stream
from streamfill.api.types import Result, SamplingOptions
from streamfill.stream.tokenizer import TextTokenizer
from tests.support.stories import Piece, Story

GREEDY: SamplingOptions = {"temperature": 0.0}


async def play(client: Client, story: Story, **sampling: Unpack[SamplingOptions]) -> Result:
    """The answer to a story that arrives piece by piece."""
    async with client.stream(mode=story.mode) as stream:
        last = len(story.pieces) - 1
        for place, (gap_s, piece) in enumerate(zip(story.gaps_s, story.pieces, strict=True)):
            await asyncio.sleep(gap_s)
            if place < last or not story.commit_brings_last:
                await put(stream, story, piece)
            elif isinstance(piece, str):
                return await stream.commit(piece, **sampling).read()
            else:
                return await stream.commit(token_ids=piece, **sampling).read()
        return await stream.commit(**sampling).read()


async def put(stream: Stream, story: Story, piece: Piece) -> None:
    """Send one piece, as the story's mode has it."""
    send = stream.append if story.mode == "append" else stream.update
    if isinstance(piece, str):
        await send(piece)
    else:
        await send(token_ids=piece)


async def play_all(
    client: Client,
    stories: Sequence[Story],
    *,
    num_at_once: int,
    **sampling: Unpack[SamplingOptions],
) -> list[Result]:
    """All of them, some at the same time; the results in the stories' order."""
    gate = asyncio.Semaphore(num_at_once)

    async def one(story: Story) -> Result:
        async with gate:
            return await play(client, story, **sampling)

    return await asyncio.gather(*(one(story) for story in stories))


async def one_shot(
    client: Client, story: Story, tokenizer: TextTokenizer, **sampling: Unpack[SamplingOptions]
) -> Result:
    """The answer to a story's final prompt, all of it sent at once: as text where it is one."""
    text = story.text
    if text is not None:
        return await client.complete(text, **sampling)
    return await client.complete(token_ids=story.token_ids(tokenizer), **sampling)


async def one_shots(
    client: Client,
    stories: Sequence[Story],
    tokenizer: TextTokenizer,
    *,
    num_at_once: int = 1,
    **sampling: Unpack[SamplingOptions],
) -> list[Result]:
    """All final prompts, one after the other unless told otherwise, so that each is computed
    alone."""
    gate = asyncio.Semaphore(num_at_once)

    async def one(story: Story) -> Result:
        async with gate:
            return await one_shot(client, story, tokenizer, **sampling)

    return await asyncio.gather(*(one(story) for story in stories))
