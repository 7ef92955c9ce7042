"""BurstGPT: CSV of the token counts of requests to a university's GPT services.

Source: HPMLL/BurstGPT, "BurstGPT: A Real-World Workload Dataset to Optimize LLM Serving Systems"
(KDD 2025). The first two files have six columns; the third has ``Session ID`` and ``Elapsed time``
too. A response of 0 tokens is a request that failed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from streamfill.traces.format import Request, Segment
from streamfill.traces.importers.bad_rows import BadRows, Problem, each_made
from streamfill.traces.importers.csv_rows import CsvRow, read_csv
from streamfill.traces.importers.interface import ImportFormat, ImportOptions, OptionName, Record
from streamfill.traces.importers.lengths import LengthRequests
from streamfill.traces.importers.source_files import ReadProgress, find_files

_NAME: Final = "burstgpt"
_TIME: Final = "Timestamp"
_PROMPT: Final = "Request tokens"
_ANSWER: Final = "Response tokens"
_SESSION: Final = "Session ID"
_MS_PER_S: Final = 1000.0


def read_burstgpt(
    paths: tuple[Path, ...], options: ImportOptions, bad_rows: BadRows, progress: ReadProgress
) -> Iterator[Record]:
    """One request per row; see `interface.ReadRecords`."""
    files = find_files(paths, "*.csv")
    progress.expect(files)
    requests = LengthRequests(_NAME, options, bad_rows)

    def make(row: CsvRow) -> Request | None:
        time_s = row.number(_TIME)
        if time_s < 0:
            raise row.error(Problem.BAD_TIME, _TIME, time_s, "must not be negative")
        return requests.request(
            row,
            arrival_ms=time_s * _MS_PER_S,
            segment=Segment(num_tokens=row.whole_number(_PROMPT, at_least=1)),
            num_output_tokens=row.whole_number(_ANSWER),
            output_column=_ANSWER,
            session_id=row.text(_SESSION) or None,
        )

    for path in files:
        rows = read_csv(path, (_TIME, _PROMPT, _ANSWER), bad_rows, progress)
        yield from each_made(rows, make, bad_rows)


FORMAT: Final = ImportFormat(
    name=_NAME,
    summary="BurstGPT's CSV: arrival times and lengths",
    source="BurstGPT, github.com/HPMLL/BurstGPT",
    read=read_burstgpt,
    options=frozenset({OptionName.NO_ANSWER}),
)
