"""What a client notices of a hand-off: how soon the first and the second token come, measured in
decode steps of the same answer.

1. A prompt of random token ids, so that no cache knows it, is streamed piece by piece; each piece
   is computed before the next one comes.
2. A last piece comes with the commit.
3. The gaps between the tokens from the third on are decode steps; their median is the yardstick.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from streamfill.api import Client
from streamfill.api.types import Result
from streamfill.errors import StreamfillError
from streamfill.observability.lifetime import LifetimeEvent, first_at_s, last_at_s

NUM_PIECES = 8
LAST_PIECE_TOKENS = 50
NUM_ANSWER_TOKENS = 16
COMPUTE_TIMEOUT_S = 60.0
PAUSE_S = 0.25
"""Between a piece that is computed and the next one, as of a quick retriever."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """One answer. Times in seconds."""

    step_s: float
    """Median of its decode steps."""
    first_s: float
    """From the end of the last prefill step to the arrival of the first token."""
    second_s: float
    """From the arrival of the first token to that of the second."""
    handoff: str
    num_cached_tokens: int

    @property
    def first_steps(self) -> float:
        """In decode steps."""
        return self.first_s / self.step_s

    @property
    def second_steps(self) -> float:
        """In decode steps."""
        return self.second_s / self.step_s


async def probe(client: Client, num_tokens: int, vocab_size: int, seed: int) -> Probe:
    """Stream one prompt of ``num_tokens`` tokens and read its answer.

    Raises:
        StreamError: the stream failed.
        StreamfillError: the answer is too short to measure.
    """
    generator = random.Random(seed)
    ids = [generator.randrange(10, vocab_size - 10) for _ in range(num_tokens)]
    body, last = ids[:-LAST_PIECE_TOKENS], ids[-LAST_PIECE_TOKENS:]
    size = -(-len(body) // NUM_PIECES)
    async with client.stream() as stream:
        for begin in range(0, len(body), size):
            await stream.append(token_ids=body[begin : begin + size])
            await stream.wait_computed(COMPUTE_TIMEOUT_S)
            await asyncio.sleep(PAUSE_S)
        sent_s = time.monotonic()
        answer = stream.commit(
            token_ids=last, max_tokens=NUM_ANSWER_TOKENS, temperature=0.0, ignore_eos=True
        )
        arrivals_s = [time.monotonic() async for _ in answer]
        return probe_of(answer.result, sent_s, arrivals_s)


def probe_of(result: Result, sent_s: float, arrivals_s: Sequence[float]) -> Probe:
    """The figures of one answer.

    The end of the last prefill step is known by the router's clock only, and how long commit and
    first token were on their way between client and router only as a sum. All of that sum is put to
    the token's account.

    Args:
        result: with its lifetime.
        sent_s: when the commit was sent, by the client's clock.
        arrivals_s: of the tokens, by the same clock.

    Raises:
        StreamfillError: fewer than four tokens, or the router noted no run.
    """
    entries = result.timing.lifetime
    computed_s = last_at_s(entries, LifetimeEvent.COMPUTE_DONE)
    committed_s = first_at_s(entries, LifetimeEvent.COMMIT_RECEIVED)
    first_s = first_at_s(entries, LifetimeEvent.FIRST_TOKEN)
    if len(arrivals_s) < 4 or computed_s is None or committed_s is None or first_s is None:
        raise StreamfillError(f"an answer of {len(arrivals_s)} tokens says nothing of hand-offs")
    gaps_s = [after - before for before, after in itertools.pairwise(arrivals_s[1:])]
    on_the_way_s = (arrivals_s[0] - sent_s) - (first_s - committed_s)
    return Probe(
        step_s=statistics.median(gaps_s),
        first_s=max(0.0, first_s - computed_s) + on_the_way_s,
        second_s=arrivals_s[1] - arrivals_s[0],
        handoff=result.metadata.handoff,
        num_cached_tokens=result.usage.num_cached_tokens,
    )


def median_of(probes: Sequence[Probe]) -> dict[str, float]:
    """Medians over several answers, as a ``RESULT`` line has them."""
    return {
        "first_token_decode_steps": round(statistics.median(p.first_steps for p in probes), 3),
        "second_token_decode_steps": round(statistics.median(p.second_steps for p in probes), 3),
        "first_token_ms": round(1000 * statistics.median(p.first_s for p in probes), 2),
        "second_token_ms": round(1000 * statistics.median(p.second_s for p in probes), 2),
        "decode_step_ms": round(1000 * statistics.median(p.step_s for p in probes), 2),
    }
