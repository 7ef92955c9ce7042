"""What an importer of a foreign trace format is, and what it can be told."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from streamfill.traces.format import Document, Request
from streamfill.traces.importers.bad_rows import BadRows
from streamfill.traces.importers.source_files import ReadProgress

DEFAULT_OUTPUT_TOKENS: Final = 64
"""Length of an answer where neither the file nor the user says one."""
DEFAULT_PREFIX: Final = "Use the following documents to answer the question behind them.\n\n"
DEFAULT_QUESTION: Final = "\nQuestion: {query}\nAnswer:"
QUERY_PLACE: Final = "{query}"
"""Stands for the question in ``ImportOptions.question``."""


class Arrivals(enum.Enum):
    """Where the arrival times of the requests come from."""

    FILE = "file"
    DRAWN = "drawn"
    """A Poisson process; the requests stay in the order of the files."""


class NoAnswer(enum.Enum):
    """What becomes of a row whose answer has no token; BurstGPT's failed requests are such rows."""

    SKIP = "skip"
    """Left out and counted."""
    KEEP = "keep"
    """One token is generated: the prompt was sent, and costs what it costs."""
    ERROR = "error"
    """It is a bad row."""


class RankingTime(enum.Enum):
    """When a ranking of Stream2LLM's ANNS traces is there."""

    END = "end"
    """When its time window ends, as in the replay that Stream2LLM published."""
    START = "start"
    """When its time window starts: that is when the search found it."""


class OptionName(enum.Enum):
    """What can be said to some importers and not to others; the values are command line options."""

    OUTPUT_TOKENS = "--output-tokens"
    REQUEST_RATE = "--request-rate"
    NO_ANSWER = "--no-answer"
    PREFIX = "--prefix"
    QUESTION = "--question"
    CORPUS = "--corpus"
    QUERIES = "--queries"
    RANKING_TIME = "--ranking-time"


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the user said; each importer looks at those that its ``options`` name.

    Attributes:
        output_tokens: length of an answer that the file does not tell.
        request_rate: requests per second of drawn arrivals; None leaves the choice to the importer.
        prefix: text before every context.
        question: text behind the context; ``{query}`` stands for the question.
        corpus: JSON files, document id → text; none: looked for beside the traces.
        queries: JSON file, query id → query and trace file; None: looked for beside the traces.
    """

    output_tokens: int = DEFAULT_OUTPUT_TOKENS
    request_rate: float | None = None
    no_answer: NoAnswer = NoAnswer.SKIP
    prefix: str = DEFAULT_PREFIX
    question: str = DEFAULT_QUESTION
    corpus: tuple[Path, ...] = field(default=())
    queries: Path | None = None
    ranking_time: RankingTime = RankingTime.END


Record: TypeAlias = Document | Request


class ReadRecords(Protocol):
    """Reads the files of one format.

    Called once per pass by `convert`, which may ask for a second pass over the same files. The
    generator may be closed before its end.
    """

    def __call__(
        self,
        paths: tuple[Path, ...],
        options: ImportOptions,
        bad_rows: BadRows,
        progress: ReadProgress,
    ) -> Iterator[Record]:
        """The records, in the order of the files, each document before the first use of its id.

        ``Request.arrival_ms`` may count from any time, even be negative, and go back; `convert`
        puts it right. Where arrivals are drawn it is ignored.

        Raises:
            TraceError: the files cannot be used at all.
            BadRowError: from ``bad_rows``, when bad rows are not to be skipped.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class ImportFormat:
    """One foreign format.

    Attributes:
        name: as on the command line.
        summary: one line for ``--help``.
        source: where files of this format come from, for the header of the trace.
        options: those that this importer looks at.
        default_request_rate: of drawn arrivals, for formats without arrival times; None: the
            files have them, or the user must choose a rate.
    """

    name: str
    summary: str
    source: str
    read: ReadRecords
    options: frozenset[OptionName] = frozenset()
    default_request_rate: float | None = None

    def rate(self, options: ImportOptions) -> float | None:
        """Requests per second of the arrivals that are drawn; None: the files have arrivals."""
        if options.request_rate is not None:
            return options.request_rate
        return self.default_request_rate
