"""Who gets a stream."""

from __future__ import annotations

from typing import Any

import pytest

from router.placement import ServerLoad, ServerState, choose_server
from streamfill.messages.common import Role
from streamfill.stream.ids import ServerId


def load(server_id: str, role: Role = Role.PREFILL, **changes: Any) -> ServerLoad:
    """An idle, living server but for `changes`."""
    values: dict[str, Any] = {
        "state": ServerState.ALIVE,
        "num_streams": 0,
        "pending_tokens": 0,
        "held_tokens": 0,
        "reported_pending_tokens": 0,
        "pool_tokens": 1000,
        **changes,
    }
    return ServerLoad(server_id=ServerId(server_id), role=role, **values)


@pytest.mark.parametrize(
    "busy",
    [
        {"num_streams": 1},
        {"pending_tokens": 100},
        {"reported_pending_tokens": 100},
        {"state": ServerState.SUSPECT},
        {"state": ServerState.DRAINING},
        {"state": ServerState.DEAD},
        {"pool_tokens": 10},
    ],
)
def test_the_less_loaded_prefill_server_is_taken(busy: dict[str, Any]) -> None:
    """Whatever speaks against the first one, the second is taken."""
    assert choose_server([load("a", **busy), load("b")], Role.PREFILL, need_tokens=50) == "b"


def test_decode_servers_are_compared_by_how_full_they_will_be() -> None:
    """More tokens in a larger pool may be the better choice."""
    small = load("a", Role.DECODE, held_tokens=500, pool_tokens=1_000, num_streams=1)
    large = load("b", Role.DECODE, held_tokens=900, pool_tokens=10_000, num_streams=1)
    assert choose_server([small, large], Role.DECODE) == "b"


def test_suspects_are_not_taken_even_alone() -> None:
    """Nobody is better than somebody who is about to be declared dead."""
    assert choose_server([load("a", state=ServerState.SUSPECT)], Role.PREFILL) is None


def test_role_counts() -> None:
    """A decode server takes no streams and a prefill server no commits."""
    assert choose_server([load("a")], Role.DECODE) is None


def test_avoided_server_is_taken_when_it_is_the_only_one() -> None:
    """Avoiding is a preference."""
    avoid = {ServerId("a")}
    both = [load("a"), load("b", num_streams=50)]
    assert choose_server(both, Role.PREFILL, avoid=avoid) == "b"
    assert choose_server(both[:1], Role.PREFILL, avoid=avoid) == "a"
