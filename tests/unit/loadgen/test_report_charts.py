"""The charts show what is in the records, with few enough points."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.loadgen.metrics import summarise
from streamfill.loadgen.records import ModeName, RunResult
from streamfill.loadgen.report.distributions import distribution_charts, times_of
from streamfill.loadgen.report.drawing import Chart, log_ms_axis, plain, thinned
from streamfill.loadgen.report.loads import Batch, batches
from streamfill.loadgen.report.palette import styles
from streamfill.loadgen.report.stages import mean_stages, stage_times, stages_chart
from streamfill.loadgen.report.timeline import MOST_STREAMS, timeline_charts
from streamfill.loadgen.report.trends import over_rate_chart, over_time_chart
from streamfill.observability import lifetime as lt
from tests.unit.loadgen.report_builders import comparison, simulated_run
from tests.unit.loadgen.run_builders import failed, record, result, run_with_ttft


def batches_of(*results: RunResult) -> list[Batch]:
    return batches(results, [summarise(each) for each in results])


@pytest.fixture(scope="module")
def batch() -> Batch:
    """One run of each mode, with more streams than a timeline has rows."""
    (found,) = batches_of(*comparison(num_runs=1, num_requests=MOST_STREAMS + 10))
    return found


def shown(chart: Chart) -> dict[str, Any]:
    """The traces that are there at first, by type and name."""
    return {f"{t['type']} {t['name']}": t for t in chart.views[chart.shown]["data"]}


def test_box_has_the_percentiles() -> None:
    """The line of a box is the median, its ends are the quartiles."""
    runs = result(*(record(n, ttft_s=0.1 * (n + 1)) for n in range(5)))
    box = shown(distribution_charts(batches_of(runs))[0])["box oneshot"]
    assert box["median"] == [pytest.approx(300)]
    assert (box["q1"], box["q3"]) == ([pytest.approx(200)], [pytest.approx(400)])


def test_curve_says_how_many_wait_longer(batch: Batch) -> None:
    """A curve falls from all requests to the slowest one, and keeps that one."""
    for chart, clock in zip(distribution_charts([batch])[2:], (0, 1), strict=True):
        for label, times in times_of(batch).items():
            curve = shown(chart)[f"scatter {label}"]
            assert curve["y"] == sorted(curve["y"], reverse=True)
            assert (curve["y"][0], curve["y"][-1]) == (1.0, pytest.approx(1 / 70, rel=1e-3))
            assert curve["x"][-1] == pytest.approx(times[clock][-1], rel=1e-3)


def test_curve_of_many_requests_has_few_points() -> None:
    """The slowest requests are all there, others are thinned out."""
    runs = result(*(record(n, ttft_s=0.001 * (n + 1)) for n in range(3000)))
    curve = shown(distribution_charts(batches_of(runs))[2])["scatter oneshot"]
    assert len(curve["x"]) <= 300
    assert curve["x"][-3:] == [pytest.approx(ms) for ms in (2998, 2999, 3000)]


@given(st.lists(st.integers(), min_size=2, max_size=300), st.integers(2, 40))
def test_thinned_keeps_order_and_ends(values: list[int], most: int) -> None:
    """Of many values few are kept, the first and the last among them."""
    kept = thinned(list(enumerate(values)), most)
    assert len(kept) == min(most, len(values))
    assert (kept[0], kept[-1]) == ((0, values[0]), (len(values) - 1, values[-1]))
    assert kept == sorted(set(kept))


def test_stages_add_up(batch: Batch) -> None:
    """The stages of a request are the time from its commit to its second token."""
    for run in batch.results:
        for each in run.records:
            stages = stage_times(each)
            events = {name: at_s for name, at_s, _, _ in each.server_events}
            assert stages is not None
            assert min(stages) >= 0
            assert sum(stages) == pytest.approx(events["SECOND_TOKEN"] - events["COMMIT_RECEIVED"])


def test_late_news_of_the_handoff(batch: Batch) -> None:
    """Where the hand-off's end is learnt after the second token, no wait for decode is left."""
    each = batch.of("stream")[0].records[0]
    events = tuple(
        (name, at_s + 9.0 if name == "HANDOFF_DONE" else at_s, segment, num)
        for name, at_s, segment, num in each.server_events
    )
    stages = stage_times(msgspec.structs.replace(each, server_events=events))
    assert stages is not None
    assert stages.decode == 0.0
    assert stages.handoff == pytest.approx(0.035)


def test_streaming_leaves_less_to_compute(batch: Batch) -> None:
    """What was computed before the commit is in no bar."""
    oneshot, stream = mean_stages(batch, "oneshot"), mean_stages(batch, "stream")
    assert oneshot is not None
    assert stream is not None
    assert stream.compute < 0.5 * oneshot.compute


def test_target_that_tells_nothing_has_one_bar() -> None:
    """Without events of a server, all of the wait is of an unknown kind."""
    (batch,) = batches_of(run_with_ttft("vllm:oneshot", 0, 2.0))
    bars = shown(stages_chart([batch]))
    assert list(bars) == ["bar not told by the target"]
    assert bars["bar not told by the target"]["x"] == [2.0]


