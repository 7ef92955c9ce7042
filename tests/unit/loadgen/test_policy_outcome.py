"""What a comparison of policies tells people and programs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from streamfill.loadgen.identity import compare_outputs
from streamfill.loadgen.metrics import summarise
from streamfill.loadgen.policy_cells import Cell
from streamfill.loadgen.policy_outcome import CellOutcome, policy_facts, verdicts
from streamfill.loadgen.policy_table import policy_table, verdict_lines
from streamfill.loadgen.records import RunResult
from streamfill.loadgen.table import TABLE_WIDTH
from tests.unit.loadgen.run_builders import failed, record, result, run_with_ttft

CELL = Cell(trace="t", path=Path("t.jsonl"), load="light", rate=0.5)
RUNS = (
    run_with_ttft("oneshot", 0, 4.0),
    run_with_ttft("warmup", 0, 2.0),
    run_with_ttft("stream@fcfs", 0, 0.5),
    run_with_ttft("stream@lcas(order=newest)", 0, 0.8, wall_s=5.0),
    run_with_ttft("stream@adaptive", 0, 0.4),
)


def outcome(*runs: RunResult, cell: Cell = CELL) -> CellOutcome:
    summaries = [summarise(run) for run in runs]
    return CellOutcome(cell=cell, summaries=summaries, identity=compare_outputs(runs))


def facts_of(*runs: RunResult) -> dict[str, Any]:
    facts = policy_facts([outcome(*runs)], is_complete=True)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    found: dict[str, Any] = facts["t"]["light"]
    return found


def test_facts_of_a_cell() -> None:
    """Times, and ratios to oneshot, to warmup and to the best other policy, by trace and load."""
    facts = facts_of(*RUNS)
    fcfs = facts["stream@fcfs"]
    assert [fcfs[f"p{p}_ttft_ms"] for p in (50, 95, 99)] == [500, 500, 500]
    assert fcfs["ratio_to_oneshot"] == {"p50": 8, "p95": 8, "p99": 8}
    assert fcfs["ratio_to_warmup"] == {"p50": 4, "p95": 4, "p99": 4}
    assert facts["oneshot"]["ratio_to_oneshot"]["p50"] == 1
    assert facts["stream@lcas(order=newest)"]["throughput_ratio_to_oneshot"] == 2
    assert facts["adaptive_to_best_other"] == {"p50": 1.25, "p95": 1.25, "p99": 1.25}
    assert facts["best_other"] == dict.fromkeys(("p50", "p95", "p99"), "stream@fcfs")
    assert (facts["identical"], facts["request_rate"], facts["num_runs"]) == (True, 0.5, 1)


def test_all_cells_have_to_be_identical() -> None:
    """One different answer in one cell makes the whole measurement different."""
    other = result(record(0, token_ids=(1, 2, 3)), label="stream@fcfs")
    heavy = Cell(trace="t", path=Path("t.jsonl"), load="heavy", rate=9)
    bad = outcome(result(record(0)), other, cell=heavy)
    facts = policy_facts([outcome(*RUNS), bad], is_complete=False)
    assert (facts["identical"], facts["complete"]) == (False, False)
    assert facts["t"]["light"]["identical"]
    assert facts["t"]["heavy"]["num_different_by_label"] == {"stream@fcfs": 1}


def test_what_did_not_run_or_failed_is_null() -> None:
    """Without a baseline, or without one answer, there is no ratio, and failures are counted."""
    facts = facts_of(
        run_with_ttft("stream@adaptive", 0, 1.0), result(failed(0), label="stream@fcfs")
    )
    assert facts["stream@fcfs"]["p50_ttft_ms"] is None
    assert facts["stream@fcfs"]["num_failed"] == 1
    assert facts["stream@adaptive"]["ratio_to_oneshot"]["p50"] is None
    assert facts["stream@adaptive"]["throughput_ratio_to_oneshot"] is None
    assert facts["adaptive_to_best_other"] == {}


def test_the_best_other_is_chosen_for_each_percentile() -> None:
    """Of streams only, and another reading of adaptive is no other policy."""
    slow_tail = [record(n, ttft_s=9.0 if n == 9 else 0.2) for n in range(10)]
    found = verdicts(
        [
            summarise(run)
            for run in (
                run_with_ttft("oneshot", 0, 0.1),
                run_with_ttft("stream@adaptive(ageing=1)", 0, 0.1),
                run_with_ttft("stream@fcfs", 0, 0.5),
                result(*slow_tail, label="stream@mcps"),
                run_with_ttft("stream@adaptive", 0, 0.4),
            )
        ]
    )
    assert found[50].best_other == "stream@mcps"
    assert found[99].best_other == "stream@fcfs"
    assert (found[50].word, found[99].word) == ("worse", "not worse")


@pytest.mark.parametrize(
    ("adaptive_s", "word"),
    [
        ((1.0, 1.0, 1.0), "not worse"),
        ((1.5, 1.2, 1.1), "worse"),
        ((0.9, 1.2, 1.1), "not shown to be worse"),
        ((1.5, 0.9, 0.9), "not worse"),
    ],
)
def test_verdicts_over_repetitions(adaptive_s: tuple[float, ...], word: str) -> None:
    """Where repetitions contradict each other, nothing was shown."""
    runs = [run_with_ttft("stream@fcfs", n, 1.0) for n in range(3)]
    runs += [run_with_ttft("stream@adaptive", n, ttft_s) for n, ttft_s in enumerate(adaptive_s)]
    found = verdicts([summarise(run) for run in runs])
    assert {each.word for each in found.values()} == {word}


def test_the_table_and_the_lines_below_it() -> None:
    """Each mode has a row, the cell is named, and each percentile has a verdict."""
    console = Console(file=io.StringIO(), width=TABLE_WIDTH)
    console.print(policy_table(outcome(*RUNS)))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "t light, 0.5 requests/s" in text
    row = next(line for line in text.splitlines() if "newest" in line).split()
    assert row == [
        "stream@lcas(order=newest)",
        "800/800/800",
        "5.00/5.00/5.00",
        "2.50/2.50/2.50",
        "2.00",
        "0",
    ]
    lines = verdict_lines(outcome(*RUNS))
    assert len(lines) == 3
    assert lines[0].startswith("P50: stream@adaptive is not worse than")
    assert lines[0].endswith("stream@fcfs: ratio 1.250, one repetition")
    assert verdict_lines(outcome(*RUNS[:4])) == []
    again = [run_with_ttft("stream@fcfs", 1, 0.5), run_with_ttft("stream@adaptive", 1, 0.5)]
    line = verdict_lines(outcome(*RUNS, *again))[0]
    assert line.endswith("stream@fcfs: ratio 1.125, 1.000 to 1.250 over 2 repetitions")
