"""Runs an importer and writes its requests as a trace file.

1. The records are read and written one by one, and nothing is kept.
2. If a request arrives before the one above it, the half-written file is dropped: all are read
   again, kept, and sorted.
3. Arrivals count from the first request. For files without arrival times they are drawn.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from streamfill.errors import TraceError
from streamfill.models.progress import Progress, no_progress
from streamfill.traces.files import TraceWriter
from streamfill.traces.format import SCHEMA_VERSION, Document, Request, TraceHeader
from streamfill.traces.importers.bad_rows import BadRows
from streamfill.traces.importers.interface import ImportFormat, ImportOptions, Record
from streamfill.traces.importers.source_files import ReadProgress

_ARRIVAL_DIGITS: Final = 4
"""Of milliseconds, that is 100 ns: the finest of the formats."""
_MS_PER_S: Final = 1000.0


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """What is to be imported, and how.

    Attributes:
        name: of the trace.
        seed: of drawn arrivals, and of the tokens behind lengths.
        limit: at most so many requests, from the start of the files.
        skip_bad: count bad rows instead of ending at the first.
    """

    format: ImportFormat
    paths: tuple[Path, ...]
    output: Path
    name: str
    seed: int = 0
    limit: int | None = None
    skip_bad: bool = False
    options: ImportOptions = field(default_factory=ImportOptions)


@dataclass(frozen=True, kw_only=True)
class ImportSummary:
    """What came of it."""

    num_requests: int
    num_documents: int
    was_sorted: bool
    """Whether the requests had to be put in the order of their arrival."""
    bad_rows: BadRows


class _UnsortedError(Exception):
    """A request arrives before the one above it."""


def import_trace(
    job: ImportJob,
    progress: Progress = no_progress,
    on_unsorted: Callable[[], None] = lambda: None,
) -> ImportSummary:
    """Writes ``job.output``.

    Args:
        on_unsorted: called when the files turn out not to be in the order of arrival.

    Raises:
        TraceError: the files cannot be used, have no request, or the output cannot be written.
        BadRowError: a bad row, unless they are skipped.
    """
    read_progress = ReadProgress(progress)
    with contextlib.suppress(_UnsortedError):
        return _run(job, read_progress, must_sort=False)
    on_unsorted()
    read_progress.restart()
    return _run(job, read_progress, must_sort=True)


def _run(job: ImportJob, progress: ReadProgress, *, must_sort: bool) -> ImportSummary:
    bad_rows = BadRows(is_skipping=job.skip_bad)
    records = _limited(job.format.read(job.paths, job.options, bad_rows, progress), job.limit)
    rate = job.format.rate(job.options)
    if rate is not None:
        records = _with_drawn_arrivals(records, rate, job.seed)
    elif must_sort:
        records = _sorted_by_arrival(records)
    num_requests = num_documents = 0
    with TraceWriter(job.output, _header(job, rate)) as writer:
        for record in _from_first_arrival(records):
            if isinstance(record, Document):
                writer.add_document(record)
                num_documents += 1
            else:
                writer.add_request(record)
                num_requests += 1
        if num_requests == 0:
            names = ", ".join(str(path) for path in job.paths)
            why = "; ".join(line.strip() for line in bad_rows.summary())
            raise TraceError(f"{names}: no request, so nothing is written. {why}".rstrip())
    return ImportSummary(
        num_requests=num_requests,
        num_documents=num_documents,
        was_sorted=must_sort,
        bad_rows=bad_rows,
    )


def _header(job: ImportJob, rate: float | None) -> TraceHeader:
    names = [path.name for path in job.paths]
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    drawn = {} if rate is None else {"arrival_ms": f"Poisson process, {rate:g} per second"}
    return TraceHeader(
        schema=SCHEMA_VERSION,
        name=job.name,
        description=f"imported from {job.format.name}",
        source=f"{job.format.source}: {shown}",
        drawn=drawn,
        seed=job.seed,
    )


def _limited(records: Iterator[Record], limit: int | None) -> Iterator[Record]:
    if limit is None:
        yield from records
        return
    num_left = limit
    for record in records:
        yield record
        num_left -= isinstance(record, Request)
        if num_left == 0:
            return


def _with_drawn_arrivals(records: Iterable[Record], rate: float, seed: int) -> Iterator[Record]:
    draw = random.Random(seed)
    arrival_ms = 0.0
    for record in records:
        if isinstance(record, Request):
            yield msgspec.structs.replace(record, arrival_ms=arrival_ms)
            arrival_ms += draw.expovariate(rate) * _MS_PER_S
        else:
            yield record


def _sorted_by_arrival(records: Iterable[Record]) -> Iterator[Record]:
    kept = list(records)
    documents = [record for record in kept if isinstance(record, Document)]
    requests = [record for record in kept if isinstance(record, Request)]
    requests.sort(key=lambda request: request.arrival_ms)
    return itertools.chain(documents, requests)


def _from_first_arrival(records: Iterable[Record]) -> Iterator[Record]:
    origin_ms: float | None = None
    last_ms = 0.0
    for record in records:
        if isinstance(record, Request):
            if origin_ms is None:
                origin_ms = record.arrival_ms
            arrival_ms = round(record.arrival_ms - origin_ms, _ARRIVAL_DIGITS)
            if arrival_ms < last_ms:
                raise _UnsortedError
            last_ms = arrival_ms
            if arrival_ms != record.arrival_ms:
                yield msgspec.structs.replace(record, arrival_ms=arrival_ms)
                continue
        yield record
