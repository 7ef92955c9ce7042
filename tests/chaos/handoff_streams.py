"""The streams of a hand-off run: what each does, and what its client saw of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

from streamfill.api import Client
from streamfill.api.answer import Answer
from streamfill.api.types import Result, SamplingOptions
from streamfill.errors import StreamError
from streamfill.stream.tokenizer import TextTokenizer
from tests.support.playing import put
from tests.support.stories import Story, StoryTeller

LIFE_S = 120.0
"""For a whole stream; it is over in seconds even where its servers die and its transfers stall."""

_FEWEST_TOKENS, _MOST_TOKENS = 60, 600
"""Of prompts: some 30 to 300 kB of KV, so several chunks."""
_FEWEST_ANSWER, _MOST_ANSWER = 32, 160
_MOST_PIECES = 4
_LONGEST_GAP_S = 0.2


@dataclass(frozen=True, kw_only=True)
class PlannedStream:
    """One stream, every one of which is read to its end."""

    number: int
    story: Story
    is_one_shot: bool
    sampling: SamplingOptions


@dataclass(kw_only=True)
class PlayedStream:
    """What its client saw. Times are of the monotonic clock, in seconds."""

    number: int
    began_s: float
    committed_s: float = 0.0
    ended_s: float = 0.0
    indices: list[int] = field(default_factory=list)
    """Of the tokens, as they came."""
    token_ids: list[int] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)
    result: Result | None = None
    errors: list[str] = field(default_factory=list)
    """How it ended, where it did not end well."""

    @property
    def longest_wait_s(self) -> float:
        """For a token, from the commit on; up to the end where there was none."""
        times_s = [self.committed_s or self.began_s, *self.token_times_s, self.ended_s]
        return max(after_s - before_s for before_s, after_s in pairwise(times_s))

    @property
    def is_done(self) -> bool:
        """It has its whole answer."""
        return self.result is not None

    def used(self, role: str) -> str:
        """The server of this role that made the answer; empty where there was none."""
        if self.result is None:
            return ""
        metadata = self.result.metadata
        return metadata.prefill_server if role == "prefill" else metadata.decode_server


def plan_streams(tokenizer: TextTokenizer, seed: int, num_streams: int) -> list[PlannedStream]:
    """A third each appends, updates and asks at once; a third samples with a seed, the others are
    greedy. The same arguments give the same ones."""
    random = Random(f"hand-off {seed}")
    teller = StoryTeller(tokenizer, seed, longest_gap_s=_LONGEST_GAP_S)
    streams = []
    for number in range(num_streams):
        story = teller.story(
            "update" if number % 3 == 1 else "append",
            random.randint(1, _MOST_PIECES),
            random.randint(_FEWEST_TOKENS, _MOST_TOKENS),
        )
        sampling: SamplingOptions = {
            "max_tokens": random.randint(_FEWEST_ANSWER, _MOST_ANSWER),
            "ignore_eos": True,
            "temperature": 0.0,
        }
        if random.random() < 1 / 3:
            sampling |= {"temperature": 1.0, "seed": random.randrange(1_000_000)}
        streams.append(
            PlannedStream(
                number=number, story=story, is_one_shot=number % 3 == 2, sampling=sampling
            )
        )
    return streams


async def play_streams(
    client: Client,
    streams: Sequence[PlannedStream],
    *,
    tokenizer: TextTokenizer,
    prefix: str,
    num_at_once: int,
    rate: float | None = None,
    may_begin: Callable[[int], Awaitable[bool]] | None = None,
    on_end: Callable[[PlayedStream], None] = lambda played: None,
) -> list[PlayedStream]:
    """Play all of them; returns what became of each that began, in their order.

    Args:
        client: of the cluster.
        streams: what to play.
        tokenizer: of the model.
        prefix: of their request ids, which their numbers follow.
        num_at_once: at most so many at the same time.
        rate: begin so many each second; None: as fast as others end.
        may_begin: waited for before the stream at a place begins; False: it is enough.
        on_end: told of each that ended.
    """
    gate = asyncio.Semaphore(num_at_once)
    began_s = time.monotonic()
    running: list[asyncio.Task[PlayedStream]] = []

    async def one(stream: PlannedStream) -> PlayedStream:
        try:
            played = await _play(client, stream, f"{prefix}{stream.number}", tokenizer)
        finally:
            gate.release()
        on_end(played)
        return played

    async with asyncio.TaskGroup() as group:
        for place, stream in enumerate(streams):
            if rate is not None:
                await asyncio.sleep(max(0.0, began_s + place / rate - time.monotonic()))
            if may_begin is not None and not await may_begin(place):
                break
            await gate.acquire()
            running.append(group.create_task(one(stream)))
    return [task.result() for task in running]


async def _play(
    client: Client, planned: PlannedStream, request_id: str, tokenizer: TextTokenizer
) -> PlayedStream:
    played = PlayedStream(number=planned.number, began_s=time.monotonic())
    story, sampling = planned.story, planned.sampling
    try:
        async with asyncio.timeout(LIFE_S):
            if planned.is_one_shot:
                text = story.text
                ids = None if text is not None else story.token_ids(tokenizer)
                answer = client.generate(text, token_ids=ids, request_id=request_id, **sampling)
                await _read(answer, played)
                return played
            async with client.stream(mode=story.mode, request_id=request_id) as stream:
                *pieces, last = story.pieces
                for gap_s, piece in zip(story.gaps_s, pieces, strict=False):
                    await asyncio.sleep(gap_s)
                    await put(stream, story, piece)
                if not story.commit_brings_last:
                    await put(stream, story, last)
                    answer = stream.commit(**sampling)
                elif isinstance(last, str):
                    answer = stream.commit(last, **sampling)
                else:
                    answer = stream.commit(token_ids=last, **sampling)
                await _read(answer, played)
    except StreamError as error:
        played.errors.append(str(error))
    except TimeoutError:
        played.errors.append(f"not over after {LIFE_S:g} s")
    finally:
        played.ended_s = time.monotonic()
    return played


async def _read(answer: Answer, played: PlayedStream) -> None:
    played.committed_s = time.monotonic()
    async with answer:
        async for token in answer:
            played.indices.append(token.index)
            played.token_ids.append(token.token_id)
            played.token_times_s.append(time.monotonic())
        played.result = answer.result
