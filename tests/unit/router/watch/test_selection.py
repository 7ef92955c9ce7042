"""Which streams are shown, and in which order."""

from __future__ import annotations

import pytest

from router.watch.selection import first, matching, may_see
from router.watch.wish import Show, Sort, WatchWish
from streamfill.stream.state import StreamState
from tests.unit.router.watch.facts import facts

BY_STATE = [facts(n, state=state.value) for n, state in enumerate(StreamState)]


@pytest.mark.parametrize(
    ("show", "states"),
    [
        (Show.ALL, set(StreamState)),
        (Show.LIVE, {"OPEN", "COMMITTED", "DECODING"}),
        (Show.OPEN, {"OPEN"}),
        (Show.COMMITTED, {"COMMITTED"}),
        (Show.DECODING, {"DECODING"}),
        (Show.ENDED, {"DONE", "ABORTED", "REJECTED", "FAILED", "DEADLINE"}),
        (Show.FAILED, {"REJECTED", "FAILED", "DEADLINE"}),
    ],
)
def test_states(show: Show, states: set[str]) -> None:
    """Each choice lets just these through."""
    assert {each.state for each in matching(BY_STATE, WatchWish(show=show))} == states


@pytest.mark.parametrize(
    ("search", "numbers"),
    [
        ("", ["1", "2", "31"]),
        ("1", ["1", "31"]),
        ("AGENT-7", ["2"]),
        ("acme", ["31"]),
        ("prefill-1", ["31"]),
        ("decode-9", ["2"]),
        ("nothing", []),
    ],
)
def test_search(search: str, numbers: list[str]) -> None:
    """In ids, request ids, tenants and servers, whatever the case."""
    streams = [
        facts(1),
        facts(2, request_id="agent-7", decode_server="decode-9"),
        facts(31, tenant="Acme", prefill_server="prefill-1"),
    ]
    assert [each.id for each in matching(streams, WatchWish(search=search))] == numbers


@pytest.mark.parametrize(
    ("sort", "numbers"),
    [
        (Sort.NEWEST, ["10", "3", "2", "1"]),
        (Sort.OLDEST, ["1", "2", "3", "10"]),
        (Sort.WAITING, ["2", "1", "3", "10"]),
        (Sort.LARGEST, ["10", "2", "1", "3"]),
        (Sort.TROUBLED, ["3", "1", "10", "2"]),
        (Sort.ID, ["1", "2", "3", "10"]),
    ],
)
def test_order(sort: Sort, numbers: list[str]) -> None:
    """Each choice puts these first; an ended stream waits for nothing."""
    streams = [
        facts(1, num_invalidated_tokens=5),
        facts(2, num_known_tokens=90),
        facts(3, num_attempts=2),
        facts(10, num_known_tokens=900, state="FAILED", ended_ms=5),
    ]
    assert [each.id for each in first(streams, WatchWish(sort=sort))] == numbers
    assert [each.id for each in first(streams, WatchWish(sort=sort, limit=2))] == numbers[:2]


def test_a_tenant_sees_its_own() -> None:
    """And an operator everybody's."""
    streams = [facts(1, tenant="a"), facts(2, tenant="b"), facts(3)]
    assert [each.id for each in may_see(streams, "a")] == ["1"]
    assert [each.id for each in may_see(streams, "")] == ["3"]
    assert len(may_see(streams, None)) == 3
