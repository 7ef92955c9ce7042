"""Writes the log from a thread of its own, so that the router's loop never waits for a disk.

1. The loop numbers a record and puts it into a queue.
2. The thread takes all that is there and writes it with one statement (group commit): while one
   batch is written, the next one gathers. A quiet router's records are written one by one.
3. The loop hears up to where records are durable, and calls who waits for it: acknowledgements and
   tokens leave the router only then.

A file that cannot be written, as on a full disk, is given up: it is removed, since it is not the
truth any more, the router says so loudly, and goes on in memory. Everybody who waits goes on at
once. A later log is another writer's.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from router.recovery.interface import Ticket
from router.recovery.log_file import LogFile, Row
from streamfill.observability.logging import log_event
from streamfill.observability.metric_values import MetricSet, Sample
from streamfill.observability.metrics import Metric

logger = logging.getLogger(__name__)

MAX_BATCH: Final = 4096
"""Things written before the loop hears of it."""
SHRINK_EVERY_S: Final = 5.0
"""Space of ended streams is looked at so often."""
CLOSE_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class _Work:
    ticket: Ticket
    at_s: float
    rows: tuple[Row, ...] = ()
    delete: Sequence[int] = ()
    """Row ids; together with `rows` at one moment."""
    fact: tuple[str, str] | None = None
    """About the whole file: its name and value."""


class LogMetrics:
    """What is counted about the log. Counted by its thread, and by the loop."""

    def __init__(self, metrics: MetricSet) -> None:
        self.records = metrics.counter(Metric.LOG_RECORDS)
        self.num_bytes = metrics.counter(Metric.LOG_BYTES)
        self.failures = metrics.counter(Metric.LOG_FAILURES)
        self.delay = metrics.histogram(Metric.LOG_DELAY)
        self.restored = metrics.counter(Metric.STREAMS_RESTORED)
        self.resumed = metrics.counter(Metric.STREAMS_RESUMED)
        self.file_bytes = 0
        self.is_on = False
        metrics.add_source(self._samples)

    def _samples(self) -> Iterator[Sample]:
        yield Sample(Metric.LOG_ON, self.is_on)
        yield Sample(Metric.LOG_FILE_BYTES, self.file_bytes)


class LogWriter:
    """Implements `interface.StreamLog`. Owned by the loop that calls `start`."""

    def __init__(self, file: LogFile, metrics: LogMetrics) -> None:
        """
        Args:
            file: open; its own from now on.
            metrics: of the router.
        """
        self._file = file
        self._metrics = metrics
        self._loop: asyncio.AbstractEventLoop | None = None
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="stream-log", daemon=True)
        self._row_ids: dict[int, array[int]] = {}
        self._next_row_id = 1
        self._last_ticket = 0
        self._durable_ticket = 0
        self._waiting: deque[tuple[Ticket, Callable[[], None]]] = deque()
        self._failed = False
        self._shrink_due_s = 0.0

    def start(self, row_ids: Mapping[int, Iterable[int]]) -> None:
        """Begin to write.

        Args:
            row_ids: of the rows that the file has already, by stream.
        """
        self._loop = asyncio.get_running_loop()
        self._row_ids = {stream_id: array("q", ids) for stream_id, ids in row_ids.items()}
        newest = max((max(ids) for ids in self._row_ids.values() if ids), default=0)
        self._next_row_id = newest + 1
        self._metrics.is_on = True
        self._thread.start()

    def close(self) -> None:
        """Write what is there, then end. Blocks for at most `CLOSE_TIMEOUT_S`. Idempotent."""
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)
        if not self._thread.is_alive():
            self._file.close()

    @property
    def has_failed(self) -> bool:
        """Whether the router goes on in memory."""
        return self._failed

    def append(self, stream_id: int, record: bytes) -> Ticket:
        """See `interface.StreamLog`."""
        if self._failed:
            return Ticket(self._last_ticket)
        row = self._new_row(stream_id, record)
        self._row_ids.setdefault(stream_id, array("q")).append(row.row_id)
        return self._put((row,), ())

    def rewrite(self, stream_id: int, records: Sequence[bytes]) -> Ticket:
        """See `interface.StreamLog`."""
        if self._failed:
            return Ticket(self._last_ticket)
        old = self._row_ids.pop(stream_id, array("q"))
        rows = tuple(self._new_row(stream_id, record) for record in records)
        self._row_ids[stream_id] = array("q", (row.row_id for row in rows))
        return self._put(rows, old)

    def forget(self, stream_id: int) -> None:
        """See `interface.StreamLog`."""
        old = self._row_ids.pop(stream_id, None)
        if old is not None and not self._failed:
            self._put((), old)

    def remove(self, row_ids: Sequence[int]) -> None:
        """Remove rows that belong to no stream."""
        if row_ids and not self._failed:
            # New rows are written before old ones go.
            self._next_row_id = max(self._next_row_id, max(row_ids) + 1)
            self._put((), row_ids)

    def note(self, name: str, value: str) -> Ticket:
        """Write a fact about the whole file, in the place of an older one of this name."""
        return Ticket(self._last_ticket) if self._failed else self._put((), (), (name, value))

    def when_durable(self, ticket: Ticket, then: Callable[[], None]) -> None:
        """See `interface.StreamLog`."""
        if self._failed or ticket <= self._durable_ticket:
            then()
        else:
            self._waiting.append((ticket, then))

    def _new_row(self, stream_id: int, record: bytes) -> Row:
        row = Row(self._next_row_id, stream_id, record)
        self._next_row_id += 1
        return row

    def _put(
        self, rows: tuple[Row, ...], delete: Sequence[int], fact: tuple[str, str] | None = None
    ) -> Ticket:
        self._last_ticket += 1
        ticket = Ticket(self._last_ticket)
        self._queue.put(_Work(ticket, time.monotonic(), rows, delete, fact))
        return ticket

    # In the loop, told by the thread.

    def _on_durable(self, ticket: Ticket) -> None:
        self._durable_ticket = ticket
        waiting = self._waiting
        while waiting and waiting[0][0] <= ticket:
            _, then = waiting.popleft()
            try:
                then()
            except Exception as error:  # noqa: BLE001  one stream must not take the others along
                log_event(logger, "log_waiter_failed", level=logging.ERROR, exception=error)

    def _on_failed(self, error: Exception, is_gone: bool) -> None:
        self._failed = True
        self._row_ids.clear()
        remedy = "make room on the disk; a log of streams that are opened then begins again"
        if not is_gone:
            remedy = (
                f"remove {self._file.path}, which this router cannot, before another one starts: "
                "it would go on with streams as they were now"
            )
        log_event(
            logger,
            "stream_log_failed",
            level=logging.ERROR,
            error=str(error),
            consequence="going on in memory: open streams do not outlive this router process",
            remedy=remedy,
        )
        self._on_durable(Ticket(self._last_ticket))

    # In the thread.

    def _run(self) -> None:
        try:
            while (work := self._next_works()) is not None:
                self._write(work)
                self._tell(self._on_durable, work[-1].ticket)
        except Exception as error:  # noqa: BLE001  the edge of the thread; the loop is told
            self._metrics.failures.inc()
            self._metrics.is_on = False
            self._metrics.file_bytes = 0
            is_gone = self._file.remove()
            self._tell(self._on_failed, error, is_gone)

    def _next_works(self) -> list[_Work] | None:
        """All that is there, at least one; None at the end."""
        first = self._queue.get()
        if first is None:
            return None
        works = [first]
        while len(works) < MAX_BATCH:
            try:
                work = self._queue.get_nowait()
            except queue.Empty:
                return works
            if work is None:
                self._queue.put(None)  # for the next turn
                return works
            works.append(work)
        return works

    def _write(self, works: Sequence[_Work]) -> None:
        rows: list[Row] = []
        delete: list[int] = []
        for work in works:
            if work.rows and work.delete:
                self._file.insert(rows)
                rows = []
                self._file.replace(work.delete, work.rows)
            else:
                rows.extend(work.rows)
                delete.extend(work.delete)
            if work.fact is not None:
                self._file.set_meta(*work.fact)
            self._metrics.records.inc(len(work.rows))
            self._metrics.num_bytes.inc(sum(len(row.body) for row in work.rows))
        self._file.insert(rows)
        self._file.delete(delete)
        now_s = time.monotonic()
        self._metrics.delay.observe(now_s - works[0].at_s)
        if now_s >= self._shrink_due_s:
            self._shrink_due_s = now_s + SHRINK_EVERY_S
            self._metrics.file_bytes = self._file.shrink()

    def _tell(self, what: Callable[..., None], *about: object) -> None:
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(what, *about)
