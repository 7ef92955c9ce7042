"""The two requests of `streamfill demo`, and what is measured of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from streamfill.api import Client, Result, Stream
from streamfill.cli.timeline import Piece, TimelineRun

_SYSTEM: Final = "You answer questions about a document in one or two plain sentences."
_WARM_UP_PROMPT: Final = "warm-up " * 200
"""More than one prefill step, so that neither measured request pays for anything done only once."""
_WARM_UP_TOKENS: Final = 4
_PROGRESS_POLL_S: Final = 0.01


@dataclass(frozen=True, kw_only=True)
class DemoPrompt:
    """What both requests ask."""

    segments: Sequence[str]
    question: str
    """Sent with the commit, or at the end of the one shot."""
    max_tokens: int

    def messages(self, content: str) -> list[dict[str, str]]:
        """The chat with `content` as the user's message."""
        return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """One measured request. Times are in seconds, by ``time.monotonic``."""

    result: Result
    pieces: Sequence[Piece]
    commit_s: float
    """When the last piece was sent; for the one shot the whole prompt."""
    token_s: Sequence[float]

    @property
    def ttft_s(self) -> float:
        """From sending the last piece to the first token."""
        return self.token_s[0] - self.commit_s

    def on_axis(self, title: str, commit_at_s: float) -> TimelineRun:
        """The run as it looks when its last piece is sent at that place of a time axis."""
        shift_s = commit_at_s - self.commit_s
        return TimelineRun(
            title=title,
            pieces=[
                Piece(sent_s=piece.sent_s + shift_s, computed_s=piece.computed_s + shift_s)
                for piece in self.pieces
            ],
            commit_s=commit_at_s,
            token_s=[at_s + shift_s for at_s in self.token_s],
        )


async def warm_up(client: Client) -> None:
    """Sends a request that has nothing in common with the measured ones."""
    await client.complete(_WARM_UP_PROMPT, max_tokens=_WARM_UP_TOKENS, temperature=0.0)


async def run_streamed(
    client: Client, prompt: DemoPrompt, delay_s: float, on_segment: Callable[[int, int], None]
) -> DemoRun:
    """Streams the segments `delay_s` apart, the question another `delay_s` later.

    Args:
        client: of a cluster with cold caches.
        prompt: what to send.
        delay_s: seconds from one piece to the next.
        on_segment: called with the number of pieces sent and the tokens received so far.
    """
    sent_s: list[float] = []
    watches: list[asyncio.Task[float]] = []
    async with client.stream(mode="append", messages=prompt.messages("")) as stream:
        started_s = time.monotonic()
        for number, segment in enumerate(prompt.segments, start=1):
            sent_s.append(time.monotonic())
            progress = await stream.append(segment)
            watches.append(asyncio.create_task(_computed_at(stream, progress.num_received_tokens)))
            on_segment(number, progress.num_received_tokens)
            await asyncio.sleep(max(0.0, started_s + number * delay_s - time.monotonic()))
        answer = stream.commit(prompt.question, max_tokens=prompt.max_tokens, temperature=0.0)
        commit_s, token_s = time.monotonic(), []
        async for _ in answer:
            token_s.append(time.monotonic())
        # What was not yet computed at the commit was so at the first token.
        computed_s = [watch.result() if watch.done() else token_s[0] for watch in watches]
        for watch in watches:
            watch.cancel()
        result = answer.result
    pieces = [
        Piece(sent_s=sent, computed_s=min(computed, token_s[0]))
        for sent, computed in zip(sent_s, computed_s, strict=True)
    ]
    return DemoRun(result=result, pieces=pieces, commit_s=commit_s, token_s=token_s)


async def run_one_shot(client: Client, prompt: DemoPrompt) -> DemoRun:
    """Sends the same prompt in one piece."""
    content = "".join(prompt.segments) + prompt.question
    commit_s, token_s = time.monotonic(), []
    answer = client.generate(
        messages=prompt.messages(content), max_tokens=prompt.max_tokens, temperature=0.0
    )
    async for _ in answer:
        token_s.append(time.monotonic())
    return DemoRun(result=answer.result, pieces=[], commit_s=commit_s, token_s=token_s)


async def _computed_at(stream: Stream, num_tokens: int) -> float:
    """When the prefill server had computed so many tokens of the prompt."""
    while stream.progress.num_computed_tokens < num_tokens:  # noqa: ASYNC110 - no event for a part
        await asyncio.sleep(_PROGRESS_POLL_S)
    return time.monotonic()
