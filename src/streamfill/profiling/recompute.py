"""Points of the recompute curve, from a running cluster.

A stream with nothing beside it grows by pieces; each forward pass stands in the lifetime of its
answer with its tokens and its duration, as the server saw it. A pass of ``n`` tokens behind those
computed before is one point. No clock of ours takes part, and nothing but the public API.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from streamfill.api import Client
from streamfill.observability.lifetime import LifetimeEntry, LifetimeEvent
from streamfill.profiling.fits import Point


async def measure_recompute(
    client: Client,
    *,
    prefixes: Sequence[int],
    sizes: Sequence[int],
    repeats: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Point]:
    """One stream for each prefix, size and repeat.

    Args:
        prefixes: tokens that are there before.
        sizes: tokens that are added to them and committed.
        on_progress: called with streams done and in all.

    Raises:
        StreamError: the cluster refused one.
    """
    info = await client.server_info()
    rand = random.Random(0)
    most = min(info.context_tokens, info.pool_tokens) - 16
    plan = [
        (prefix, size)
        for _ in range(repeats)
        for prefix in prefixes
        for size in sizes
        if prefix + size <= most
    ]
    points: list[Point] = []
    for number, (prefix, size) in enumerate(plan):
        on_progress(number, len(plan))
        ids = [rand.randrange(10, info.vocab_size) for _ in range(prefix + size)]
        async with client.stream() as stream:
            if prefix:
                await stream.append(token_ids=ids[:prefix])
                await stream.wait_computed()
            answer = stream.commit(token_ids=ids[prefix:], max_tokens=1, temperature=0.0)
            result = await answer.read()
        points += points_of(result.timing.lifetime)
    on_progress(len(plan), len(plan))
    return points


def points_of(lifetime: Sequence[LifetimeEntry]) -> list[Point]:
    """A point for each forward pass of one stream that was alone."""
    points: list[Point] = []
    started_s: float | None = None
    num_computed = 0
    for entry in lifetime:
        if entry.event is LifetimeEvent.COMPUTE_STARTED:
            started_s = entry.at_s
        elif entry.event is LifetimeEvent.COMPUTE_DONE and started_s is not None:
            num_tokens = entry.num_tokens or 0
            if num_tokens and entry.at_s > started_s:
                x = {"num_tokens": float(num_tokens), "prefix_tokens": float(num_computed)}
                points.append(Point(x=x, seconds=entry.at_s - started_s))
            num_computed += num_tokens
            started_s = None
    return points
