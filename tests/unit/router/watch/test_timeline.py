"""A timeline says of a lifetime what a page draws, and at each look only what is new."""

from __future__ import annotations

from router.watch.timeline import MAX_ROWS, Rows, Timeline
from streamfill.observability.lifetime import Lifetime
from streamfill.observability.lifetime import LifetimeEvent as Event


class Clock:
    """Says the time that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def to_ms(at_s: float) -> int:
    return round(1000 * at_s)


def story() -> Lifetime:
    """Two segments of which the second one is computed with the commit, a hand-off, three
    tokens."""
    clock = Clock()
    life = Lifetime(clock)
    for at_s, event, segment in (
        (1.0, Event.OPENED, None),
        (1.1, Event.SEGMENT_RECEIVED, 0),
        (1.2, Event.SEGMENT_SENT, 0),
        (1.5, Event.SEGMENT_COMPUTED, 0),
        (2.0, Event.SEGMENT_RECEIVED, 1),
        (2.1, Event.SEGMENT_SENT, 1),
        (2.2, Event.COMMIT_RECEIVED, None),
        (2.6, Event.FIRST_TOKEN, None),
    ):
        clock.now_s = at_s
        life.record(event, segment=segment)
    life.record(Event.COMPUTE_STARTED, at_s=1.25, reason="segment")
    life.record(Event.COMPUTE_DONE, at_s=1.45, num_tokens=96, reason="segment")
    life.record(Event.COMPUTE_STARTED, at_s=2.3, reason="commit")
    life.record(Event.COMPUTE_DONE, at_s=2.55, num_tokens=33, reason="commit")
    life.record(Event.PREEMPTED_SWAP, at_s=1.8, num_tokens=64, reason="no_memory")
    for at_s, event in (
        (2.6, Event.HANDOFF_STARTED),
        (2.7, Event.SECOND_TOKEN),
        (2.75, Event.HANDOFF_DONE),
        (2.8, Event.TOKEN),
    ):
        clock.now_s = at_s
        life.record(event)
    return life


def test_all_of_a_life_is_there() -> None:
    """Arrivals, runs, losses and moments, in milliseconds."""
    timeline = Timeline(to_ms)
    timeline.read(story().entries)
    assert timeline.segments.since(0) == [[0, 1100, 1200, 1500], [1, 2000, 2100, None]]
    assert timeline.runs.since(0) == [
        [0, 1250, 1450, 96, "segment"],
        [1, 2300, 2550, 33, "commit"],
    ]
    assert timeline.preemptions.since(0) == [[0, 1800, "swap", 64, "no_memory"]]
    moments = timeline.moments
    assert (moments.commit_ms, moments.first_token_ms, moments.newest_token_ms) == (
        2200,
        2600,
        2800,
    )
    assert (moments.handoff_started_ms, moments.handoff_done_ms) == (2600, 2750)


def test_reading_bit_by_bit_gives_the_same() -> None:
    """Whoever looked from the beginning sees what a late comer sees."""
    entries = story().entries
    late, early = Timeline(to_ms), Timeline(to_ms)
    late.read(entries)
    for length in range(len(entries) + 1):
        early.read(entries[:length])
    assert early.moments == late.moments
    for kind in ("segments", "runs", "preemptions"):
        assert getattr(early, kind).since(0) == getattr(late, kind).since(0)


def test_only_what_changed_is_told_again() -> None:
    """A segment that is computed comes again, the other one does not; nothing new is None."""
    entries = story().entries
    timeline = Timeline(to_ms)
    timeline.read(entries[:3])
    stamp = timeline.stamp
    timeline.read(entries[:3])
    assert timeline.stamp == stamp
    assert timeline.segments.since(stamp) is None
    timeline.read(entries[:5])
    assert timeline.segments.since(stamp) == [[0, 1100, 1200, 1500], [1, 2000, None, None]]
    stamp = timeline.stamp
    timeline.read(entries[:6])
    assert timeline.segments.since(stamp) == [[1, 2000, 2100, None]]
    assert timeline.moments_stamp == 0


def test_the_oldest_rows_are_forgotten() -> None:
    """However many segments there are, so that memory is bounded; numbers stay."""
    life = Lifetime(lambda: 1.0)
    life.record(Event.OPENED)
    for number in range(3 * MAX_ROWS):
        life.record(Event.SEGMENT_RECEIVED, segment=number)
        life.record(Event.SEGMENT_SENT, segment=number)
    life.record(Event.SEGMENT_COMPUTED, segment=0)
    timeline = Timeline(to_ms)
    timeline.read(life.entries)
    rows = timeline.segments.since(0)
    assert rows is not None
    assert [row[0] for row in rows] == list(range(2 * MAX_ROWS, 3 * MAX_ROWS))


def test_samples_stand_in_for_runs() -> None:
    """Growth between two samples is placed no earlier than its segment was sent and no later than
    it was computed."""
    entries = story().entries
    timeline = Timeline(to_ms)
    timeline.sample(0, 1000, is_first_token_out=False)
    timeline.read(entries[:4])
    timeline.sample(96, 2000, is_first_token_out=False)
    timeline.sample(96, 2500, is_first_token_out=False)
    assert timeline.progress.since(0) == [[0, 1200, 1500, 96]]
    timeline.read(entries[:6])
    timeline.sample(110, 3000, is_first_token_out=False)
    assert timeline.progress.since(0) == [[0, 1200, 1500, 96], [1, 2500, 3000, 110]]
    timeline.sample(129, 3500, is_first_token_out=True)
    timeline.sample(50, 4000, is_first_token_out=False)
    assert len(timeline.progress) == 2


def test_rows_keep_their_numbers() -> None:
    """A row that is put again counts as new, and keeps its place."""
    rows = Rows(max_rows=2)
    rows.append(["a"], 1)
    rows.append(["b"], 1)
    rows.put(0, ["c"], 2)
    assert rows.since(1) == [[0, "c"]]
    rows.append(["d"], 3)
    assert rows.since(0) == [[0, "c"], [2, "d"]]
