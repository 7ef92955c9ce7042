"""What a server knows of a stream."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.messages.common import StreamMode
from streamfill.messages.control import Residency
from streamfill.serving.records import IllegalPhaseError, InFlight, Phase, StreamRecord
from tests.unit.serving.builders import ids_array, tokens


def _record() -> StreamRecord:
    return StreamRecord(
        stream_id=0xABC, attempt=1, mode=StreamMode.UPDATE, priority=3, opened_s=5.0
    )


def test_phases_only_move_forward() -> None:
    """A step back, or on the spot, raises with both phases and the stream's id."""
    record = _record()
    record.advance(Phase.COMMITTED)
    record.advance(Phase.DONE)
    with pytest.raises(IllegalPhaseError, match=r"abc cannot go from DONE to ANSWERING"):
        record.advance(Phase.ANSWERING)
    with pytest.raises(IllegalPhaseError):
        record.advance(Phase.DONE)


def test_an_append_invalidates_nothing() -> None:
    """What was computed stays computed, what came is missing."""
    record = _record()
    record.splice(0, ids_array(tokens(10)), 1.0)
    record.note_computed(10)
    record.splice(10, ids_array([1, 2, 3]), 2.0)
    assert list(record.ids) == [*tokens(10), 1, 2, 3]
    assert (record.num_computed, record.num_missing, record.num_invalidated) == (10, 3, 0)


def test_an_update_invalidates_what_was_computed_behind_the_common_prefix() -> None:
    """Only tokens that had been computed count, and they count each time."""
    record = _record()
    record.splice(0, ids_array(tokens(10)), 1.0)
    record.note_computed(8)
    record.splice(5, ids_array([1]), 2.0)
    assert (record.num_computed, record.num_reached, record.num_invalidated) == (5, 5, 3)
    record.splice(5, ids_array([2]), 3.0)
    assert record.num_invalidated == 3
    record.splice(1, ids_array([]), 4.0)
    assert (list(record.ids), record.num_invalidated) == (tokens(1), 7)


@pytest.mark.parametrize("keep", [-1, 11])
def test_more_cannot_be_kept_than_there_is(keep: int) -> None:
    """The stream is as it was before."""
    record = _record()
    record.splice(0, ids_array(tokens(10)), 1.0)
    with pytest.raises(ValueError, match=f"cannot keep {keep} of 10"):
        record.splice(keep, ids_array([1]), 2.0)
    assert list(record.ids) == tokens(10)


def test_a_request_in_flight_remembers_the_shortest_prefix_that_was_kept() -> None:
    """Growing again afterwards does not make its work useful."""
    record = _record()
    record.splice(0, ids_array(tokens(10)), 1.0)
    record.in_flight = InFlight(key="k", up_to=10, num_new_tokens=10, keep_tokens=10)
    record.splice(4, ids_array(tokens(6, start=2)), 2.0)
    record.splice(10, ids_array([1]), 3.0)
    assert record.in_flight.keep_tokens == 4


def test_a_stream_waits_since_its_oldest_segment_that_lacks_a_whole_page() -> None:
    """Computed segments no longer count, so a stream that never pauses does not stay first for
    ever; less than a page is nothing to wait for."""
    record = _record()
    record.splice(0, ids_array(tokens(20)), 1.0)
    record.splice(20, ids_array(tokens(20)), 2.0)
    record.splice(40, ids_array(tokens(20)), 3.0)
    assert record.pending_since_s(16) == 1.0
    record.note_computed(16)
    assert record.pending_since_s(16) == 2.0
    record.note_computed(32)
    assert record.pending_since_s(16) == 3.0
    assert record.pending_since_s(1) == 2.0


def test_an_update_takes_the_place_of_what_it_replaced() -> None:
    """The kept part keeps its time, the rest has the update's."""
    record = _record()
    record.splice(0, ids_array(tokens(20)), 1.0)
    record.splice(20, ids_array(tokens(20)), 2.0)
    record.splice(30, ids_array(tokens(5)), 3.0)
    assert record.pending_since_s(1) == 1.0
    record.note_computed(25)
    assert record.pending_since_s(1) == 2.0
    record.note_computed(30)
    assert record.pending_since_s(1) == 3.0


_SPLICES = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.floats(0, 1)), max_size=12)


@given(splices=_SPLICES, page_size=st.sampled_from([1, 4]))
def test_the_waiting_time_is_that_of_the_first_page_that_lacks(
    splices: list[tuple[float, int, float]], page_size: int
) -> None:
    """Checked against the arrival time of every single token."""
    record = _record()
    arrivals: list[float] = []
    for number, (kept, num_new, computed) in enumerate(splices, start=1):
        keep = int(kept * len(arrivals))
        record.splice(keep, array("q", range(num_new)), float(number))
        arrivals = arrivals[:keep] + [float(number)] * num_new
        record.note_computed(int(computed * len(arrivals)) // page_size * page_size)
        end = (record.num_computed // page_size + 1) * page_size
        if end <= len(arrivals):
            assert record.pending_since_s(page_size) == arrivals[end - 1]


def test_telemetry_tells_new_context_from_evicted_context() -> None:
    """A stream whose KV was taken is idle, or it could never be a victim again."""
    record = _record()
    assert record.telemetry(9.0, 1).residency is Residency.NONE
    record.splice(0, ids_array(tokens(10)), 6.0)
    report = record.telemetry(9.0, 1)
    assert (report.active, report.committed, report.idle_s, report.priority) == (
        True,
        False,
        3.0,
        3,
    )
    record.note_computed(10)
    assert not record.telemetry(9.0, 1).active
    record.num_computed = 0
    report = record.telemetry(9.0, 1)
    assert (report.active, report.residency) == (False, Residency.NONE)
    record.note_computed(10)
    record.splice(10, ids_array(tokens(5)), 8.5)
    assert not record.telemetry(9.0, 16).active, "less than a page is not computed ahead"
    assert record.telemetry(9.0, 1).active
    assert record.telemetry(9.0, 1).gaps_s == (2.5,)


def test_an_update_invalidates_what_is_in_host_memory_too() -> None:
    """Behind the common prefix nothing of it is of use."""
    record = _record()
    record.splice(0, ids_array(tokens(100)), 1.0)
    record.note_lost(20, 60)
    record.splice(50, ids_array([1]), 2.0)
    assert (record.num_computed, record.num_host) == (20, 30)
    record.splice(10, ids_array([1]), 3.0)
    assert (record.num_computed, record.num_host) == (10, 0)


def test_what_is_computed_or_comes_back_is_no_longer_only_in_host_memory() -> None:
    """Counted once."""
    record = _record()
    record.splice(0, ids_array(tokens(100)), 1.0)
    record.note_lost(20, 60)
    record.note_computed(50)
    assert (record.num_computed, record.num_host) == (50, 30)
    record.note_computed(90)
    assert (record.num_computed, record.num_host) == (90, 0)
