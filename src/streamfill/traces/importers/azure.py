"""Azure's LLM inference traces: CSV of arrival times and token counts.

Source: Azure/AzurePublicDataset, `AzureLLMInferenceDataset2023.md` (times with seven digits of a
second and no time zone) and `AzureLLMInferenceDataset2024.md` (with a time zone); the 2025 files
have ``NumImages`` too, which is not used.
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
from streamfill.traces.importers.timestamps import NS_PER_MS, TimestampParser

_NAME: Final = "azure"
_TIME: Final = "TIMESTAMP"
_PROMPT: Final = "ContextTokens"
_ANSWER: Final = "GeneratedTokens"


def read_azure(
    paths: tuple[Path, ...], options: ImportOptions, bad_rows: BadRows, progress: ReadProgress
) -> Iterator[Record]:
    """One request per row; see `interface.ReadRecords`."""
    files = find_files(paths, "*.csv")
    progress.expect(files)
    requests = LengthRequests(_NAME, options, bad_rows)
    parser = TimestampParser()
    # Milliseconds since 1970 would lose the last digits as a float.
    origin_ns: int | None = None

    def make(row: CsvRow) -> Request | None:
        nonlocal origin_ns
        text = row.text(_TIME)
        try:
            time_ns = parser.parse_ns(text)
        except ValueError:
            raise row.error(
                Problem.BAD_TIME, _TIME, text, "must be a time such as 2023-11-16 18:15:46.6805900"
            ) from None
        if origin_ns is None:
            origin_ns = time_ns
        return requests.request(
            row,
            arrival_ms=(time_ns - origin_ns) / NS_PER_MS,
            segment=Segment(num_tokens=row.whole_number(_PROMPT, at_least=1)),
            num_output_tokens=row.whole_number(_ANSWER),
            output_column=_ANSWER,
        )

    for path in files:
        rows = read_csv(path, (_TIME, _PROMPT, _ANSWER), bad_rows, progress)
        yield from each_made(rows, make, bad_rows)


FORMAT: Final = ImportFormat(
    name=_NAME,
    summary="Azure's LLM inference CSV of 2023 and 2024: arrival times and lengths",
    source="Azure LLM inference traces, github.com/Azure/AzurePublicDataset",
    read=read_azure,
    options=frozenset({OptionName.NO_ANSWER}),
)
