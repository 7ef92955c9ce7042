"""The sentences on top of the page follow from the figures, and warnings are in plain sight."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from streamfill.loadgen.metrics import summarise
from streamfill.loadgen.records import RunResult
from streamfill.loadgen.report.loads import Batch, batches, renumbered
from streamfill.loadgen.report.story import Remark, all_remarks, settings, story, subject, tiles
from streamfill.loadgen.report.wording import duration, milliseconds, sooner, times
from tests.unit.loadgen.run_builders import failed, record, result, run_with_ttft


def batches_of(*results: RunResult) -> list[Batch]:
    return batches(results, [summarise(each) for each in results])


def batch_of(*results: RunResult) -> Batch:
    (batch,) = batches_of(*results)
    return batch


def at_rate(run: RunResult, rate: float) -> RunResult:
    return msgspec.structs.replace(run, request_rate=rate)


def warnings(found: Sequence[Remark]) -> list[str]:
    return [remark.text for remark in found if remark.kind == "warning"]


def test_main_sentence_has_the_ratio() -> None:
    """The first sentence is about the streaming mode, with the median ratio over runs."""
    told = story(
        batch_of(
            run_with_ttft("oneshot", 0, 4.0),
            run_with_ttft("warmup", 0, 2.0),
            run_with_ttft("stream", 0, 0.5),
        )
    )
    assert told.main.startswith(f"stream gives its first token {times(8.0)} sooner than oneshot")
    assert f"{times(8.0)} sooner at P95" in told.main
    assert told.more[0].startswith("Counted from the query")
    assert told.more[1].startswith(f"warmup gives its first token {times(2.0)} sooner")


def test_worse_is_said_too() -> None:
    """A mode that waits longer is called later."""
    told = story(batch_of(run_with_ttft("oneshot", 0, 1.0), run_with_ttft("stream", 0, 1.5)))
    assert f"{times(1.5)} later than oneshot at the median" in told.main


def test_without_a_baseline_there_are_plain_figures() -> None:
    """With one mode there is nothing to be compared with."""
    told = story(batch_of(run_with_ttft("stream", 0, 0.5)))
    assert (
        told.main == f"stream gives its first token {duration(0.5)} after the last segment (P50)."
    )
    assert story(batch_of(result(failed(0)))).main == "No request has an answer."


def test_failures_and_lag_and_skipped_modes_are_warnings() -> None:
    """Everything that casts doubt on a figure has its line."""
    late = result(record(0, lag_s=(0.02,)), failed(1), failed(2, "CANCELLED"), label="stream")
    found = all_remarks(batches_of(result(record(0)), late), {"vllm:stream": "no wheel"})
    texts = warnings(found)
    assert "vllm:stream did not run: no wheel." in texts
    assert any(text.startswith("stream: 2 of 3 requests failed") for text in texts)
    assert any("generator was late, P99 20 ms" in text for text in texts)
    (details,) = [remark.more for remark in found if "failed" in remark.text]
    assert details == ("CANCELLED: 1", "UNAVAILABLE: 1")


def test_lag_within_the_limit_is_no_warning() -> None:
    """A generator that is in time is not mentioned."""
    found = all_remarks(batches_of(result(record(0, lag_s=(0.004,)))), {})
    assert found == []


def test_answers_that_differ_are_a_warning() -> None:
    """Same answers are good to know; others are a warning that shows the first ones."""
    left = result(record(0))
    (good,) = all_remarks(batches_of(left, result(record(0), label="stream")), {})
    assert good.kind == "good"
    other = result(record(0, token_ids=(7, 8, 1)), label="stream")
    (bad,) = all_remarks(batches_of(left, other), {})
    assert bad.kind == "warning"
    assert "token 2: 9 in oneshot run 0, 1 in stream run 0" in bad.more[0]


def test_remark_about_all_loads_stands_once() -> None:
    """What holds at each load is said once; else the load is named."""
    runs = [at_rate(run_with_ttft("oneshot", n, 1.0), rate) for rate in (1, 2) for n in range(2)]
    (remark,) = all_remarks(batches_of(*runs), {})
    assert remark.text.startswith("At each load: ")
    broken = at_rate(result(failed(0), label="stream"), 2)
    texts = warnings(all_remarks(batches_of(*runs, broken), {}))
    assert texts[0].startswith("2 requests per second: stream: 1 of 1 request failed")


def test_loads_are_not_mixed() -> None:
    """Runs at different rates are compared each with its own oneshot, the highest rate last."""
    runs = [
        at_rate(run_with_ttft("oneshot", 0, 8.0), 2.0),
        at_rate(run_with_ttft("stream", 0, 1.0), 2.0),
        at_rate(run_with_ttft("oneshot", 0, 1.0), 0.5),
        at_rate(run_with_ttft("stream", 0, 0.5), 0.5),
    ]
    low, high = batches_of(*runs)
    assert (low.load.request_rate, high.load.request_rate) == (0.5, 2.0)
    assert times(2.0) in story(low).main
    assert times(8.0) in story(high).main
    (line,) = settings([low, high])
    assert line.endswith("0.5 requests per second and 2 requests per second")


def test_repeated_comparison_gets_new_numbers() -> None:
    """Runs of a second file are further repetitions; those of another load keep their numbers."""
    once = [run_with_ttft(label, n, 1.0) for n in range(2) for label in ("oneshot", "stream")]
    other = at_rate(once[0], 3.0)
    numbered = renumbered([*once, *once, other])
    assert [each.run for each in numbered] == [0, 0, 1, 1, 2, 2, 3, 3, 0]


def test_tiles_have_the_medians() -> None:
    """One tile for each mode, in seconds where milliseconds would be long."""
    found = tiles(batch_of(run_with_ttft("oneshot", 0, 12.5), run_with_ttft("stream", 0, 0.5)))
    assert [(tile.label, tile.value, tile.unit) for tile in found] == [
        ("oneshot", "12.5", "s"),
        ("stream", "500", "ms"),
    ]
    assert subject([batch_of(run_with_ttft("oneshot", 0, 1.0))]) == "oneshot"


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (8.26, f"{times(8.26)} sooner than"),
        (0.5, f"{times(2.0)} later than"),
        (1.001, "as soon as"),
    ],
)
def test_ratio_in_words(ratio: float, words: str) -> None:
    """Above 1 is sooner, below is later, and nearly 1 is the same."""
    assert sooner(ratio) == words


def test_numbers_have_as_many_digits_as_matter() -> None:
    """Small times have digits behind the point, long ones are in seconds."""
    assert [milliseconds(value) for value in (0.123, 8.34, 812.4, 12_400)] == [
        "0.12",
        "8.3",
        "812",
        "12,400",
    ]
    assert milliseconds(None) == duration(None) != ""
    assert [duration(value).replace("\N{NO-BREAK SPACE}", " ") for value in (0.042, 8.129, 62)] == [
        "42 ms",
        "8.13 s",
        "62 s",
    ]
