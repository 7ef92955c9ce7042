"""What the controller remembers of its servers, under a fake clock."""

from __future__ import annotations

import pytest

from streamfill.preemption.state import ControllerState
from streamfill.preemption.timeouts import REFRESH_S, SERVER_TIMEOUT_S
from tests.unit.preemption.builders import report, stream


@pytest.fixture
def state() -> ControllerState:
    return ControllerState(epoch=5)


def test_first_report_is_answered_with_a_plan(state: ControllerState) -> None:
    """A server's first report gets a plan of this epoch for this server."""
    plan = state.receive(report(stream(1, idle_s=1), stream(2, idle_s=2)), now_s=0.0)
    assert plan is not None
    assert (plan.server_id, plan.epoch, plan.version) == ("prefill-0", 5, 1)
    assert [entry.stream_id for entry in plan.victims] == [2, 1]


def test_unchanged_order_is_silent_until_the_refresh(state: ControllerState) -> None:
    """Ageing alone makes no new plan; the old one, unchanged, is sent again when its time comes."""
    first = state.receive(report(stream(1, idle_s=1.0)), now_s=0.0)
    assert state.receive(report(stream(1, idle_s=1.5), number=2), now_s=REFRESH_S / 2) is None
    refreshed = state.receive(report(stream(1, idle_s=2.0), number=3), now_s=REFRESH_S)
    assert refreshed is first
    assert state.receive(report(stream(1, idle_s=2.5), number=4), now_s=REFRESH_S * 1.5) is None


def test_changed_order_makes_a_new_version_at_once(state: ControllerState) -> None:
    """A stream that became active changes the plan without waiting for the refresh."""
    state.receive(report(stream(1), stream(2)), now_s=0.0)
    plan = state.receive(report(stream(1, active=True), stream(2), number=2), now_s=0.01)
    assert plan is not None
    assert plan.version == 2
    assert [entry.stream_id for entry in plan.victims] == [2, 1]


def test_versions_grow_over_all_servers(state: ControllerState) -> None:
    """No two plans of an epoch share a version, so a forgotten server can never meet its past."""
    plans = [state.receive(report(stream(1), server_id=f"prefill-{i}"), 0.0) for i in range(3)]
    assert [plan.version for plan in plans if plan is not None] == [1, 2, 3]


@pytest.mark.parametrize("number", [4, 5])
def test_old_report_is_dropped(state: ControllerState, number: int) -> None:
    """A repeated or overtaken report changes nothing and is counted."""
    state.receive(report(stream(1), stream(2), number=5), now_s=0.0)
    assert state.receive(report(stream(1), number=number), now_s=5.0) is None
    assert state.status(0).num_streams == 2
    assert state.num_stale_reports == 1


def test_new_incarnation_replaces_the_old_one(state: ControllerState) -> None:
    """A restarted server starts over; late frames of its former life are dropped."""
    state.receive(report(stream(1), stream(2), incarnation=7, number=50), now_s=0.0)
    plan = state.receive(report(stream(9), incarnation=8, number=1), now_s=0.0)
    assert plan is not None
    assert [entry.stream_id for entry in plan.victims] == [9]
    assert state.receive(report(stream(1), incarnation=7, number=51), now_s=0.0) is None
    assert state.num_stale_reports == 1
    assert state.status(0).num_streams == 1


def test_silent_server_is_forgotten(state: ControllerState) -> None:
    """A server is forgotten exactly after its time-out, and introduced anew by its next report."""
    assert state.next_expiry_s() is None
    state.receive(report(stream(1)), now_s=100.0)
    state.receive(report(stream(1), server_id="prefill-1"), now_s=103.0)
    assert state.next_expiry_s() == 100.0 + SERVER_TIMEOUT_S
    assert state.expire(99.99 + SERVER_TIMEOUT_S) == ()
    assert state.expire(100.0 + SERVER_TIMEOUT_S) == ("prefill-0",)
    assert state.status(0).num_servers == 1
    again = state.receive(report(stream(1), number=2), now_s=200.0)
    assert again is not None
    assert again.version == 3


def test_status_counts(state: ControllerState) -> None:
    """The status tells epoch, servers, streams, plans and malformed frames."""
    state.receive(report(stream(1), stream(2)), now_s=0.0)
    state.receive(report(stream(3), server_id="prefill-1"), now_s=0.0)
    status = state.status(num_malformed_frames=4)
    assert (status.epoch, status.num_servers, status.num_streams) == (5, 2, 3)
    assert (status.num_plans, status.num_malformed_frames) == (2, 4)
