"""The figures of one request, from its lifetime events by the functions of
``observability.lifetime``, and their distribution over many requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final

import msgspec

from streamfill.loadgen.records import RequestRecord
from streamfill.observability import lifetime as lt
from streamfill.observability.lifetime import LifetimeEntry, LifetimeEvent

PERCENTS: Final = (50, 90, 95, 99)


class Figure(StrEnum):
    """What is measured of requests. Values are the keys of files and of the RESULT line."""

    TTFT_LAST_SEGMENT = "ttft_last_segment_ms"
    """From the arrival of the last segment at the client to the first token there."""
    TTFT_QUERY = "ttft_query_ms"
    """From the arrival of the query: retrieval included."""
    TTFT_COMMIT = "ttft_commit_ms"
    """From the moment at which the prompt was known to be complete."""
    TPOT = "tpot_ms"
    """Time per output token after the first one."""
    ITL = "itl_ms"
    """Between two tokens; one value for each pair."""
    E2E = "e2e_ms"
    """From the arrival of the query to the end of the answer."""
    LAG = "lag_ms"
    """By how much the generator was late; one value for each thing it sent."""
    OVERLAP = "overlap_ratio"
    """Share of the prompt's compute time that lies before the arrival of the last segment."""
    TOKENISE = "tokenise_ms"
    """In the router, from the arrival of a segment to its being sent; one value for each."""
    PREFILL_QUEUE = "prefill_queue_ms"
    """Between commit and first token, without the time in which the prompt was computed."""
    HANDOFF = "handoff_ms"
    """From the start of the hand-off to its end."""
    DECODE_QUEUE = "decode_queue_ms"
    """From the end of the hand-off, or the first token if later, to the second token."""

    def __str__(self) -> str:
        return self.value


class Distribution(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Many values of one figure, in its unit."""

    num: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    def at(self, percent: int) -> float:
        """The percentile; one of ``PERCENTS``."""
        return {50: self.p50, 90: self.p90, 95: self.p95, 99: self.p99}[percent]


def distribution(values: Iterable[float]) -> Distribution | None:
    """Mean, percentiles and maximum of the values; None of nothing."""
    ordered = sorted(values)
    found = lt.percentiles(ordered, PERCENTS)
    p50, p90, p95, p99 = (found[percent] for percent in PERCENTS)
    if p50 is None or p90 is None or p95 is None or p99 is None:
        return None
    mean = sum(ordered) / len(ordered)
    return Distribution(
        num=len(ordered), mean=mean, p50=p50, p90=p90, p95=p95, p99=p99, max=ordered[-1]
    )


def request_figures(record: RequestRecord) -> dict[Figure, list[float]]:
    """All values that one completed request adds to each figure; none where it has nothing to say.

    The events of the server that belong to the final request, the one that was answered, give its
    stages; warm-ups before it count only for the overlap.
    """
    client = record.client_lifetime()
    lives = server_lives(record)
    final: Sequence[LifetimeEntry] = lives[-1] if lives else ()
    return {
        Figure.TTFT_LAST_SEGMENT: _ms(lt.ttft_from_last_segment_s(client)),
        Figure.TTFT_QUERY: _ms(lt.ttft_from_open_s(client)),
        Figure.TTFT_COMMIT: _ms(lt.ttft_from_commit_s(client)),
        Figure.TPOT: _ms(lt.tpot_s(client)),
        Figure.ITL: _ms(*lt.inter_token_s(client)),
        Figure.E2E: _ms(lt.e2e_s(client)),
        Figure.LAG: _ms(*record.lag_s),
        Figure.OVERLAP: _known(overlap(client, lives)),
        Figure.TOKENISE: _ms(*lt.tokenise_s(final)),
        Figure.PREFILL_QUEUE: _ms(lt.prefill_queue_s(final)),
        Figure.HANDOFF: _ms(lt.handoff_s(final)),
        Figure.DECODE_QUEUE: _ms(lt.decode_queue_s(final)),
    }


def server_lives(record: RequestRecord) -> list[list[LifetimeEntry]]:
    """The server's events, one list for each request that was made; the answered one is the last.

    In a record they stand one request behind the other, each from its OPENED on.
    """
    lives: list[list[LifetimeEntry]] = []
    for entry in record.server_lifetime():
        if entry.event is LifetimeEvent.OPENED or not lives:
            lives.append([])
        lives[-1].append(entry)
    return lives


def overlap(
    client: Sequence[LifetimeEntry], lives: Sequence[Sequence[LifetimeEntry]]
) -> float | None:
    """``lifetime.overlap_ratio`` of the compute time of all ``lives`` together, with respect to the
    arrival of the last segment at the client. None: nothing was computed, or nobody said so.

    Requests of one prompt may be computed at the same time, so each is taken by itself, weighted
    by its compute time.
    """
    arrivals = [entry for entry in client if entry.event is LifetimeEvent.SEGMENT_RECEIVED]
    hidden_s = total_s = 0.0
    for life in lives:
        computing = [
            entry
            for entry in life
            if entry.event in (LifetimeEvent.COMPUTE_STARTED, LifetimeEvent.COMPUTE_DONE)
        ]
        ratio = lt.overlap_ratio([*arrivals, *computing])
        if ratio is not None:
            life_s = lt.compute_s(computing)
            hidden_s += ratio * life_s
            total_s += life_s
    return hidden_s / total_s if total_s > 0 else None


def _ms(*values_s: float | None) -> list[float]:
    return [1000.0 * value_s for value_s in values_s if value_s is not None]


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]
