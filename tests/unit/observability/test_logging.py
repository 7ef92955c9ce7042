"""Structured log lines."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.errors import ConfigError
from streamfill.messages.common import Role
from streamfill.observability.logging import (
    RateLimited,
    configure_logging,
    format_value,
    log_event,
)

logger = logging.getLogger("streamfill.test")


@pytest.fixture
def output() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logging("prefill-0", "info", stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)


def test_line_has_time_level_process_event_and_fields(output: io.StringIO) -> None:
    """An event is one line: UTC time, level, process, name, stream, fields in order."""
    log_event(logger, "segment_computed", stream_id=17, num_tokens=256, role=Role.PREFILL)
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO prefill-0 segment_computed"
        r" stream=17 num_tokens=256 role=prefill\n",
        output.getvalue(),
    )


def test_time_is_that_of_the_record_in_utc(output: io.StringIO) -> None:
    """Milliseconds are truncated and the zone is UTC."""
    record = logging.makeLogRecord({"msg": "x", "levelname": "INFO"})
    record.created = 1795237200.1239
    assert logging.getLogger().handlers[0].format(record).startswith("2026-11-21T05:00:00.123Z ")


def test_level_below_is_silent(output: io.StringIO) -> None:
    """What is below the configured level leaves no trace."""
    log_event(logger, "detail", level=logging.DEBUG)
    assert output.getvalue() == ""


def test_exception_stays_on_the_line(output: io.StringIO) -> None:
    """An exception's text and traceback are fields of the same line."""
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        log_event(logger, "loop_failed", level=logging.ERROR, exception=error)
    line = output.getvalue()
    assert line.count("\n") == 1
    assert r'exception="ValueError: two\nlines"' in line
    assert "test_exception_stays_on_the_line" in line


def test_other_packages_lines_have_the_same_shape(output: io.StringIO) -> None:
    """A plain log call, also one with line breaks, comes out as event ``log``."""
    logging.getLogger("foreign").warning("hello\n%s", "world")
    assert output.getvalue().endswith(
        'WARNING prefill-0 log logger=foreign message="hello\\nworld"\n'
    )


def test_configuring_again_does_not_double_lines(output: io.StringIO) -> None:
    """A second call replaces the first one's handler and process name."""
    configure_logging("decode-1", "info", output)
    log_event(logger, "once")
    assert output.getvalue().count("once") == 1
    assert " decode-1 once" in output.getvalue()


def test_unknown_level_is_a_config_error() -> None:
    """A wrong level names the key and the right values."""
    with pytest.raises(ConfigError, match="debug, info, warning, error") as caught:
        configure_logging("router", "loud")
    assert caught.value.key == "log_level"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("tcp://127.0.0.1:5000", "tcp://127.0.0.1:5000"),
        ("two words", '"two words"'),
        ("a=b", '"a=b"'),
        ('say "hi"', r'"say \"hi\""'),
        ("", '""'),
        ("bell\x07\x1b[31m", r'"bell\u0007\u001b[31m"'),
        (True, "true"),
        (None, "none"),
        (0.1 + 0.2, "0.3"),
        (12, "12"),
    ],
)
def test_values_are_quoted_when_needed(value: object, text: str) -> None:
    """Plain words are bare; blanks, quotes, equals signs and control characters are quoted."""
    assert format_value(value) == text


@given(st.text())
def test_a_value_never_breaks_the_line(text: str) -> None:
    """Whatever a client sends, a value is one printable ASCII word or a quoted one."""
    word = format_value(text)
    assert word.isascii()
    assert word.isprintable()
    assert word.startswith('"') or not set(' ="') & set(word)


def test_long_values_are_cut() -> None:
    """A value quoted from a hostile frame does not fill the log."""
    assert format_value("x" * 501).endswith('x... of 501 characters"')
    assert len(format_value("x" * 10_000_000)) < 600
    assert format_value("x" * 500) == "x" * 500


def test_rate_limit_lets_one_through_and_counts_the_rest() -> None:
    """Repeats within the period are left out and counted for the next line."""
    now_s = [100.0]
    limited = RateLimited(period_s=5.0, clock=lambda: now_s[0])
    assert limited.allow()
    assert limited.num_suppressed == 0
    assert [limited.allow() for _ in range(3)] == [False] * 3
    now_s[0] += 5.0
    assert limited.allow()
    assert limited.num_suppressed == 3
    now_s[0] += 5.0
    assert limited.allow()
    assert limited.num_suppressed == 0
