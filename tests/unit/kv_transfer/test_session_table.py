"""Who gets a session, without sockets."""

from __future__ import annotations

import msgspec
import pytest
import torch

from streamfill.kv_transfer.session_table import MAX_SESSIONS, SessionTable
from streamfill.kv_transfer.slices import HeadShare
from streamfill.messages.handoff import PROTOCOL_VERSION
from tests.unit.kv_transfer.builders import LAYOUT, hello


@pytest.fixture
def table() -> SessionTable:
    return SessionTable(LAYOUT, HeadShare(LAYOUT.num_kv_heads), torch.device("cpu"))


def test_a_repeated_hello_changes_nothing(table: SessionTable) -> None:
    """The sender repeats it until it hears something."""
    first = table.greet(b"r1", hello(), now_s=1.0)
    again = table.greet(b"r1", hello(), now_s=2.0)
    assert first.session is not None
    assert again.session is first.session
    assert again.replaced is None
    assert len(table) == 1


def test_a_newer_attempt_replaces_and_an_older_one_is_dropped(table: SessionTable) -> None:
    """Frames of two sockets of one sender may overtake each other."""
    first = table.greet(b"r1", hello(attempt=1), now_s=1.0).session
    second = table.greet(b"r2", hello(attempt=2), now_s=2.0)
    assert first is not None
    assert second.session is not None
    assert second.replaced is first
    assert second.session.epoch > first.epoch
    assert not table.is_current(first)
    assert table.find(b"r1", first.epoch) is None
    assert table.find(b"r2", first.epoch) is None
    late = table.greet(b"r1", hello(attempt=1), now_s=3.0)
    assert (late.session, late.replaced, late.refusal) == (None, None, None)
    assert table.find(b"r2", second.session.epoch) is second.session


def test_an_old_incarnation_stays_out(table: SessionTable) -> None:
    """Two processes of one name would otherwise take the session from each other for ever."""
    table.greet(b"r1", hello(incarnation=1, attempt=5), now_s=1.0)
    new = table.greet(b"r2", hello(incarnation=2), now_s=2.0).session
    assert new is not None
    zombie = table.greet(b"r3", hello(incarnation=1, attempt=6), now_s=3.0)
    assert zombie.session is None
    assert "took over" in (zombie.refusal or "")
    assert table.is_current(new)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"protocol_version": 99}, f"protocol version is {PROTOCOL_VERSION} here and 99 there"),
        ({"backend": "nccl"}, "gloo here and by nccl there"),
        (
            {"layout": msgspec.structs.replace(LAYOUT, dtype="float16")},
            "dtype is float32 here and float16 there",
        ),
    ],
)
def test_who_does_not_fit_is_told_why(
    table: SessionTable, change: dict[str, object], complaint: str
) -> None:
    """And does not end the session of its predecessor."""
    table.greet(b"r1", hello(), now_s=1.0)
    other = msgspec.structs.replace(hello(attempt=2), **change)
    greeting = table.greet(b"r2", other, now_s=2.0)
    assert complaint in (greeting.refusal or "")
    assert greeting.session is None
    assert len(table) == 1


def test_sessions_are_bounded(table: SessionTable) -> None:
    """A flood of names cannot take all memory."""
    for number in range(MAX_SESSIONS):
        table.greet(str(number).encode(), hello(server_id=f"p{number}"), now_s=1.0)
    greeting = table.greet(b"more", hello(server_id="more"), now_s=1.0)
    assert "sessions are open already" in (greeting.refusal or "")


def test_an_old_incarnation_stays_out_whose_session_had_ended(table: SessionTable) -> None:
    """It was silent while its successor came. The successor is not taken for the older one."""
    old = table.greet(b"r1", hello(incarnation=1), now_s=1.0).session
    assert old is not None
    table.end(old)
    new = table.greet(b"r2", hello(incarnation=2), now_s=2.0).session
    assert new is not None
    zombie = table.greet(b"r3", hello(incarnation=1, attempt=2), now_s=3.0)
    assert "took over" in (zombie.refusal or "")
    assert table.is_current(new)
    table.end(new)
    assert table.greet(b"r4", hello(incarnation=2, attempt=2), now_s=4.0).session is not None


def test_a_hello_that_is_repeated_over_another_connection_is_answered_there(
    table: SessionTable,
) -> None:
    """The first one broke before its answer came; nobody hears what is said on it."""
    first = table.greet(b"r1", hello(), now_s=1.0)
    again = table.greet(b"r2", hello(), now_s=2.0)
    assert again.session is not None
    assert again.session.route == b"r2"
    assert again.replaced is first.session
    assert table.find(b"r2", again.session.epoch) is again.session
    assert len(table) == 1
