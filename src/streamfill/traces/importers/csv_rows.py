"""CSV files, row by row, with the line of each row and its values checked by column."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from streamfill.traces.importers.bad_rows import ABSENT, BadRowError, BadRows, Place, Problem
from streamfill.traces.importers.source_files import ReadProgress, read_lines

_FIELD_LIMIT: Final = (1 << 31) - 1
"""Of characters in one field: a page may be long; csv's own limit is 131,072."""


class CsvRow:
    """One row: its values by column, each error naming file, line and column."""

    __slots__ = ("_columns", "_values", "line", "path")

    def __init__(
        self, path: Path, line: int, columns: dict[str, int], values: Sequence[str]
    ) -> None:
        self.path = path
        self.line = line
        self._columns = columns
        self._values = values

    def text(self, column: str) -> str:
        """The value as it stands there; empty where the file has no such column.

        Raises:
            BadRowError: it is not UTF-8.
        """
        index = self._columns.get(column)
        if index is None:
            return ""
        value = self._values[index]
        if not value.isascii():
            self._check_utf8(column, value)
        return value

    def whole_number(self, column: str, *, at_least: int = 0) -> int:
        """
        Raises:
            BadRowError: the value is no whole number, or is less.
        """
        text = self.text(column)
        try:
            number = int(_plain(text))
        except ValueError:
            raise self.error(
                Problem.WRONG_TYPE, column, text, f"must be a whole number of at least {at_least}"
            ) from None
        if number < at_least:
            raise self.error(Problem.OUT_OF_RANGE, column, number, f"must be at least {at_least}")
        return number

    def number(self, column: str) -> float:
        """
        Raises:
            BadRowError: the value is no finite number.
        """
        text = self.text(column)
        try:
            number = float(_plain(text))
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self.error(Problem.WRONG_TYPE, column, text, "must be a number")
        return number

    def error(self, problem: Problem, column: str, value: object, remedy: str) -> BadRowError:
        """The error that this row has in this column."""
        return Place(self.path, self.line).error(problem, column, value, remedy)

    def _check_utf8(self, column: str, value: str) -> None:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            shown = value[max(0, error.start - 10) : error.end + 10].encode(
                errors="surrogateescape"
            )
            raise self.error(
                Problem.NOT_UTF8, column, shown, "must be UTF-8; convert the file, e.g. with iconv"
            ) from None


def _plain(text: str) -> str:
    """Python reads 1_000 and digits of other scripts as numbers; here they are mistakes."""
    if "_" in text or not text.isascii():
        raise ValueError(text)
    return text


def read_csv(
    path: Path, required: Sequence[str], bad_rows: BadRows, progress: ReadProgress
) -> Iterator[CsvRow]:
    """The rows of a file. Rows that are no CSV, or have another number of values than the header,
    are bad rows. Empty lines are none.

    Args:
        required: columns that the header must have, in any order and beside any others.

    Raises:
        TraceError: the file cannot be read.
        BadRowError: the header is missing or lacks a column; whatever the treatment of bad rows.
    """
    csv.field_size_limit(_FIELD_LIMIT)
    # A byte that is not UTF-8 spoils its own field alone, which is found when it is asked for.
    lines = (line.decode(errors="surrogateescape") for line in read_lines(path, progress))
    reader = csv.reader(lines, strict=True)
    header = _read_header(path, reader, required)
    columns = {name: index for index, name in enumerate(header)}
    num_columns = len(header)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            # The reader goes on behind the line at which it noticed.
            bad_rows.add(
                Place(path, line).error(Problem.BAD_CSV, "row", ABSENT, f"no valid CSV: {error}")
            )
            continue
        if values is None:
            return
        if not values:
            continue
        if len(values) != num_columns:
            bad_rows.add(_wrong_width(path, line, header, values))
            continue
        yield CsvRow(path, line, columns, values)


def _read_header(path: Path, reader: Iterator[list[str]], required: Sequence[str]) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise Place(path, 1).error(
            Problem.BAD_CSV, "header", ABSENT, f"no valid CSV: {error}"
        ) from error
    wanted = ", ".join(required)
    if not header:
        raise Place(path, 1).error(
            Problem.MISSING, "header", ABSENT, f"is missing; must have {wanted}"
        )
    for name in required:
        if name not in header:
            found = ",".join(header)
            raise Place(path, 1).error(
                Problem.MISSING, "header", found, f"has no column {name!r}; needs {wanted}"
            )
    return header


def _wrong_width(
    path: Path, line: int, header: Sequence[str], values: Sequence[str]
) -> BadRowError:
    if len(values) < len(header):
        missing = header[len(values)]
        return Place(path, line).error(
            Problem.MISSING, missing, ABSENT, f"is missing; {len(header)} values needed"
        )
    return Place(path, line).error(
        Problem.BAD_CSV,
        f"value {len(header) + 1}",
        values[len(header)],
        f"is one too many; the header has {len(header)} columns",
    )
