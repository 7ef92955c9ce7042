"""`streamfill traces import FORMAT FILE…`: makes a trace of a file in another format."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Final, TypeVar

from streamfill.errors import ConfigError
from streamfill.models.progress import Progress, no_progress, show_progress
from streamfill.traces.importers.convert import ImportJob, import_trace
from streamfill.traces.importers.interface import (
    DEFAULT_OUTPUT_TOKENS,
    DEFAULT_PREFIX,
    DEFAULT_QUESTION,
    QUERY_PLACE,
    ImportFormat,
    ImportOptions,
    NoAnswer,
    OptionName,
    RankingTime,
)
from streamfill.traces.importers.registry import FORMATS

EnumT = TypeVar("EnumT", bound=Enum)
_DEFAULTS: Final = ImportOptions()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares one sub-command per format, with the options that it knows."""
    parser.epilog = (
        "`streamfill traces import FORMAT --help` shows the options; "
        "docs/traces_import.md how each format is mapped."
    )
    subparsers = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    for each in FORMATS:
        subparser = subparsers.add_parser(each.name, help=each.summary, description=each.summary)
        subparser.add_argument(
            "files", nargs="+", type=Path, metavar="FILE", help="file, or folder of files"
        )
        subparser.add_argument(
            "--output", type=Path, required=True, metavar="OUT", help="OUT.jsonl or OUT.jsonl.gz"
        )
        subparser.add_argument("--name", help="of the trace; default: the name of OUT")
        subparser.add_argument(
            "--seed", type=int, default=0, metavar="N", help="of all that is drawn; default: 0"
        )
        subparser.add_argument(
            "--limit", type=int, metavar="N", help="only the first N requests of the files"
        )
        subparser.add_argument(
            "--skip-bad", action="store_true", help="pass over bad rows and count them"
        )
        _add_format_options(subparser, each)


def run(args: argparse.Namespace) -> int:
    """Writes the trace, then says on the standard error what was passed over."""
    chosen = next(each for each in FORMATS if each.name == args.format)
    _check(args)
    job = ImportJob(
        format=chosen,
        paths=tuple(args.files),
        output=args.output,
        name=args.name or args.output.name.removesuffix(".gz").removesuffix(".jsonl"),
        seed=args.seed,
        limit=args.limit,
        skip_bad=args.skip_bad,
        options=_options(args),
    )
    with _bar(f"Importing {chosen.name}") as progress:
        summary = import_trace(job, progress, on_unsorted=_say_unsorted)
    documents = f" and {summary.num_documents:,} documents" if summary.num_documents else ""
    print(f"Wrote {summary.num_requests:,} requests{documents} to {args.output}.")
    for line in summary.bad_rows.summary():
        print(line, file=sys.stderr)
    return 0


def _add_format_options(parser: argparse.ArgumentParser, chosen: ImportFormat) -> None:
    rate = chosen.default_request_rate
    without = "default: the times of the file" if rate is None else f"default: {rate:g}"
    texts: dict[OptionName, dict[str, object]] = {
        OptionName.OUTPUT_TOKENS: {
            "type": int,
            "metavar": "N",
            "default": DEFAULT_OUTPUT_TOKENS,
            "help": "length of an answer that the file does not tell; default: %(default)s",
        },
        OptionName.REQUEST_RATE: {
            "type": float,
            "metavar": "R",
            "help": f"draw arrivals from a Poisson process of R per second; {without}",
        },
        OptionName.NO_ANSWER: {
            "choices": _values(NoAnswer),
            "default": NoAnswer.SKIP.value,
            "help": "rows whose answer has 0 tokens: left out, kept with 1 token, or bad rows; "
            "default: %(default)s",
        },
        OptionName.PREFIX: {
            "metavar": "TEXT",
            "default": DEFAULT_PREFIX,
            "help": "before every context",
        },
        OptionName.QUESTION: {
            "metavar": "TEXT",
            "default": DEFAULT_QUESTION,
            "help": f"behind the context; {QUERY_PLACE} stands for the question",
        },
        OptionName.CORPUS: {
            "type": Path,
            "nargs": "+",
            "default": [],
            "metavar": "JSON",
            "help": "document id to text, in one or more parts; default: found beside FILE",
        },
        OptionName.QUERIES: {
            "type": Path,
            "metavar": "JSON",
            "help": "query id to query and trace_file; default: found beside FILE",
        },
        OptionName.RANKING_TIME: {
            "choices": _values(RankingTime),
            "default": RankingTime.END.value,
            "help": "a ranking is there when its time window ends, as in the published replay, "
            "or starts; default: %(default)s",
        },
    }
    for option, settings in texts.items():
        if option in chosen.options:
            parser.add_argument(option.value, **settings)  # type: ignore[arg-type]


def _options(args: argparse.Namespace) -> ImportOptions:
    """What was said; the default for what this format does not know."""
    given = vars(args)
    return ImportOptions(
        output_tokens=given.get("output_tokens", _DEFAULTS.output_tokens),
        request_rate=given.get("request_rate"),
        no_answer=NoAnswer(given.get("no_answer", _DEFAULTS.no_answer)),
        prefix=given.get("prefix", _DEFAULTS.prefix),
        question=given.get("question", _DEFAULTS.question),
        corpus=tuple(given.get("corpus", ())),
        queries=given.get("queries"),
        ranking_time=RankingTime(given.get("ranking_time", _DEFAULTS.ranking_time)),
    )


def _check(args: argparse.Namespace) -> None:
    given = vars(args)
    for option, least in (("limit", 1), ("output_tokens", 1)):
        value = given.get(option)
        if value is not None and value < least:
            key = f"--{option.replace('_', '-')}"
            raise ConfigError(key, value, f"must be at least {least}")
    rate = given.get("request_rate")
    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigError(OptionName.REQUEST_RATE.value, rate, "must be above 0")
    question = given.get("question")
    if question is not None and QUERY_PLACE not in question:
        raise ConfigError(OptionName.QUESTION.value, question, f"must contain {QUERY_PLACE}")
    output: Path = args.output
    if not output.parent.is_dir():
        raise ConfigError("--output", str(output), f"there is no folder {output.parent}")
    if output.is_dir() or ".jsonl" not in output.suffixes:
        raise ConfigError("--output", str(output), "must be a file, .jsonl or .jsonl.gz")
    for path in args.files:
        if path.exists() and output.exists() and path.samefile(output):
            raise ConfigError("--output", str(output), "is a file that is imported; name another")


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Progress]:
    if sys.stderr.isatty():
        with show_progress(title) as progress:
            yield progress
    else:
        yield no_progress


def _say_unsorted() -> None:
    print(
        "The requests are not in the order of their arrival; reading again to sort them.",
        file=sys.stderr,
    )


def _values(kind: type[EnumT]) -> list[str]:
    return [each.value for each in kind]
