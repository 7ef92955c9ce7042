"""Structured log lines on stderr: one event per line, its fields as ``key=value``.

::

    2026-11-21T05:00:00.123Z INFO prefill-0 segment_computed stream=17 num_tokens=256

Lines of other packages that use stdlib logging come out in the same shape, as event ``log``.
Nothing here imports more than the standard library, so that every process can use it.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from enum import Enum
from typing import TextIO

from streamfill.errors import ConfigError

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

REPEAT_PERIOD_S = 5.0
"""A flood of bad frames then costs twelve lines a minute, and the first one is seen at once."""

MAX_VALUE_CHARS = 500
"""Of one field. Errors may quote what a stranger sent, up to a whole frame."""

_BARE = re.compile(r"[A-Za-z0-9_.:/@+,#%*()\[\]{}<>~^-]+\Z")
_EVENT = "streamfill_event"


def configure_logging(process_name: str, level: str = "info", stream: TextIO | None = None) -> None:
    """Send all that is logged in this process to ``stream`` (default: stderr), one line each.

    Replaces all handlers of the root logger; calling it again replaces them again.

    Args:
        process_name: third word of each line, such as ``prefill-0``.
        level: a key of ``LEVELS``.

    Raises:
        ConfigError: there is no such level.
    """
    if level not in LEVELS:
        raise ConfigError("log_level", level, f"must be one of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(EventFormatter(process_name))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(LEVELS[level])


def log_event(
    logger: logging.Logger,
    event: str,
    *,
    stream_id: int | None = None,
    level: int = logging.INFO,
    exception: BaseException | None = None,
    **fields: object,
) -> None:
    """Log one event.

    Args:
        event: its name in snake_case, the same at every occurrence; what differs is in ``fields``.
        stream_id: the stream that it is about; comes first in the line.
        level: of the ``logging`` module.
        exception: a bug to be found: its text and traceback close the line. An error that is part
            of normal life goes into a field as its text.
    """
    if not logger.isEnabledFor(level):
        return
    words = [event]
    if stream_id is not None:
        words.append(f"stream={stream_id}")
    words.extend(f"{key}={format_value(value)}" for key, value in fields.items())
    logger.log(level, "%s", " ".join(words), exc_info=exception, extra={_EVENT: True})


def format_value(value: object) -> str:
    """``value`` as one word: bare where it is plain, else quoted, with JSON's escapes."""
    match value:
        case Enum():
            return format_value(value.value)
        case bool() | None:
            return str(value).lower()
        case float():
            return f"{value:.6g}"
    text = str(value)
    if len(text) > MAX_VALUE_CHARS:
        text = f"{text[:MAX_VALUE_CHARS]}... of {len(text)} characters"
    return text if _BARE.match(text) else json.dumps(text)


class EventFormatter(logging.Formatter):
    """Makes a line of a record. ``converter`` is not used: times are UTC with milliseconds."""

    def __init__(self, process_name: str) -> None:
        super().__init__()
        self._process_name = format_value(process_name)

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        words = [
            f"{seconds}.{int(record.created % 1 * 1000):03d}Z",
            record.levelname,
            self._process_name,
        ]
        if getattr(record, _EVENT, False):
            words.append(record.getMessage())
        else:
            message = format_value(record.getMessage())
            words.append(f"log logger={format_value(record.name)} message={message}")
        if record.exc_info is not None and record.exc_info[1] is not None:
            error = record.exc_info[1]
            words.append(f"exception={format_value(f'{type(error).__name__}: {error}')}")
            text = "".join(traceback.format_exception(error))
            words.append(f"traceback={json.dumps(text)}")
        return " ".join(words)


class RateLimited:
    """Says when an event that may come in floods is to be logged: at most once per period.

    ::

        if limited.allow():
            log_event(logger, "malformed_frame", num_suppressed=limited.num_suppressed)

    One object per event; for any thread.
    """

    def __init__(
        self, period_s: float = REPEAT_PERIOD_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_suppressed = 0
        """Events that were left out between the last two that were allowed."""
        self._period_s = period_s
        self._clock = clock
        self._lock = threading.Lock()
        self._allowed_s: float | None = None
        self._num_refused = 0

    def allow(self) -> bool:
        """Whether to log this occurrence. The first one always is."""
        with self._lock:
            now_s = self._clock()
            if self._allowed_s is not None and now_s - self._allowed_s < self._period_s:
                self._num_refused += 1
                return False
            self._allowed_s = now_s
            self.num_suppressed, self._num_refused = self._num_refused, 0
            return True
