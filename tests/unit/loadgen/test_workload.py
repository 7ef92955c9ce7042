"""A trace as something to replay, and the schedule by which the generator measures itself."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from streamfill.loadgen.steady_schedule import SteadySchedule
from streamfill.loadgen.workload import read_workload
from streamfill.messages.common import StreamMode
from streamfill.traces.files import TraceWriter
from streamfill.traces.format import SCHEMA_VERSION, Document, Request, Segment, TraceHeader


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three requests; the last one replaces its context."""
    path = tmp_path / "trace.jsonl"
    with TraceWriter(path, TraceHeader(schema=SCHEMA_VERSION, name="three")) as writer:
        writer.add_document(Document(id="d", text="document"))
        for number in range(3):
            mode = StreamMode.UPDATE if number == 2 else StreamMode.APPEND
            segments = (Segment(document_ids=("d",)), Segment(delay_ms=400.0, text="more"))
            writer.add_request(
                Request(id=f"q{number}", arrival_ms=1000.0 * number, mode=mode, segments=segments)
            )
    return path


def test_what_is_known_after_one_pass(trace: Path) -> None:
    """Enough to draw arrivals and to choose modes."""
    workload = read_workload(trace)
    assert workload.name == "three"
    assert workload.arrivals_s == (0.0, 1.0, 2.0)
    assert workload.durations_s == (0.4, 0.4, 0.4)
    assert (workload.num_requests, workload.num_pieces, workload.has_updates) == (3, 6, True)


def test_a_limit_takes_the_first_requests(trace: Path) -> None:
    """What comes later has no effect on what is known."""
    workload = read_workload(trace, limit=2)
    assert (workload.num_requests, workload.has_updates) == (2, False)
    assert [one.request_id for one in workload.scripts(1000)] == ["q0", "q1"]


def test_a_scale_stretches_all_times(trace: Path) -> None:
    """Arrivals and delays alike."""
    workload = read_workload(trace, time_scale=0.5)
    assert workload.arrivals_s == (0.0, 0.5, 1.0)
    assert workload.durations_s == pytest.approx((0.2, 0.2, 0.2))
    first = next(iter(workload.scripts(1000)))
    assert first.commit_due_s == pytest.approx(0.2)


def test_scripts_can_be_made_again(trace: Path) -> None:
    """Each run of a comparison reads the file anew and gets the same."""
    workload = read_workload(trace)
    assert list(workload.scripts(1000)) == list(workload.scripts(1000))


def test_the_steady_schedule_is_steady() -> None:
    """Pieces of all streams together are due at equal distances, in the number asked for."""
    schedule = SteadySchedule(num_streams=20, appends_per_s=100.0, duration_s=2.0, piece_bytes=50)
    dues_s = sorted(one.arrival_s + step.due_s for one in schedule.scripts() for step in one.steps)
    assert len(dues_s) == 200
    assert all(after - before == pytest.approx(0.01) for before, after in pairwise(dues_s))
    pieces = [step.piece for one in schedule.scripts() for step in one.steps]
    assert {len(piece) for piece in pieces} == {50}
    assert [one.arrival_s for one in schedule.scripts()] == schedule.starts_s


def test_more_streams_than_pieces_send_one_each() -> None:
    """The schedule is longer then than was asked for."""
    schedule = SteadySchedule(num_streams=9, appends_per_s=1.0, duration_s=2.0, piece_bytes=4)
    assert schedule.num_rounds == 1
