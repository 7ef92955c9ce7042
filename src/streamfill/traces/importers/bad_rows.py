"""Rows of a foreign file that cannot be used: said exactly, or counted and passed over."""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, Protocol, TypeVar

from streamfill.errors import TraceError

RowT = TypeVar("RowT")
MadeT = TypeVar("MadeT")
NUM_SHOWN: Final = 5
"""Bad rows that a summary quotes."""
_VALUE_LENGTH: Final = 60
"""Longer values are cut, so that an error stays one line."""


class Problem(enum.Enum):
    """Kinds of bad rows, as a summary counts them."""

    BAD_JSON = "no valid JSON"
    BAD_CSV = "no valid CSV"
    NOT_UTF8 = "not UTF-8"
    MISSING = "missing column or value"
    WRONG_TYPE = "value of a wrong kind"
    OUT_OF_RANGE = "number out of range"
    BAD_TIME = "no time, or time going back"
    BAD_RANKING = "no list of document ids"
    UNKNOWN_DOCUMENT = "unknown document"
    UNKNOWN_TRACE = "unknown trace file"
    WRONG_BLOCKS = "number of blocks does not fit the length"
    NO_CONTENT = "nothing to send"
    NO_ANSWER = "no answer"
    DUPLICATE = "id used before"


class BadRowError(TraceError):
    """A row that cannot be used.

    Attributes:
        problem: its kind.
        column: the column or field.
    """

    def __init__(
        self, place: Place, problem: Problem, column: str, value: object, remedy: str
    ) -> None:
        """
        Args:
            value: what stands there; `ABSENT` when nothing does.
            remedy: what would be right, as a phrase.
        """
        shown = "" if value is ABSENT else f" = {_shorten(value)}"
        super().__init__(f"{place}, {column}{shown}: {remedy}")
        self.place = place
        self.problem = problem
        self.column = column


class Place(NamedTuple):
    """A row of a file."""

    path: Path
    line: int | None = None
    """Where the row starts, from 1; None: the file as a whole."""

    def __str__(self) -> str:
        return f"{self.path}" if self.line is None else f"{self.path}, line {self.line}"

    def error(self, problem: Problem, column: str, value: object, remedy: str) -> BadRowError:
        """The error that this row has in this column."""
        return BadRowError(self, problem, column, value, remedy)


class _Absent(enum.Enum):
    ABSENT = enum.auto()


ABSENT: Final = _Absent.ABSENT
"""The value of a column that has none."""


class BadRows:
    """The bad rows of one pass: the first one ends it, or all are counted."""

    def __init__(self, *, is_skipping: bool) -> None:
        self._is_skipping = is_skipping
        self.counts: Counter[Problem] = Counter()
        self.first: list[BadRowError] = []
        self.left_out: Counter[str] = Counter()
        """Good rows that make no request, by reason."""

    def add(self, error: BadRowError) -> None:
        """Counts a bad row.

        Raises:
            BadRowError: the same one, unless bad rows are skipped.
        """
        if not self._is_skipping:
            raise error
        self.counts[error.problem] += 1
        if len(self.first) < NUM_SHOWN:
            self.first.append(error)

    def leave_out(self, reason: str) -> None:
        """Counts a good row that makes no request."""
        self.left_out[reason] += 1

    @property
    def num_bad(self) -> int:
        """How many were passed over."""
        return self.counts.total()

    def summary(self) -> list[str]:
        """Lines for the user; none when there is nothing to tell."""
        lines = [f"Left out: {count:,} x {reason}." for reason, count in self.left_out.items()]
        if not self.counts:
            return lines
        lines.append(f"Skipped {self.num_bad:,} bad row{'' if self.num_bad == 1 else 's'}:")
        lines += [f"  {count:,} x {kind.value}" for kind, count in self.counts.most_common()]
        lines.append("The first of them:" if self.num_bad > len(self.first) else "They are:")
        lines += [f"  {error}" for error in self.first]
        return lines


class Row(Protocol):
    """A row of any kind of file, which can say where it stands."""

    def error(self, problem: Problem, column: str, value: object, remedy: str) -> BadRowError:
        """The error that this row has in this column."""
        ...


def each_made(
    rows: Iterable[RowT], make: Callable[[RowT], MadeT | None], bad_rows: BadRows
) -> Iterator[MadeT]:
    """What ``make`` makes of each row. Where it raises `BadRowError` the row is a bad one; where it
    returns None the row is left out.

    Raises:
        BadRowError: by ``bad_rows``.
    """
    for row in rows:
        try:
            made = make(row)
        except BadRowError as error:
            bad_rows.add(error)
            continue
        if made is not None:
            yield made


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _VALUE_LENGTH else f"{text[:_VALUE_LENGTH]}…"
