"""Latency figures follow from lifetime events."""

from __future__ import annotations

import pytest

from streamfill.observability import lifetime as lt
from streamfill.observability.lifetime import Lifetime, LifetimeEntry, LifetimeEvent

E = LifetimeEvent


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def recorded(*events: tuple[float, LifetimeEvent]) -> list[lt.LifetimeEntry]:
    life = Lifetime()
    for at_s, event in events:
        life.record(event, at_s=at_s)
    return list(life.entries)


def test_figures_of_a_whole_life() -> None:
    """Each figure is the time between its two events; segments and hand-offs count their last."""
    entries = recorded(
        (0.0, E.OPENED),
        (1.0, E.SEGMENT_RECEIVED),
        (3.0, E.SEGMENT_RECEIVED),
        (4.0, E.COMMIT_RECEIVED),
        (4.25, E.HANDOFF_STARTED),
        (4.5, E.FIRST_TOKEN),
        (4.75, E.HANDOFF_DONE),
        (5.0, E.SECOND_TOKEN),
        (5.25, E.TOKEN),
        (6.0, E.LAST_TOKEN),
        (6.5, E.DONE),
    )
    assert lt.ttft_from_commit_s(entries) == 0.5
    assert lt.ttft_from_last_segment_s(entries) == 1.5
    assert lt.ttft_from_open_s(entries) == 4.5
    assert lt.handoff_s(entries) == 0.5
    assert lt.second_token_gap_s(entries) == 0.5
    assert lt.e2e_s(entries) == 6.5
    assert lt.inter_token_s(entries) == [0.5, 0.25, 0.75]


def test_a_life_that_broke_off_has_no_figures_for_what_did_not_happen() -> None:
    """A missing event gives None or nothing, never a number."""
    entries = recorded((0.0, E.OPENED), (1.0, E.HANDOFF_STARTED), (2.0, E.ABORTED))
    assert lt.ttft_from_commit_s(entries) is None
    assert lt.ttft_from_last_segment_s(entries) is None
    assert lt.ttft_from_open_s(entries) is None
    assert lt.handoff_s(entries) is None
    assert lt.inter_token_s(entries) == []
    assert lt.e2e_s(entries) == 2.0
    assert lt.e2e_s(entries[:2]) is None
    assert lt.e2e_s([]) is None


def test_a_failed_hand_off_has_no_duration() -> None:
    """An end that lies before the latest start belongs to an earlier attempt."""
    entries = recorded((1.0, E.HANDOFF_STARTED), (2.0, E.HANDOFF_DONE), (3.0, E.HANDOFF_STARTED))
    assert lt.handoff_s(entries) is None


def computed(*runs: tuple[float, float, int]) -> list[LifetimeEntry]:
    """The events of runs, as a router records them: each run's together."""
    entries: list[LifetimeEntry] = []
    for start_s, end_s, num_tokens in runs:
        entries.append(LifetimeEntry(E.COMPUTE_STARTED, start_s))
        entries.append(LifetimeEntry(E.COMPUTE_DONE, end_s, None, num_tokens))
    return entries


def test_overlapping_runs_of_several_requests_are_all_there() -> None:
    """Two requests of one client may compute at the same time."""
    entries = [
        LifetimeEntry(E.COMPUTE_STARTED, 1.0),
        LifetimeEntry(E.COMPUTE_STARTED, 1.5),
        LifetimeEntry(E.COMPUTE_DONE, 2.0, None, 1),
        LifetimeEntry(E.COMPUTE_DONE, 2.5, None, 2),
    ]
    assert lt.compute_intervals(entries) == [(1.0, 2.0, 1), (1.5, 2.5, 2)]


def test_compute_intervals_are_in_order_of_time() -> None:
    """Whatever the order of recording; runs that touch stay apart, one without an end is left
    out."""
    entries = [
        *computed((4.0, 5.0, 3), (1.0, 2.0, 1), (2.0, 2.5, 2)),
        LifetimeEntry(E.COMPUTE_STARTED, 6.0),
    ]
    assert lt.compute_intervals(entries) == [(1.0, 2.0, 1), (2.0, 2.5, 2), (4.0, 5.0, 3)]
    assert lt.compute_s(entries) == 2.5
    assert lt.compute_intervals([LifetimeEntry(E.COMPUTE_DONE, 1.0, None, 5)]) == []


