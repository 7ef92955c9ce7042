"""JSON Lines of another project, checked against a record, each error naming line and field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import msgspec

from streamfill.errors import TraceError
from streamfill.traces.importers.bad_rows import ABSENT, BadRowError, BadRows, Place, Problem
from streamfill.traces.importers.source_files import ReadProgress, read_lines

RecordT = TypeVar("RecordT", bound=msgspec.Struct)
_STEP: Final = re.compile(r"\.(\w+)|\[(\d+)\]")
"""One step of a path such as ``messages[2].role``."""


class JsonLine(Generic[RecordT]):
    """One line: the record, and errors that name its place."""

    __slots__ = ("line", "path", "record")

    def __init__(self, path: Path, line: int, record: RecordT) -> None:
        self.path = path
        self.line = line
        self.record = record

    def error(self, problem: Problem, field: str, value: object, remedy: str) -> BadRowError:
        """The error that this line has in this field."""
        return Place(self.path, self.line).error(problem, field, value, remedy)


def read_json_lines(
    path: Path, record_type: type[RecordT], bad_rows: BadRows, progress: ReadProgress
) -> Iterator[JsonLine[RecordT]]:
    """The records of a file. Lines that are none are bad rows; empty lines are passed over.

    Raises:
        TraceError: the file cannot be read, or has no line.
        BadRowError: by ``bad_rows``.
    """
    decode = msgspec.json.Decoder(record_type).decode
    is_empty = True
    for number, raw in enumerate(read_lines(path, progress), start=1):
        if raw.isspace():
            continue
        is_empty = False
        try:
            record = decode(raw)
        except msgspec.ValidationError as error:
            bad_rows.add(_invalid(path, number, raw, error))
            continue
        except UnicodeDecodeError as error:
            bytes_there = raw[max(0, error.start - 10) : error.end + 10]
            bad_rows.add(
                Place(path, number).error(Problem.NOT_UTF8, "line", bytes_there, "must be UTF-8")
            )
            continue
        except (msgspec.DecodeError, RecursionError) as error:
            bad_rows.add(_no_json(Place(path, number), raw, error))
            continue
        yield JsonLine(path, number, record)
    if is_empty:
        raise TraceError(f"{path}: is empty; it must have one JSON object per line")


def _invalid(path: Path, line: int, raw: bytes, error: msgspec.ValidationError) -> BadRowError:
    text, _, where = str(error).partition(" - at `$")
    field = where.strip("`.")
    missing = re.search(r"missing required field `(\w+)`", text)
    if missing is not None:
        field = f"{field}.{missing[1]}" if field else missing[1]
        return Place(path, line).error(Problem.MISSING, field, ABSENT, "is missing")
    problem = Problem.OUT_OF_RANGE if ">=" in text else Problem.WRONG_TYPE
    try:
        whole = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as wrong:
        # The record is wrong before the place at which the line is.
        return _no_json(Place(path, line), raw, wrong)
    value = _value_at(whole, where.strip("`"))
    return Place(path, line).error(problem, field or "line", value, text)


def _no_json(place: Place, raw: bytes, error: Exception) -> BadRowError:
    text = raw.decode(errors="replace").rstrip()
    return place.error(Problem.BAD_JSON, "line", text, f"no valid JSON: {error}")


def _value_at(value: Any, where: str) -> object:
    try:
        for match in _STEP.finditer(where):
            value = value[match[1]] if match[1] is not None else value[int(match[2])]
    except (LookupError, TypeError):  # a name that is there twice has the last of its values here
        return ABSENT
    return value
