"""Stream2LLM's ANNS traces: one CSV file per query with the rankings that a vector search went
through, a corpus, and a map from queries to files.

Source: rajveerb/stream2llm and its data set, "Stream2LLM" (MLSys 2026), whose folder ``anns`` has
``res/*.csv``, ``retrieved_corpus_content.part.*.json`` and ``query_trace_map_5k.json``. Each row of
a CSV file is a time window with the same ranking; Stream2LLM's replay sends a ranking when its
window ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamfill.messages.common import StreamMode
from streamfill.traces.format import Document, Request, Segment
from streamfill.traces.importers.anns_inputs import (
    AnnsQuery,
    find_inputs,
    read_corpus,
    read_queries,
)
from streamfill.traces.importers.bad_rows import ABSENT, BadRows, Place, Problem, each_made
from streamfill.traces.importers.csv_rows import CsvRow, read_csv
from streamfill.traces.importers.interface import (
    QUERY_PLACE,
    ImportFormat,
    ImportOptions,
    OptionName,
    RankingTime,
    Record,
)
from streamfill.traces.importers.source_files import ReadProgress

_NAME: Final = "stream2llm-anns"
_START: Final = "StartTime_us"
_END: Final = "EndTime_us"
_POOL: Final = "PipelinePool"
_POOL_FORM: Final = re.compile(r"\(\s*(\d+(?:\s*,\s*\d+)*)?\s*\)")
_US_PER_MS: Final = 1000.0


@dataclass(frozen=True, kw_only=True)
class _Window:
    """A time in which the ranking stayed the same."""

    start_us: float
    end_us: float
    document_ids: tuple[str, ...]


def read_anns(
    paths: tuple[Path, ...], options: ImportOptions, bad_rows: BadRows, progress: ReadProgress
) -> Iterator[Record]:
    """One request per query, with its documents before it; see `interface.ReadRecords`."""
    inputs = find_inputs(paths, options)
    queries = read_queries(inputs, bad_rows)
    progress.expect(inputs.corpus)
    progress.expect(query.trace for query in queries)
    corpus = read_corpus(inputs.corpus, progress)
    written: set[str] = set()

    def make(query: AnnsQuery) -> Request:
        # The rows of a query belong together: one bad row spoils it.
        rows = read_csv(query.trace, (_START, _END, _POOL), BadRows(is_skipping=False), progress)
        return _request(query, [_window(row, corpus) for row in rows], options)

    for request in each_made(queries, make, bad_rows):
        for segment in request.segments:
            for document_id in segment.document_ids or ():
                if document_id not in written:
                    written.add(document_id)
                    yield Document(id=document_id, text=corpus[document_id])
        yield request


def _window(row: CsvRow, corpus: dict[str, str]) -> _Window:
    start_us, end_us = row.number(_START), row.number(_END)
    if end_us < start_us:
        raise row.error(Problem.BAD_TIME, _END, end_us, f"is before {_START}, {start_us:g}")
    pool = row.text(_POOL)
    match = _POOL_FORM.fullmatch(pool.strip())
    if match is None:
        raise row.error(
            Problem.BAD_RANKING, _POOL, pool, "must be document ids in brackets, such as (7,12,3)"
        )
    document_ids = tuple(re.findall(r"\d+", match[1] or ""))
    for document_id in document_ids:
        if document_id not in corpus:
            raise row.error(
                Problem.UNKNOWN_DOCUMENT, _POOL, document_id, "is no document of the corpus"
            )
    return _Window(start_us=start_us, end_us=end_us, document_ids=document_ids)


def _request(query: AnnsQuery, windows: list[_Window], options: ImportOptions) -> Request:
    windows = sorted(windows, key=lambda window: window.start_us)
    segments: list[Segment] = []
    reached_us = windows[0].start_us if windows else 0.0
    last: tuple[str, ...] = ()
    for window in windows:
        # No document is no ranking, and the same ranking again is no news.
        if window.document_ids == last:
            continue
        last = window.document_ids
        if not last:
            continue
        is_at_end = options.ranking_time is RankingTime.END
        there_us = max(reached_us, window.end_us if is_at_end else window.start_us)
        segments.append(Segment(delay_ms=_ms(there_us - reached_us), document_ids=last))
        reached_us = there_us
    if not segments:
        raise Place(query.trace).error(
            Problem.NO_CONTENT, _POOL, ABSENT, "names no document in any row"
        )
    end_us = max(window.end_us for window in windows)
    return Request(
        id=query.id,
        arrival_ms=0.0,
        mode=StreamMode.UPDATE,
        segments=tuple(segments),
        prefix=options.prefix,
        suffix=options.question.replace(QUERY_PLACE, query.text),
        commit_delay_ms=_ms(max(0.0, end_us - reached_us)),
        max_output_tokens=options.output_tokens,
    )


def _ms(duration_us: float) -> float:
    return round(duration_us / _US_PER_MS, 3)


FORMAT: Final = ImportFormat(
    name=_NAME,
    summary="Stream2LLM's ANNS CSV files, with --corpus and --queries, or their folder",
    source="Stream2LLM ANNS traces, github.com/rajveerb/stream2llm",
    read=read_anns,
    options=frozenset(
        {
            OptionName.REQUEST_RATE,
            OptionName.OUTPUT_TOKENS,
            OptionName.PREFIX,
            OptionName.QUESTION,
            OptionName.CORPUS,
            OptionName.QUERIES,
            OptionName.RANKING_TIME,
        }
    ),
    default_request_rate=1.0,
)
