"""What is made of a stream once it has ended, in a thread of its own.

The loop hands over the stream's lifetime, which nothing changes any more, and goes on. The thread
computes the figures and gives them to the histograms, and the lifetime to whoever wants it (the
exporter of traces). So a long answer costs the loop one append to a queue.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from router.interface import DoneEvent
from streamfill.errors import StreamError
from streamfill.observability import lifetime
from streamfill.observability.lifetime import LifetimeEntry
from streamfill.observability.logging import RateLimited, log_event
from streamfill.observability.metric_values import MetricSet
from streamfill.observability.metrics import Metric
from streamfill.stream.state import StreamState

logger = logging.getLogger(__name__)

MAX_QUEUED: Final = 1_000
"""Streams that ended and were not looked at. More are counted and left out of the figures, rather
than kept in memory: a lifetime has an entry of a hundred bytes per token."""
CLOSE_TIMEOUT_S: Final = 5.0


class Ending(NamedTuple):
    """How a stream ends."""

    state: StreamState
    how: DoneEvent | StreamError
    """What its client is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndedStream:
    """All that is left of a stream."""

    stream_id: int
    request_id: str
    mode: str
    outcome: str
    error: str
    """Why it ended badly; empty for one that went well."""
    entries: Sequence[LifetimeEntry]
    """In the order of recording, on the clock of `time.monotonic`."""
    prefill_server: str
    decode_server: str
    handoff: str
    num_attempts: int
    num_prompt_tokens: int
    num_output_tokens: int
    trace_parent: str = ""
    """Of the client's own trace, as W3C's header ``traceparent``; empty: it has none."""


class EndedStreams:
    """Takes ended streams from the loop. `start` before the first one, `close` after the last."""

    def __init__(self, metrics: MetricSet) -> None:
        self.then: Callable[[EndedStream], None] | None = None
        """Called in the thread, once per stream; set before `start`."""
        self._queue: queue.SimpleQueue[EndedStream | None] = queue.SimpleQueue()
        self._lost = metrics.counter(Metric.LIFETIMES_LOST)
        self._figures = StreamFigures(metrics)
        self._log_failed = RateLimited()
        self._thread = threading.Thread(target=self._run, name="ended-streams", daemon=True)

    def start(self) -> None:
        """Begin to look at them."""
        self._thread.start()

    def add(self, stream: EndedStream) -> None:
        """Never waits."""
        if self._queue.qsize() >= MAX_QUEUED:
            self._lost.inc()
            return
        self._queue.put(stream)

    def close(self) -> None:
        """Look at what is there, then end. Idempotent."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while (stream := self._queue.get()) is not None:
            try:
                self._figures.observe(stream)
                if self.then is not None:
                    self.then(stream)
            except Exception as error:  # noqa: BLE001  one stream must not take the others along
                if self._log_failed.allow():
                    log_event(
                        logger,
                        "figures_failed",
                        stream_id=stream.stream_id,
                        level=logging.ERROR,
                        exception=error,
                    )


class StreamFigures:
    """The histograms over whole streams, by the functions that the load generator uses too."""

    def __init__(self, metrics: MetricSet) -> None:
        self._single = (
            (metrics.histogram(Metric.TTFT_COMMIT), lifetime.ttft_from_commit_s),
            (metrics.histogram(Metric.TTFT_SEGMENT), lifetime.ttft_from_last_segment_s),
            (metrics.histogram(Metric.PREFILL_QUEUE), lifetime.prefill_queue_s),
            (metrics.histogram(Metric.HANDOFF_TIME), lifetime.handoff_s),
            (metrics.histogram(Metric.DECODE_QUEUE), lifetime.decode_queue_s),
            (metrics.histogram(Metric.OVERLAP), lifetime.overlap_ratio),
        )
        self._many = (
            (metrics.histogram(Metric.INTER_TOKEN), lifetime.inter_token_s),
            (metrics.histogram(Metric.TOKENISE), lifetime.tokenise_s),
        )
        self._life = metrics.histogram(Metric.STREAM_TIME)

    def observe(self, stream: EndedStream) -> None:
        """Take every figure that the stream has."""
        entries = stream.entries
        for histogram, figure in self._single:
            value = figure(entries)
            if value is not None:
                histogram.observe(value)
        for histogram, figures in self._many:
            for value in figures(entries):
                histogram.observe(value)
        life_s = lifetime.e2e_s(entries)
        if life_s is not None:
            self._life.labels(stream.outcome).observe(life_s)
