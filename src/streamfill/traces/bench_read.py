"""How fast trace files are read: `python -m streamfill.traces.bench_read`.

Writes rows without text into a temporary file, once with a single segment each, as traces of
ordinary requests have, and once like a crawl, reads both, and prints rows per second. The last line
is `RESULT {json}`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from streamfill.messages.common import StreamMode
from streamfill.models.progress import show_progress
from streamfill.traces.contents import lengths_only
from streamfill.traces.draws import Draws
from streamfill.traces.files import TraceReader, TraceWriter
from streamfill.traces.format import SCHEMA_VERSION, Request, Segment, TraceHeader
from streamfill.traces.published import CRAWL

_NUM_DRAWN: Final = 1000
"""Drawing is slower than reading, so that these come again and again."""


def main(argv: list[str] | None = None) -> int:
    """Prints both figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000, metavar="N", help="default: 200000")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="streamfill-bench-") as folder:
        single = _rows_per_s(Path(folder) / "single.jsonl", args.rows, _single_rows())
        crawl = _rows_per_s(Path(folder) / "crawl.jsonl", args.rows, _crawl_rows())
    print(f"{single:,.0f} rows/s with one segment, {crawl:,.0f} rows/s with 1 to 17 segments")
    facts = {
        "num_rows": args.rows,
        "single_segment_rows_per_s": round(single),
        "crawl_rows_per_s": round(crawl),
    }
    print(f"RESULT {json.dumps(facts)}")
    return 0


def _single_rows() -> Iterator[Request]:
    for number in itertools.count():
        segment = Segment(num_tokens=1000 + number % 1000)
        yield Request(
            id=f"q{number}",
            arrival_ms=10.0 * number,
            mode=StreamMode.APPEND,
            segments=(segment,),
            max_output_tokens=1 + number % 500,
        )


def _crawl_rows() -> Iterator[Request]:
    drawn = itertools.islice(Draws(CRAWL, seed=0), _NUM_DRAWN)
    requests = [lengths_only(each, 16).request for each in drawn]
    for number in itertools.count():
        model = requests[number % _NUM_DRAWN]
        yield Request(
            id=f"q{number}",
            arrival_ms=250.0 * number,
            mode=StreamMode.APPEND,
            segments=model.segments,
            max_output_tokens=16,
        )


def _rows_per_s(path: Path, num_rows: int, rows: Iterator[Request]) -> float:
    header = TraceHeader(schema=SCHEMA_VERSION, name=path.stem)
    with (
        show_progress(f"Writing {path.stem}") as progress,
        TraceWriter(path, header) as writer,
    ):
        for number, request in enumerate(itertools.islice(rows, num_rows)):
            writer.add_request(request)
            if number % 10_000 == 0:
                progress(number, num_rows)
        progress(num_rows, num_rows)
    started_s = time.monotonic()
    with TraceReader(path) as reader:
        num_read = sum(1 for _ in reader)
    duration_s = time.monotonic() - started_s
    if num_read != num_rows:
        raise AssertionError(f"{num_read} of {num_rows} rows came back")
    return num_rows / duration_s


if __name__ == "__main__":
    sys.exit(main())
