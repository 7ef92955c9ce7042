"""What a comparison shows at its end, and what it tells programs."""

from __future__ import annotations

import io
import json
import re

from rich.console import Console

from streamfill.loadgen.identity import compare_outputs
from streamfill.loadgen.metrics import summarise
from streamfill.loadgen.outcome import has_failures, result_facts
from streamfill.loadgen.records import RunResult
from streamfill.loadgen.table import TABLE_WIDTH, comparison_table, identity_lines
from tests.unit.loadgen.run_builders import failed, record, result, run_with_ttft


def shown(*results: RunResult) -> list[str]:
    console = Console(file=io.StringIO(), width=TABLE_WIDTH)
    console.print(comparison_table([summarise(each) for each in results]))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def row(lines: list[str], label: str) -> list[str]:
    found = next(line for line in lines if line.split()[:1] == [label])
    return re.split(r"\s{2,}", found.strip())


def test_table_has_a_row_for_each_mode() -> None:
    """A row shows medians over runs, and ratios with their extremes."""
    lines = shown(
        run_with_ttft("oneshot", 0, 4.0),
        run_with_ttft("stream", 0, 0.5),
        run_with_ttft("oneshot", 1, 4.0),
        run_with_ttft("stream", 1, 1.0),
    )
    assert row(lines, "oneshot")[1:3] == ["4000/4000/4000", "6000/6000"]
    cells = row(lines, "stream")
    assert cells[1] == "750/750/750"
    assert cells[3] == "6.00 (4.00..8.00)"
    assert cells[-1] == "0"
    assert max(len(line) for line in lines) <= TABLE_WIDTH


def test_table_of_a_run_that_failed() -> None:
    """A mode without an answer has dashes, and how many requests failed."""
    cells = row(shown(result(failed(0), failed(1), label="stream")), "stream")
    assert cells[1] == "-/-/-"
    assert cells[-1] == "2 of 2"


def test_differences_are_shown() -> None:
    """The first differences are lines of their own; the rest is counted."""
    left = result(*(record(n) for n in range(12)))
    right = result(*(record(n, token_ids=(7, 8, 1)) for n in range(12)), label="stream")
    lines = identity_lines(compare_outputs([left, right]))
    assert lines[0].startswith("12 of 12")
    assert "token 2: 9 in oneshot run 0, 1 in stream run 0" in lines[1]
    assert len(lines) == 12
    assert lines[-1] == "  and 2 more"
    assert "same answers" in identity_lines(compare_outputs([left, left]))[0]
    assert "could be compared" in identity_lines(compare_outputs([]))[0]


def test_result_facts() -> None:
    """The RESULT line has identity, nested ratios, figures of each mode, failures and skips."""
    results = [
        run_with_ttft("oneshot", 0, 4.0),
        run_with_ttft("stream", 0, 0.5, wall_s=8.0),
        result(*(record(n) for n in range(3)), failed(3), label="warmup"),
    ]
    summaries = [summarise(each) for each in results]
    facts = result_facts(summaries, compare_outputs(results), {"vllm": "no space"})
    assert facts["identical"] is True
    assert (facts["num_compared"], facts["num_different"]) == (3, 0)
    assert facts["ratio_to_oneshot"]["stream"]["ttft_last_segment_ms"]["p50"] == 8
    assert set(facts["ratio_to_oneshot"]["stream"]["ttft_query_ms"]) == {"p50", "p95", "p99"}
    assert facts["ratio_spread"]["stream"]["ttft_last_segment_ms"]["p95"] == [8, 8]
    assert facts["throughput_ratio_to_oneshot"] == {"oneshot": 1, "stream": 1.25, "warmup": 1}
    assert facts["modes"]["oneshot"]["ttft_last_segment_ms"]["p99"] == 4000
    assert facts["modes"]["stream"]["output_tokens_per_s"] == 1.125
    assert facts["failures"] == {"oneshot": {}, "stream": {}, "warmup": {"UNAVAILABLE": 1}}
    assert facts["skipped"] == {"vllm": "no space"}
    assert facts["baseline"] == "oneshot"
    assert has_failures(summaries)
    assert not has_failures(summaries[:2])
    json.dumps(facts, allow_nan=False)
