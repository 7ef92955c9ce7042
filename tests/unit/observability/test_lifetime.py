"""Latency figures follow from lifetime events."""

from __future__ import annotations

import pytest

from streamfill.observability import lifetime as lt
from streamfill.observability.lifetime import Lifetime, LifetimeEvent

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
    assert life.entries[0] == (E.SEGMENT_SENT, 100.0, 3)
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
