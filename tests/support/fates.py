"""Ways in which the life of a stream can end, acted out by a client."""

from __future__ import annotations

import asyncio
import enum
import sys
from collections.abc import Awaitable, Callable
from random import Random

from streamfill.api import Client
from streamfill.api.answer import Answer
from streamfill.api.stream import Stream
from streamfill.errors import StreamError
from tests.support import doomed_client

START_TIMEOUT_S = 90.0
"""For a client process to import the client and open its streams on a busy machine."""


class Fate(enum.Enum):
    """How a stream ends."""

    FINISHED = "finished"
    FINISHED_AT_ONCE = "finished, one-shot"
    CANCELLED_OPEN = "cancelled before its commit"
    CANCELLED_COMMITTED = "cancelled between commit and first token"
    CANCELLED_ANSWERING = "cancelled in mid-answer"
    LEFT_OPEN = "call dropped before the commit"
    LEFT_COMMITTED = "call dropped between commit and first token"
    LEFT_ANSWERING = "call dropped in mid-answer"
    LEFT_AT_ANY_MOMENT = "connection closed at any moment"
    ONE_SHOT_LEFT = "one-shot given up in mid-answer"


async def act(address: str, client: Client, fate: Fate, random: Random) -> None:
    """One stream, from its opening to ``fate``."""
    match fate:
        case Fate.FINISHED:
            if random.random() < 0.5:
                async with client.stream() as stream:
                    await _feed(stream.append, random)
                    await _answer(stream, random, max_tokens=16).read()
            else:
                async with client.stream(mode="update") as stream:
                    await _feed(stream.update, random)
                    await _answer(stream, random, max_tokens=16).read()
        case Fate.FINISHED_AT_ONCE:
            await client.complete(_piece(random), max_tokens=random.randint(1, 16))
        case Fate.CANCELLED_OPEN | Fate.CANCELLED_COMMITTED | Fate.CANCELLED_ANSWERING:
            async with client.stream() as stream:
                answer = await _go_on(stream, fate, random)
                await stream.cancel("by a test")
                del answer
        case Fate.LEFT_OPEN | Fate.LEFT_COMMITTED | Fate.LEFT_ANSWERING:
            async with client.stream() as stream:
                await _go_on(stream, fate, random)
        case Fate.LEFT_AT_ANY_MOMENT:
            await _lose_connection(address, random)
        case Fate.ONE_SHOT_LEFT:
            answer = client.generate(_piece(random), max_tokens=400)
            for _ in range(random.randint(1, 5)):
                await anext(answer)
            await answer.aclose()


async def drop_while_opening(address: str, random: Random) -> None:
    """A call that is given up before or after the router opened its stream; nobody knows."""
    async with Client(address) as client:
        stream = client.stream()
        opening = asyncio.ensure_future(stream.__aenter__())
        await asyncio.sleep(random.uniform(0, 0.005))
        opening.cancel()
        await asyncio.wait({opening})
        if not opening.cancelled() and opening.exception() is None:
            await stream.__aexit__(None, None, None)


async def kill_client(address: str, num_streams: int, random: Random) -> None:
    """A client process with several open streams that is killed without warning."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(doomed_client.__file__),
        address,
        str(num_streams),
        str(random.randrange(1000)),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        for _ in range(num_streams):
            line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
            assert line == b"open\n", "the client could not open its streams"
        await asyncio.sleep(random.uniform(0, 0.4))
    finally:
        process.kill()
        await process.communicate()


async def _go_on(stream: Stream, fate: Fate, random: Random) -> Answer | None:
    """Live until the moment of ``fate``. An answer that nobody refers to any more gives itself up,
    so it is returned."""
    await _feed(stream.append, random)
    if fate in (Fate.CANCELLED_OPEN, Fate.LEFT_OPEN):
        return None
    answer = _answer(stream, random, max_tokens=400)
    if fate in (Fate.CANCELLED_COMMITTED, Fate.LEFT_COMMITTED):
        first = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(random.uniform(0, 0.006))
        first.cancel()
        await asyncio.wait({first})
        return answer
    for _ in range(random.randint(1, 12)):
        await anext(answer)
    return answer


async def _lose_connection(address: str, random: Random) -> None:
    async with Client(address) as client, client.stream() as stream:

        async def live() -> None:
            await _feed(stream.append, random)
            await _answer(stream, random, max_tokens=400).read()

        life = asyncio.ensure_future(live())
        await asyncio.sleep(random.uniform(0, 0.3))
        await client.close()
        await _until_over(life)


async def _until_over(life: asyncio.Future[None]) -> None:
    try:
        await life
    except (StreamError, asyncio.CancelledError):
        return  # its connection is gone


async def _feed(send: Callable[[str], Awaitable[object]], random: Random) -> None:
    for _ in range(random.randint(0, 5)):
        await send(_piece(random))
        await asyncio.sleep(random.choice([0, random.uniform(0, 0.02)]))


def _answer(stream: Stream, random: Random, max_tokens: int) -> Answer:
    return stream.commit(_piece(random), max_tokens=max_tokens, temperature=0.0)


def _piece(random: Random) -> str:
    words = ["river", "market", "bread", "town", "sea", "Brücke", "川", "поле"]
    return " ".join(random.choice(words) for _ in range(random.randint(1, 60)))
