"""The first preemption rule, and the plan in force that builds on it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.messages.control import Plan, PlanEntry, PreemptionAction, StreamTelemetry
from streamfill.preemption.rule import rank_victims
from streamfill.preemption.standing import PlanSource, StandingPlan
from tests.unit.preemption.builders import stream

KEEP, RECOMPUTE, SWAP = PreemptionAction.KEEP, PreemptionAction.RECOMPUTE, PreemptionAction.SWAP

streams_strategy = st.lists(
    st.builds(
        stream,
        st.integers(1, 20),
        idle_s=st.sampled_from([0.0, 0.5, 1.0, 30.0]),
        priority=st.integers(-1, 1),
        active=st.booleans(),
        committed=st.booleans(),
    ),
    max_size=12,
    unique_by=lambda each: each.stream_id,
)


def _ids(entries: Sequence[PlanEntry]) -> list[int]:
    return [entry.stream_id for entry in entries]


def _plan(*entries: tuple[int, PreemptionAction], version: int = 1) -> Plan:
    return Plan(
        server_id="prefill-0",
        epoch=1,
        version=version,
        victims=tuple(PlanEntry(stream_id=i, action=action, reason="") for i, action in entries),
    )


def test_least_recently_extended_first() -> None:
    """Of idle streams the one that waited longest is the first victim, to be recomputed."""
    entries = rank_victims([stream(1, idle_s=2.0), stream(2, idle_s=9.0), stream(3, idle_s=5.0)])
    assert _ids(entries) == [2, 3, 1]
    assert {entry.action for entry in entries} == {RECOMPUTE}
    assert entries[0].reason.startswith("idle for 9.0 s, expected back in 9.0 s, frees 100 tokens")


def test_equals_by_priority_then_id() -> None:
    """Equally idle streams go by lower priority, then by lower id."""
    entries = rank_victims([stream(3), stream(2, priority=5), stream(1), stream(4, priority=-1)])
    assert _ids(entries) == [4, 1, 3, 2]


def test_wanted_streams_are_kept() -> None:
    """Active and committed streams come last and are kept, however long they are idle."""
    entries = rank_victims(
        [stream(1, committed=True, idle_s=99), stream(2, active=True, idle_s=50), stream(3)]
    )
    assert [(entry.stream_id, entry.action) for entry in entries] == [
        (3, RECOMPUTE),
        (2, KEEP),
        (1, KEEP),
    ]


@given(streams_strategy, st.randoms(use_true_random=False))
def test_rank_depends_on_the_set_only(streams: list[StreamTelemetry], random: object) -> None:
    """Every stream is ranked once, whatever the order of the report."""
    entries = rank_victims(streams)
    shuffled = list(streams)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert rank_victims(shuffled) == entries
    assert sorted(_ids(entries)) == sorted(each.stream_id for each in streams)


def test_local_rule_before_any_plan() -> None:
    """Without a plan the order is the local rule's, and its version is 0."""
    standing = StandingPlan()
    streams = [stream(1, idle_s=1), stream(2, idle_s=2)]
    standing.update(None, controller_alive=True)
    assert standing.order(streams) == [2, 1]
    assert (standing.source, standing.version) == (PlanSource.LOCAL, 0)


def test_plan_orders_what_it_knows_and_new_streams_follow() -> None:
    """The controller's order holds; streams that it did not rank follow by the local rule."""
    standing = StandingPlan()
    standing.update(_plan((1, SWAP), (2, RECOMPUTE), (99, SWAP)), controller_alive=True)
    streams = [stream(i, idle_s=i) for i in (1, 2, 3, 4)]
    ranking = standing.ranking(streams)
    assert _ids(ranking) == [1, 2, 4, 3]
    assert ranking[0].action is SWAP
    assert (standing.source, standing.version) == (PlanSource.CONTROLLER, 1)


@pytest.mark.parametrize("flag", ["active", "committed"])
def test_server_knows_better_who_is_wanted(flag: str) -> None:
    """A stream that the plan gives up but that is wanted by now is kept, and ranked last."""
    standing = StandingPlan()
    standing.update(_plan((1, RECOMPUTE), (2, RECOMPUTE)), controller_alive=True)
    wanted = stream(1, active=flag == "active", committed=flag == "committed")
    ranking = standing.ranking([wanted, stream(2)])
    assert [(entry.stream_id, entry.action) for entry in ranking] == [(2, RECOMPUTE), (1, KEEP)]


def test_silent_controller_means_local_rule_until_it_speaks() -> None:
    """A silent controller's plan is out of force, and in force again when it is heard."""
    standing = StandingPlan()
    streams = [stream(1, idle_s=1), stream(2, idle_s=2)]
    standing.update(_plan((1, RECOMPUTE), (2, RECOMPUTE)), controller_alive=True)
    assert standing.order(streams) == [1, 2]
    standing.update(None, controller_alive=False)
    assert standing.order(streams) == [2, 1]
    assert (standing.source, standing.version) == (PlanSource.LOCAL, 0)
    standing.update(None, controller_alive=True)
    assert standing.order(streams) == [1, 2]


@given(
    streams_strategy,
    st.lists(st.tuples(st.integers(1, 20), st.sampled_from(list(PreemptionAction)))),
)
def test_merged_ranking_is_complete_and_safe(
    streams: list[StreamTelemetry], entries: list[tuple[int, PreemptionAction]]
) -> None:
    """Whatever the plan says: every stream once, kept ones behind all victims, wanted ones kept."""
    standing = StandingPlan()
    standing.update(_plan(*entries), controller_alive=True)
    ranking = standing.ranking(streams)
    assert sorted(_ids(ranking)) == sorted(each.stream_id for each in streams)
    wanted = {each.stream_id for each in streams if each.active or each.committed}
    kept = [entry.action is KEEP for entry in ranking]
    assert kept == sorted(kept)
    assert {entry.stream_id for entry in ranking if entry.action is KEEP} == wanted
