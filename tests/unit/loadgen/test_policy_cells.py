"""Which traces and loads a comparison of policies measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamfill.errors import ConfigError
from streamfill.loadgen.policy_cells import LOADS, Cell, parse_cells

SHIPPED = "traces/crawl-small.jsonl, traces/ann-small.jsonl"
ALL = ",".join(LOADS)


def test_shipped_traces_have_rates() -> None:
    """Every load of one trace, then those of the next, from the lowest rate to the highest."""
    cells = parse_cells(SHIPPED, ALL, [])
    assert [(cell.trace, cell.load) for cell in cells] == [
        (trace, load) for trace in ("crawl-small", "ann-small") for load in LOADS
    ]
    rates = [cell.rate for cell in cells]
    assert rates == [0.4, 1.15, 1.3, 0.25, 0.55, 0.8]


def test_a_rate_of_the_user_goes_first() -> None:
    """For that trace and load only; the load may be a new one."""
    rates = ["crawl-small:light=0.3", "ann-small:burst=2", "crawl-small:burst=3"]
    cells = parse_cells(SHIPPED, "light,burst", rates)
    assert [cell.rate for cell in cells] == [0.3, 3, 0.25, 2]


def test_another_trace_with_all_its_rates() -> None:
    """It is called by its file's name without endings."""
    (cell,) = parse_cells("/x/mine.jsonl.gz", "light", ["mine:light=1.5"])
    assert cell == Cell(trace="mine", path=Path("/x/mine.jsonl.gz"), load="light", rate=1.5)
    assert cell.title == "mine light"


@pytest.mark.parametrize(
    ("traces", "loads", "rates", "part"),
    [
        ("mine.jsonl", "light,burst", ["mine:light=1"], "add, in .*: --rate mine:burst=R$"),
        ("crawl-small.jsonl", "burst", [], "--rate crawl-small:burst=R"),
        ("a/x.jsonl,b/x.jsonl", "light", ["x:light=1"], "--traces = 'b/x.jsonl': .*another x"),
        (SHIPPED, "light", ["ann-small:heavy=1"], "--rate = 'ann-small:heavy': is no cell"),
        (SHIPPED, "light", ["ann:light=1"], "--rate = 'ann:light': is no cell"),
        (SHIPPED, "light", ["ann-small:light"], "write TRACE:LOAD=REQUESTS_PER_S"),
        (SHIPPED, "light", ["light=1"], "write TRACE:LOAD"),
        (SHIPPED, "light", ["ann-small:light=fast"], "--rate = 'ann-small:light=fast'"),
        (SHIPPED, "light", ["ann-small:light=0"], "--rate = 'ann-small:light=0'"),
        (SHIPPED, "light", ["ann-small:light=inf"], "--rate = 'ann-small:light=inf'"),
        ("", "light", [], "--traces = '': has an empty name"),
        (SHIPPED, "light,,", [], "--loads = 'light,,'"),
    ],
)
def test_wrong_cells(traces: str, loads: str, rates: list[str], part: str) -> None:
    """The error names the option, the value and what to write."""
    with pytest.raises(ConfigError, match=part):
        parse_cells(traces, loads, rates)
