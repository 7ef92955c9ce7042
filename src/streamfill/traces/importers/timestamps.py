"""Points in time as other projects write them, in nanoseconds, so that no digit is lost."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

NS_PER_S: Final = 10**9
NS_PER_MS: Final = 10**6
_FORM: Final = re.compile(
    r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d:\d\d)(?:[.,](\d{1,9}))?\s?(Z|[+-]\d\d(?::?\d\d)?)?"
)
_NUM_FRACTION_DIGITS: Final = 9


class TimestampParser:
    """Reads timestamps such as ``2023-11-16 18:15:46.6805900`` or ``2024-05-10T00:00:00+00:00``.

    Without a time zone they are taken as UTC. Rows of one second are common: its value is kept.
    """

    def __init__(self) -> None:
        self._second = ""
        self._second_ns = 0

    def parse_ns(self, text: str) -> int:
        """Nanoseconds since 1970.

        Raises:
            ValueError: it is no such timestamp.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None:
            raise ValueError(text)
        day, time, fraction, zone = match.groups()
        second = f"{day}T{time}{zone or ''}"
        if second != self._second:
            point = datetime.fromisoformat(second)
            if point.tzinfo is None:
                point = point.replace(tzinfo=UTC)
            self._second_ns = int(point.timestamp()) * NS_PER_S
            self._second = second
        return self._second_ns + int((fraction or "0").ljust(_NUM_FRACTION_DIGITS, "0"))


def seconds_to_ns(seconds: float) -> int:
    """Seconds since any point, as nanoseconds."""
    return round(seconds * NS_PER_S)