@pytest.mark.parametrize(
    ("segments_s", "ratio"),
    [((0.5,), 0.0), ((0.5, 2.0), 0.25), ((0.5, 3.5), 0.5), ((0.5, 4.5), 0.625), ((0.5, 9.0), 1.0)],
)
def test_overlap_is_the_share_before_the_last_segment(
    segments_s: tuple[float, ...], ratio: float
) -> None:
    """A run that the last segment falls into counts in part."""
    received = [LifetimeEntry(E.SEGMENT_RECEIVED, at_s, n) for n, at_s in enumerate(segments_s)]
    runs = computed((1.0, 3.0, 20), (4.0, 6.0, 20))
    assert lt.overlap_ratio([*received, *runs]) == ratio


def test_without_compute_or_segments_there_is_no_overlap() -> None:
    """Neither 0 nor 1 would be true."""
    assert lt.overlap_ratio([LifetimeEntry(E.SEGMENT_RECEIVED, 1.0, 0)]) is None
    assert lt.overlap_ratio(computed((1.0, 2.0, 1))) is None
    assert (
        lt.overlap_ratio([LifetimeEntry(E.SEGMENT_RECEIVED, 1.0, 0), *computed((1, 1, 1))]) is None
    )


def test_segments_are_tokenised_and_sent() -> None:
    """One figure per segment that was sent; a second event of the same segment changes nothing."""
    entries = [
        LifetimeEntry(E.SEGMENT_RECEIVED, 1.0, 0),
        LifetimeEntry(E.SEGMENT_RECEIVED, 1.5, 1),
        LifetimeEntry(E.SEGMENT_SENT, 1.25, 0),
        LifetimeEntry(E.SEGMENT_SENT, 2.5, 1),
        LifetimeEntry(E.SEGMENT_SENT, 9.0, 1),
        LifetimeEntry(E.SEGMENT_RECEIVED, 3.0, 2),
    ]
    assert lt.tokenise_s(entries) == [0.25, 1.0]


def test_queueing_is_the_time_without_compute() -> None:
    """Between commit and first token; compute before the commit and after the token is not it."""
    entries = [
        *recorded((2.0, E.COMMIT_RECEIVED), (8.0, E.FIRST_TOKEN)),
        *computed((1.0, 3.0, 5), (4.0, 5.5, 5), (7.5, 9.0, 5)),
    ]
    assert lt.prefill_queue_s(entries) == 3.0
    assert lt.prefill_queue_s(entries[:1]) is None
    assert lt.prefill_queue_s(computed((1.0, 3.0, 5))) is None


@pytest.mark.parametrize(
    ("handoff_s", "queue_s"), [(1.0, 2.0), (3.0, 1.0), (5.0, None), (None, None)]
)
def test_queueing_for_decode_begins_when_token_and_kv_are_there(
    handoff_s: float | None, queue_s: float | None
) -> None:
    """With the later of the two; None where the report of the hand-off came behind the token."""
    entries = recorded((2.0, E.FIRST_TOKEN), (4.0, E.SECOND_TOKEN))
    if handoff_s is not None:
        entries.append(LifetimeEntry(E.HANDOFF_DONE, handoff_s))
    assert lt.decode_queue_s(entries) == queue_s


def test_time_per_output_token() -> None:
    """The mean of the gaps; None without a gap."""
    entries = recorded(
        (1.0, E.FIRST_TOKEN), (3.0, E.SECOND_TOKEN), (4.0, E.TOKEN), (7.0, E.LAST_TOKEN)
    )
    assert lt.tpot_s(entries) == 2.0
    assert lt.tpot_s(entries[:1]) is None
    assert lt.tpot_s([]) is None


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5])
def test_every_token_counts_once(num_tokens: int) -> None:
    """However short the output, its last token is not counted twice."""
    clock = FakeClock()
    life = Lifetime(clock)
    for number in range(num_tokens):
        clock.now_s += 0.5
        life.record_token(is_last=number == num_tokens - 1)
    assert lt.inter_token_s(life.entries) == [0.5] * (num_tokens - 1)
    assert life.entries[-1].event is E.LAST_TOKEN


def test_nothing_follows_an_ending() -> None:
    """An ending is the last event, and its segment numbers are kept."""
    life = Lifetime(FakeClock())
    life.record(E.SEGMENT_SENT, segment=3)
    assert life.entries[0] == LifetimeEntry(E.SEGMENT_SENT, 100.0, 3)
    life.record(E.FAILED)
    with pytest.raises(ValueError, match="DONE after FAILED"):
        life.record(E.DONE)


def test_percentiles_are_interpolated() -> None:
    """Between two values the share counts; of nothing there is none; 101 is no percentage."""
    assert lt.percentiles([4.0, 1.0, 3.0, 2.0], [0, 50, 90, 100]) == {
        0: 1.0,
        50: 2.5,
        90: pytest.approx(3.7),
        100: 4.0,
    }
    assert lt.percentile([], 50) is None
    with pytest.raises(ValueError, match="101"):
        lt.percentile([1.0], 101)
