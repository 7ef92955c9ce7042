"""`streamfill bench report`: draws the page of runs that were saved with their records."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path

from streamfill.errors import ConfigError
from streamfill.loadgen.goodput import Goodput
from streamfill.loadgen.metrics import summarise
from streamfill.loadgen.report import write_report
from streamfill.loadgen.report.loads import renumbered
from streamfill.loadgen.run_file import SavedRun, read_records
from streamfill.models.progress import no_progress, show_progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    parser.add_argument(
        "files",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="files of records, *.records.jsonl.gz, or the files of figures beside them",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        metavar="PAGE",
        help="the page; default: report.html",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page and says where it is."""
    saved = _read(args.files)
    results = renumbered(each.result for each in saved)
    goodputs: list[Goodput | None] = [each.goodput for each in saved]
    summaries = [
        summarise(result, goodput) for result, goodput in zip(results, goodputs, strict=True)
    ]
    newest = saved[-1]
    remarks = []
    if any(each.environment != newest.environment for each in saved):
        remarks.append(
            "The runs were made in different environments; the table shows that of the last one."
        )
    write_report(
        args.output,
        results,
        summaries,
        newest.environment,
        config=newest.config,
        remarks=remarks,
        option="--output",
    )
    print(f"{args.output}: {len(results)} runs")
    facts = {"output": args.output.name, "num_runs": len(results), "labels": _labels(saved)}
    print(f"RESULT {json.dumps(facts)}", flush=True)
    return 0


def _read(files: list[Path]) -> list[SavedRun]:
    saved: list[SavedRun] = []
    # On a terminal only: reading takes a moment, and the page is all that is wanted.
    shown = sys.stderr.isatty()
    title = "Reading records"
    with show_progress(title) if shown else contextlib.nullcontext(no_progress) as progress:
        for number, file in enumerate(files):
            progress(number, len(files))
            saved += read_records(file)
        progress(len(files), len(files))
    if not saved:
        raise ConfigError("FILE", str(files[0]), "holds no runs; name another file")
    return saved


def _labels(saved: list[SavedRun]) -> list[str]:
    return list(dict.fromkeys(each.result.label for each in saved))
