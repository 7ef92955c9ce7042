"""Made-up snapshots and stories, for the property tests of this folder."""

from __future__ import annotations

from random import Random

from hypothesis import strategies as st

from streamfill.scheduling.harness import ContextChange, ServerModel, StreamStory
from streamfill.scheduling.snapshot import (
    ContextMode,
    Experience,
    Habits,
    Snapshot,
    StepCosts,
    StreamView,
)
from streamfill.stream.ids import StreamId
from tests.unit.scheduling.builders import snapshot, stream

EXPERIENCES = (
    Experience(),
    Experience(
        costs=StepCosts(fixed_s=0.01, per_token_s=0.01),
        habits=(Habits(expected_more=(8.0, 3.0, 1.0), gap_s=0.5), Habits(gap_s=4.0)),
    ),
    Experience(costs=StepCosts(fixed_s=1.0, per_token_s=0.0001)),
)


def made_view(stream_id: int, random: Random, commits: float = 0.5) -> StreamView:
    """A view as it may be, in ``commits`` of the cases committed. Of few different times, so that
    some are equal."""

    def time_s() -> float:
        return float(random.randint(0, 8))

    known = random.randint(1, 400)
    computed = random.choice((0, known, random.randint(0, known)))
    is_committed = random.random() < commits
    in_flight = random.random() < 0.2
    evictable = 0 if in_flight else random.choice((0, computed, random.randint(0, computed)))
    return stream(
        stream_id,
        known,
        computed,
        committed_s=time_s() if is_committed else None,
        pending_since_s=time_s(),
        last_segment_s=time_s(),
        arrival_s=time_s(),
        reached=random.choice((computed, known, random.randint(computed, known))),
        evictable=evictable,
        shared=random.choice((0, evictable // 2, evictable)),
        priority=random.randint(-1, 1),
        in_flight=in_flight,
        waiting_on_memory=in_flight and random.random() < 0.2,
        mode=random.choice(list(ContextMode)),
        ttft_slo_s=random.choice((None, None, 0.1, 30.0)),
        gaps_s=tuple(float(random.randint(0, 3)) for _ in range(random.randint(0, 3))),
        num_segments=random.randint(1, 3),
        awaits_commit=not is_committed and random.random() < 0.15,
    )


seeds = st.integers(0, (1 << 32) - 1)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    """Hypothesis draws how many streams there are and one seed for all the rest: a hundred times
    as fast as drawing each value, and what fails is still shown with the fewest streams."""
    num_streams, seed = draw(st.sampled_from([0, 1, 2, 3, 5, 7, 8, 8, 8])), draw(seeds)
    random = Random(seed * 9 + 8)
    commits = random.choice((0.0, 0.2, 0.8))
    streams = [made_view(i, Random(seed * 9 + i), commits) for i in range(num_streams)]
    num_owned = sum(view.num_evictable_tokens for view in streams)
    standing = list(range(num_streams)) if random.random() < 0.5 else []
    random.shuffle(standing)
    return snapshot(
        *streams,
        budget=random.choice((random.randint(0, 40), random.randint(0, 600))),
        max_requests=random.choice((0, 1, 2, 4, 6, 6, 6, 6)),
        free=random.choice((0, random.randint(0, 100), random.randint(0, 800))),
        evictable=num_owned + random.choice((0, random.randint(0, 100))),
        page_size=random.choice((1, 4, 16)),
        experience=random.choice(EXPERIENCES),
        standing_order=tuple(standing),
        now_s=random.choice((8.0, 8.02, 100.0)),
    )


@st.composite
def stories(draw: st.DrawFn, *, most: int = 7, all_commit: bool = False) -> list[StreamStory]:
    """What some clients do. ``all_commit``: every stream is committed, and none is cancelled."""
    return [
        draw(_story(StreamId(stream_id), all_commit))
        for stream_id in range(draw(st.integers(1, most)))
    ]


@st.composite
def _story(draw: st.DrawFn, stream_id: StreamId, must_commit: bool) -> StreamStory:
    is_append = draw(st.booleans())
    at_s = opened_s = draw(st.integers(0, 20)) / 10
    known = 0
    changes: list[ContextChange] = []
    num_changes = draw(st.integers(1, 4))
    for number in range(num_changes):
        keep = known if is_append else draw(st.integers(0, known))
        num_new = draw(st.integers(1, 300))
        changes.append(ContextChange(at_s=at_s, keep_tokens=keep, num_new_tokens=num_new))
        known = keep + num_new
        if number < num_changes - 1:
            at_s += draw(st.sampled_from([0.0, 0.1, 0.3, 1.0, 3.0]))
    committed_s: float | None = at_s + draw(st.sampled_from([0.0, 0.0, 0.2, 2.0]))
    cancelled_s: float | None = None
    if not must_commit:
        if draw(st.integers(0, 5)) == 0:
            committed_s = None
        if draw(st.integers(0, 3)) == 0:
            cancelled_s = opened_s + draw(st.integers(0, 60)) / 10
    if committed_s is not None and draw(st.booleans()):
        last = changes.pop()
        changes.append(
            ContextChange(
                at_s=last.at_s,
                keep_tokens=last.keep_tokens,
                num_new_tokens=last.num_new_tokens,
                with_commit=True,
            )
        )
    return StreamStory(
        stream_id=stream_id,
        mode=ContextMode.APPEND if is_append else ContextMode.UPDATE,
        opened_s=opened_s,
        changes=tuple(changes),
        committed_s=committed_s,
        cancelled_s=cancelled_s,
        priority=draw(st.integers(-1, 1)),
        ttft_slo_s=draw(st.sampled_from([None, None, 0.2, 8.0])),
    )


def longest(told: list[StreamStory]) -> int:
    """Most tokens that one of the streams ever has."""
    most = 0
    for story in told:
        known = 0
        for change in story.changes:
            known = min(change.keep_tokens, known) + change.num_new_tokens
            most = max(most, known)
    return most


@st.composite
def servers(draw: st.DrawFn, told: list[StreamStory], *, plenty: bool = False) -> ServerModel:
    """A server that can hold each of the streams, and hardly more unless ``plenty``."""
    page_size = draw(st.sampled_from([1, 4, 16]))
    spare = 100_000 if plenty else draw(st.integers(0, 300))
    return ServerModel(
        costs=StepCosts(fixed_s=0.05, per_token_s=draw(st.sampled_from([0.0025, 0.0001]))),
        step_tokens=draw(st.integers(max(40, 2 * page_size), 300)),
        max_requests=draw(st.integers(1, 4)),
        pool_tokens=longest(told) + 2 * page_size + spare,
        page_size=page_size,
        num_layers=draw(st.sampled_from([0, 5])),
    )
