"""Stream2LLM's crawler traces: one CSV file per query, one row per search and per page.

Source: rajveerb/stream2llm and its data set, "Stream2LLM" (MLSys 2026). A row's content is there at
its ``endTime``, in seconds. Stream2LLM replays a query as this importer maps it: pages in the order
of their end times, the question with the last one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from streamfill.messages.common import StreamMode
from streamfill.traces.format import Request, Segment
from streamfill.traces.importers.bad_rows import ABSENT, BadRows, Place, Problem, each_made
from streamfill.traces.importers.csv_rows import CsvRow, read_csv
from streamfill.traces.importers.interface import (
    QUERY_PLACE,
    ImportFormat,
    ImportOptions,
    OptionName,
    Record,
)
from streamfill.traces.importers.source_files import ReadProgress, find_files

_NAME: Final = "stream2llm-crawler"
_SEARCH: Final = "tavily_search"
_TYPES: Final = (_SEARCH, "page_scrape")
_COLUMNS: Final = ("type", "query", "content", "startTime", "endTime")
_MS_PER_S: Final = 1000.0
_SEPARATOR: Final = "\n"
"""Behind each page, as in Stream2LLM's replay."""


@dataclass(frozen=True, kw_only=True)
class _Event:
    """One search or one page."""

    content: str
    start_s: float
    end_s: float


def read_crawler(
    paths: tuple[Path, ...], options: ImportOptions, bad_rows: BadRows, progress: ReadProgress
) -> Iterator[Record]:
    """One request per file; see `interface.ReadRecords`."""
    files = find_files(paths, "query_*.csv")
    progress.expect(files)
    names: set[str] = set()

    def make(path: Path) -> Request:
        name = _name(path)
        if name in names:
            raise Place(path).error(Problem.DUPLICATE, "name", name, "another file is called so")
        names.add(name)
        # The rows of a query belong together: one bad row spoils the file.
        rows = list(read_csv(path, _COLUMNS, BadRows(is_skipping=False), progress))
        events = [_event(row) for row in rows if not _is_unfinished(row)]
        return _request(path, _query(path, rows), events, options)

    return each_made(files, make, bad_rows)


def _name(path: Path) -> str:
    return path.name.partition(".")[0]


def _is_unfinished(row: CsvRow) -> bool:
    """Whether it is of a page that never came: neither content nor an end."""
    return not row.text("content").strip() and not row.text("endTime").strip()


def _query(path: Path, rows: list[CsvRow]) -> str:
    """The question; searches know it best."""
    given = [(row.text("type") != _SEARCH, row.text("query").strip()) for row in rows]
    queries = sorted((pair for pair in given if pair[1]), key=lambda pair: pair[0])
    if not queries:
        raise Place(path).error(
            Problem.MISSING, "query", ABSENT, "no row has one; the search row must"
        )
    return queries[0][1]


def _event(row: CsvRow) -> _Event:
    kind = row.text("type")
    if kind not in _TYPES:
        raise row.error(Problem.WRONG_TYPE, "type", kind, f"must be one of {', '.join(_TYPES)}")
    event = _Event(
        content=row.text("content"),
        start_s=row.number("startTime"),
        end_s=row.number("endTime"),
    )
    if event.end_s < event.start_s:
        raise row.error(
            Problem.BAD_TIME, "endTime", event.end_s, f"is before startTime, {event.start_s:g}"
        )
    return event


def _request(path: Path, query: str, events: list[_Event], options: ImportOptions) -> Request:
    events = sorted(events, key=lambda event: event.end_s)
    segments: list[Segment] = []
    reached_s = min((event.start_s for event in events), default=0.0)
    for number, event in enumerate(events):
        is_last = number == len(events) - 1
        has_content = bool(event.content.strip())
        # The last row ends the retrieval even without content: the question arrives then.
        if not has_content and not (is_last and segments):
            continue
        segments.append(
            Segment(
                delay_ms=round((event.end_s - reached_s) * _MS_PER_S, 3),
                text=event.content + _SEPARATOR if has_content else "",
            )
        )
        reached_s = event.end_s
    if not segments:
        raise Place(path).error(Problem.NO_CONTENT, "content", ABSENT, "is empty in all rows")
    return Request(
        id=_name(path),
        arrival_ms=0.0,
        mode=StreamMode.APPEND,
        segments=tuple(segments),
        prefix=options.prefix,
        suffix=options.question.replace(QUERY_PLACE, query),
        max_output_tokens=options.output_tokens,
    )


FORMAT: Final = ImportFormat(
    name=_NAME,
    summary="Stream2LLM's crawler CSV files query_<id>.csv, or their folder",
    source="Stream2LLM crawler traces, github.com/rajveerb/stream2llm",
    read=read_crawler,
    options=frozenset(
        {
            OptionName.REQUEST_RATE,
            OptionName.OUTPUT_TOKENS,
            OptionName.PREFIX,
            OptionName.QUESTION,
        }
    ),
    default_request_rate=1.0,
)