def test_timeline_shows_the_middle_of_a_run(batch: Batch) -> None:
    """No more rows than can be told apart; the note says how many there are."""
    left, right = timeline_charts([batch])
    assert (left.shown, right.shown) == ("oneshot", "stream")
    assert f"{MOST_STREAMS} of {MOST_STREAMS + 10} requests" in left.note
    for view in left.views.values():
        rows = {row for trace in view["data"] for row in trace["y"]}
        assert rows == set(range(MOST_STREAMS))


def test_timeline_hides_compute_under_retrieval(batch: Batch) -> None:
    """Counted from the last segment, oneshot computes afterwards only, stream mostly before."""
    left, right = timeline_charts([batch])
    late, early = shown(left)["bar compute"], shown(right)["bar compute"]
    assert min(late["base"]) >= 0
    before = [end for end, width in zip(early["base"], early["x"], strict=True) if end + width <= 0]
    assert len(before) > 0.4 * len(early["base"])


def test_timelines_of_all_modes_have_the_same_seconds(batch: Batch) -> None:
    """Modes can be set side by side."""
    left, _ = timeline_charts([batch])
    ranges = {
        tuple(left.views[label]["layout"]["xaxis"]["range"])
        for label in ("oneshot", "warmup", "stream")
    }
    assert len(ranges) == 1


def test_timeline_bars_are_the_compute_runs(batch: Batch) -> None:
    """By the clock of the run, bars stand where the server computed, warm-ups included."""
    left, _ = timeline_charts([batch])
    view = left.views["warmup, by the clock of the run"]
    (bars,) = [trace for trace in view["data"] if trace["name"] == "compute"]
    records = sorted(batch.of("warmup")[0].records, key=lambda each: each.index)[5:-5]
    starts = [e[1] for each in records for e in each.server_events if e[0] == "COMPUTE_STARTED"]
    assert sorted(bars["base"]) == pytest.approx(sorted(starts), abs=0.001)


def test_failed_requests_are_marked() -> None:
    """A request without an answer has a cross with the reason."""
    (chart,) = timeline_charts(batches_of(result(record(0), failed(1, error="gone"))))
    cross = shown(chart)["scatter failed"]
    assert cross["hovertext"] == ["request q1: UNAVAILABLE gone"]


def test_many_loads_do_not_blow_up_the_page() -> None:
    """Of many loads the timelines of the last ones are drawn."""
    runs = [
        msgspec.structs.replace(run_with_ttft("stream", 0, 0.1), request_rate=float(rate))
        for rate in range(1, 40)
    ]
    (chart,) = timeline_charts(batches_of(*runs))
    assert len(chart.views) == 24
    assert "39 requests per second" in chart.shown


def test_time_over_rate_needs_two_rates() -> None:
    """One rate makes no line; of several, each run's extremes are around the median."""
    runs = [
        msgspec.structs.replace(run_with_ttft("stream", n, ttft_s * (n + 1)), request_rate=rate)
        for rate, ttft_s in ((1.0, 0.1), (2.0, 0.4))
        for n in range(3)
    ]
    assert over_rate_chart(batches_of(*runs[:3])) is None
    chart = over_rate_chart(batches_of(*runs))
    assert chart is not None
    line = shown(chart)["scatter stream P50"]
    assert line["x"] == [1.0, 2.0]
    assert line["y"] == [pytest.approx(200), pytest.approx(800)]
    assert line["error_y"]["array"] == [pytest.approx(100), pytest.approx(400)]


def test_dots_over_time_are_requests(batch: Batch) -> None:
    """A dot stands at the arrival of a request's last segment."""
    dots = shown(over_time_chart([batch]))["scatter stream"]
    lifetimes = [each.client_lifetime() for each in batch.of("stream")[0].records]
    arrivals = [lt.last_at_s(life, lt.LifetimeEvent.SEGMENT_RECEIVED) or 0.0 for life in lifetimes]
    assert dots["x"] == pytest.approx(sorted(arrivals), abs=0.01)


def test_modes_look_different() -> None:
    """No two modes have the same colour, line and mark, known or not; a mode keeps its own."""
    known = [each.value for each in ModeName]
    labels = [*known, *(f"{e}:{m}" for e in ("vllm", "sglang-pd", "x", "y") for m in known)]
    look = styles(labels)
    assert len(set(look.values())) == len(labels)
    assert styles(["stream"])["stream"] == look["stream"]


@given(st.floats(0.001, 1e7), st.floats(1, 1e6))
def test_axis_has_ticks(least_ms: float, factor: float) -> None:
    """Wherever the times lie, there are a few ticks with units inside the axis."""
    axis = log_ms_axis("t", [least_ms, least_ms * factor])
    low, high = axis["range"]
    inside = [tick for tick in axis["tickvals"] if low <= math.log10(tick) <= high]
    assert 2 <= len(inside) <= 10
    assert all(text.endswith((" ms", " s")) for text in axis["ticktext"])
    assert len(set(axis["ticktext"])) == len(axis["ticktext"])


def test_long_and_foreign_texts_are_cut_and_escaped() -> None:
    """Labels stay short, and their HTML is shown as it is."""
    assert plain("<b>") == "&lt;b&gt;"
    assert len(plain("x" * 500)) == 60


def test_simulated_modes_have_the_same_arrivals() -> None:
    """The sample runs are a fair comparison: only the mode differs."""
    opened = {
        tuple(each.client_events[0][1] for each in simulated_run(mode, num_requests=9).records)
        for mode in ModeName
    }
    assert len(opened) == 1
