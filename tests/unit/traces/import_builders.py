"""Files in the published formats, and one call that imports them and reads the result again."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamfill.traces.files import TraceReader
from streamfill.traces.format import Request, TraceHeader
from streamfill.traces.importers.bad_rows import BadRows
from streamfill.traces.importers.convert import ImportJob, import_trace
from streamfill.traces.importers.interface import ImportOptions
from streamfill.traces.importers.registry import FORMATS
from streamfill.traces.script import Script, Scripts

VOCABULARY = 49152


@dataclass(frozen=True)
class Imported:
    """A trace that was imported, as a reader sees it."""

    header: TraceHeader
    requests: list[Request]
    scripts: list[Script]
    documents: dict[str, str]
    bad_rows: BadRows
    was_sorted: bool


def import_files(
    name: str,
    *paths: Path,
    options: ImportOptions | None = None,
    skip_bad: bool = False,
    limit: int | None = None,
    seed: int = 0,
) -> Imported:
    """Imports the files and reads the trace back through the whole path that a replay takes."""
    output = paths[0].parent / f"imported-{name}.jsonl"
    summary = import_trace(
        ImportJob(
            format=next(each for each in FORMATS if each.name == name),
            paths=paths,
            output=output,
            name="test",
            seed=seed,
            limit=limit,
            skip_bad=skip_bad,
            options=options or ImportOptions(),
        )
    )
    with TraceReader(output) as reader:
        requests = list(reader)
        scripts = Scripts(reader.header, reader.documents, vocab_size=VOCABULARY)
        imported = Imported(
            header=reader.header,
            requests=requests,
            scripts=[scripts.script(request) for request in requests],
            documents=dict(reader.documents),
            bad_rows=summary.bad_rows,
            was_sorted=summary.was_sorted,
        )
    assert len(imported.requests) == summary.num_requests
    return imported


def write_lines(path: Path, *lines: str, end: str = "\n") -> Path:
    """A text file of these lines; the last one has no end, as in Azure's files."""
    path.write_bytes(end.join(lines).encode())
    return path


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    """A CSV file with the quoting of pandas."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    return path


def write_json(path: Path, *records: Any) -> Path:
    """A JSON Lines file."""
    return write_lines(path, *(json.dumps(record) for record in records))
