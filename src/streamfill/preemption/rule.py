"""Who gives up KV first, and how: the rule of the controller, and of a server without one.

What a victim costs is what it costs *the victim* to have its KV back, by the cheaper of two ways:

* recompute: its own tokens behind the prefix that stays for others;
* swap: a copy out of what host memory does not hold yet, and a copy in. Where copies run beside the
  engine's work, what the victim's idle time hides of it costs nothing.

That is set against what taking it brings: memory really freed (shared prefixes free nothing), for
as long as the stream is expected to stay idle. So victims come by

    cost / (tokens freed x seconds until it is expected back)

in ascending order. Pure functions; the same set of streams gives the same order, always.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from streamfill.messages.control import (
    PlanEntry,
    PreemptionAction,
    PreemptionMode,
    StreamTelemetry,
)
from streamfill.preemption.costs import BUILT_IN, CostModel

UNKNOWN_IDLE_S: Final = 1.0
"""Least time that a stream without history is expected to stay idle: about one gap of a crawler."""
LEAST_IDLE_S: Final = 0.05
"""Nobody is expected back sooner; keeps the score finite."""
OVERDUE_SHARE: Final = 0.5
"""A stream that is overdue is expected to take half as long again as it has been silent: gaps of
crawlers have long tails, so the longer one lasts the longer it will."""


@dataclass(frozen=True, kw_only=True)
class Pricing:
    """What victims of one server are priced with."""

    mode: PreemptionMode = PreemptionMode.AUTO
    costs: CostModel = BUILT_IN["cpu"]
    bytes_per_token: int = 0
    free_host_tokens: int = 0
    """Room for copies, what may be given up for them included."""


DEFAULT_PRICING: Final = Pricing()


class Price(NamedTuple):
    """How a stream's KV would be taken."""

    action: PreemptionAction
    """``SWAP`` or ``RECOMPUTE``."""
    cost_s: float
    """To have it back."""
    num_freed_tokens: int
    num_host_tokens: int
    """Room that a swap takes in host memory: also what is copied already, which others may have
    until the KV is taken."""


def rank_victims(
    streams: Sequence[StreamTelemetry], pricing: Pricing = DEFAULT_PRICING
) -> tuple[PlanEntry, ...]:
    """All ``streams``, first to give up first.

    1. Idle streams by the score above; those that were preempted and have made no progress since
       come behind the others, so that nobody is preempted twice in a row while somebody else can
       be. Of equals the one idle for longer, the lower priority, the lower id.
    2. Streams that compute or wait to, then committed ones: ``KEEP``. They stand in the list for
       completeness; taking their memory would throw away work that is wanted right now.

    Host memory goes to the first ones; when it is full, the others are to be recomputed.
    """
    if pricing.mode is PreemptionMode.NONE:
        return ()
    expendable = [stream for stream in streams if is_expendable(stream)]
    expendable.sort(key=lambda stream: _victim_key(stream, pricing))
    entries: list[PlanEntry] = []
    room = pricing.free_host_tokens
    for stream in expendable:
        price = price_of(stream, pricing, room)
        if price.action is PreemptionAction.SWAP:
            room -= price.num_host_tokens
        entries.append(
            PlanEntry(
                stream_id=stream.stream_id,
                action=price.action,
                reason=_reason(stream, price),
                cost_s=price.cost_s,
            )
        )
    kept = [stream for stream in streams if not is_expendable(stream)]
    kept.sort(key=lambda stream: (stream.committed, stream.active, *_ties(stream)))
    for stream in kept:
        reason = "committed" if stream.committed else "being computed"
        entries.append(
            PlanEntry(stream_id=stream.stream_id, action=PreemptionAction.KEEP, reason=reason)
        )
    return tuple(entries)


def is_expendable(stream: StreamTelemetry) -> bool:
    """Whether the stream's KV may be taken at all: nobody waits for it right now."""
    return not (stream.committed or stream.active)


def price_of(stream: StreamTelemetry, pricing: Pricing, room: int | None = None) -> Price:
    """The way to take a stream's KV, and what it costs to have it back.

    Args:
        room: tokens that still fit host memory; by default all that is free.
    """
    costs, mode = pricing.costs, pricing.mode
    freed = max(0, stream.num_computed_tokens - stream.num_shared_tokens)
    copied = max(0, stream.num_computed_tokens - max(stream.num_shared_tokens, _saved(stream)))
    recompute_s = costs.recompute.seconds(freed, stream.num_shared_tokens)
    recompute = Price(PreemptionAction.RECOMPUTE, recompute_s, freed, 0)
    fits = freed <= (pricing.free_host_tokens if room is None else room)
    if mode is PreemptionMode.RECOMPUTE or not fits or not pricing.bytes_per_token:
        return recompute
    out_s = costs.swap_out.seconds(copied * pricing.bytes_per_token)
    in_s = costs.swap_in.seconds(freed * pricing.bytes_per_token)
    if costs.copies_overlap:
        idle_s = expected_idle_s(stream)
        swap_s = max(0.0, out_s + in_s - idle_s)
    else:
        swap_s = out_s + in_s
    if mode is PreemptionMode.AUTO and swap_s >= recompute_s > 0.0:
        return recompute
    return Price(PreemptionAction.SWAP, swap_s, freed, freed)


def expected_idle_s(stream: StreamTelemetry) -> float:
    """For how much longer the stream is expected to need nothing: seconds, above 0."""
    expected_s = stream.expected_next_s
    if expected_s is None:
        return max(UNKNOWN_IDLE_S, stream.idle_s)
    if expected_s > 0.0:
        return max(LEAST_IDLE_S, expected_s)
    return max(LEAST_IDLE_S, OVERDUE_SHARE * stream.idle_s)


def _saved(stream: StreamTelemetry) -> int:
    return min(stream.num_saved_tokens, stream.num_computed_tokens)


def _victim_key(stream: StreamTelemetry, pricing: Pricing) -> tuple[bool, float, float, int, int]:
    price = price_of(stream, pricing)
    if price.num_freed_tokens:
        score = price.cost_s / (price.num_freed_tokens * expected_idle_s(stream))
    else:
        score = math.inf
    return stream.was_preempted, score, *_ties(stream)


def _ties(stream: StreamTelemetry) -> tuple[float, int, int]:
    return -stream.idle_s, stream.priority, stream.stream_id


def _reason(stream: StreamTelemetry, price: Price) -> str:
    if not price.num_freed_tokens:
        return "frees nothing"
    again = ", preempted before" if stream.was_preempted else ""
    return (
        f"idle for {stream.idle_s:.1f} s, expected back in {expected_idle_s(stream):.1f} s, "
        f"frees {price.num_freed_tokens} tokens, back for {1000 * price.cost_s:.0f} ms{again}"
    )
