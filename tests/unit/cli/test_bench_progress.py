"""The line that shows how far a run is."""

from __future__ import annotations

import io

from streamfill.cli.bench_progress import progress_line, run_progress
from streamfill.loadgen.runner import RunProgress

HALF = RunProgress(num_total=10, num_done=5, num_failed=1, num_in_flight=3)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_is_as_full_as_the_run() -> None:
    """And the numbers stand beside it."""
    line = progress_line("stream", HALF)
    assert line.count("━") == line.count("╌") > 0
    assert line.startswith("stream ")
    assert line.endswith("5 of 10 done, 1 failed, 3 in flight")


def test_a_run_of_nothing_has_an_empty_bar() -> None:
    """There is nothing to divide by."""
    nothing = RunProgress(num_total=0, num_done=0, num_failed=0, num_in_flight=0)
    assert "━" not in progress_line("", nothing)


def test_a_terminal_gets_one_line_that_goes_away() -> None:
    """Each report is drawn over the one before it; in the end the line is empty."""
    out = _Terminal()
    with run_progress("stream", out) as show:
        assert show is not None
        show(HALF)
        show(HALF)
    assert "\n" not in out.getvalue()
    assert out.getvalue().endswith("\r\x1b[K")


def test_a_file_gets_nothing() -> None:
    """A log has no use for it."""
    out = io.StringIO()
    with run_progress("stream", out) as show:
        assert show is None
    assert out.getvalue() == ""
