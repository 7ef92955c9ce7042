"""The registry of servers, by a clock that the tests turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from router.drains import Drains
from router.placement import ServerState
from router.recovery.left_drains import LeftDrain, read_drains, write_drains
from router.servers import Assignment, RegistrationRefusedError, Server, ServerRegistry
from router.timing import (
    DEAD_AFTER_S,
    REGISTER_REPEAT_S,
    SUSPECT_AFTER_S,
    UNREACHABLE_DEAD_AFTER_S,
)
from streamfill.messages import PROTOCOL_VERSION
from streamfill.messages import server_to_router as s
from streamfill.messages.common import Role, ServerCounters
from streamfill.stream.ids import ServerId

ROUTER_INCARNATION = 7


def register(server_id: str = "a", **changes: Any) -> s.Register:
    values: dict[str, Any] = {
        "incarnation": 1,
        "role": Role.PREFILL,
        "protocol_version": PROTOCOL_VERSION,
        "pid": 1,
        "model_id": "m",
        "vocab_size": 100,
        "context_tokens": 1000,
        "pool_tokens": 1000,
        "page_size": 16,
        "tp_size": 1,
        "kv_host": "127.0.0.1",
        "kv_control_ports": (1,),
        "engine_version": "x",
        **changes,
    }
    return s.Register(server_id=server_id, **values)


def beat(server_id: str = "a", incarnation: int = 1) -> s.ServerHeartbeat:
    return s.ServerHeartbeat(
        server_id=server_id,
        incarnation=incarnation,
        loop_age_s=0.0,
        controller_alive=True,
        counters=ServerCounters(num_pending_tokens=5),
    )


@pytest.fixture
def registry() -> ServerRegistry:
    return ServerRegistry(ROUTER_INCARNATION, vocab_size=100)


def add(registry: ServerRegistry, facts: s.Register, now_s: float = 0.0) -> Server:
    return registry.register(facts.server_id.encode(), facts, now_s).server


def test_silence_makes_suspect_then_dead(registry: ServerRegistry) -> None:
    """The two limits, each told once; a heartbeat in between makes the server alive again."""
    server = add(registry, register())
    assert registry.sweep(SUSPECT_AFTER_S) == ([], [])
    assert registry.sweep(SUSPECT_AFTER_S + 0.1) == ([server], [])
    assert registry.sweep(SUSPECT_AFTER_S + 0.2) == ([], [])
    assert registry.heartbeat(b"a", beat(), 2.0) == (server, True)
    assert server.counters.num_pending_tokens == 5
    registry.sweep(2.0 + DEAD_AFTER_S)
    assert server.state is ServerState.SUSPECT
    assert registry.sweep(2.1 + DEAD_AFTER_S) == ([], [server])
    assert registry.by_identity(b"a") is None


def test_closed_connection_shortens_the_wait(registry: ServerRegistry) -> None:
    """Suspect at once, dead soon; but a heartbeat over a new connection clears it."""
    server = add(registry, register())
    server.reachable = False
    assert registry.sweep(0.1) == ([server], [])
    assert registry.heartbeat(b"new", beat(), 0.2) == (server, True)
    assert registry.by_identity(b"new") is server
    assert registry.by_identity(b"a") is None
    server.reachable = False
    registry.sweep(0.3)
    assert registry.sweep(0.3 + UNREACHABLE_DEAD_AFTER_S) == ([], [server])


def test_own_stall_is_nobodys_silence(registry: ServerRegistry) -> None:
    """While this process stood still nobody could be heard."""
    server = add(registry, register())
    registry.forgive(10.0)
    assert registry.sweep(10.0) == ([], [])
    assert server.state is ServerState.ALIVE


def test_repeated_registration_means_nothing_new(registry: ServerRegistry) -> None:
    """Its answer was on the way."""
    server = add(registry, register())
    again = registry.register(b"a", register(), 1.0)
    assert (again.server, again.lost, again.is_new) == (server, None, False)


def test_late_registration_of_the_same_process_means_that_it_lost_us(
    registry: ServerRegistry,
) -> None:
    """It gave the router up and dropped its streams."""
    server = add(registry, register())
    again = registry.register(b"a", register(), REGISTER_REPEAT_S + 0.1)
    assert again.lost is server
    assert again.is_new
    assert server.is_dead


def test_new_incarnation_replaces_the_old_for_good(registry: ServerRegistry) -> None:
    """The old process is dead, is made to ask again, and is then refused."""
    old = add(registry, register())
    new = registry.register(b"b", register(incarnation=2), 0.5)
    assert new.lost is old
    assert old.is_dead
    shown = registry.heartbeat(b"a", beat(incarnation=1), 0.6)
    assert isinstance(shown, int)
    assert shown != ROUTER_INCARNATION
    with pytest.raises(RegistrationRefusedError, match="took over"):
        registry.register(b"a", register(incarnation=1), 0.7)


def test_server_back_from_the_dead_sees_another_router(registry: ServerRegistry) -> None:
    """The same new incarnation at each heartbeat, and in the answer to its registration."""
    server = add(registry, register())
    registry.sweep(DEAD_AFTER_S + 0.1)
    shown = registry.heartbeat(b"a", beat(), 6.0)
    assert isinstance(shown, int)
    assert shown != ROUTER_INCARNATION
    assert registry.heartbeat(b"a", beat(), 6.1) == shown
    back = registry.register(b"a", register(), 6.2)
    assert (back.lost, back.is_new) == (None, True)
    assert back.server is not server
    assert back.server.router_incarnation == shown


def test_heartbeat_of_an_unknown_server_asks_it_to_register(registry: ServerRegistry) -> None:
    """The router was restarted on the same port."""
    assert isinstance(registry.heartbeat(b"x", beat("x"), 0.0), int)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol_version": PROTOCOL_VERSION + 1}, "protocol version"),
        ({"vocab_size": 99}, "vocabulary of 99, the router's model has 100"),
        ({"model_id": "other"}, "model other, a serves m"),
        ({"page_size": 1, "role": Role.DECODE}, "page size 1, prefill server a has 16"),
    ],
)
def test_server_that_does_not_fit_is_refused(
    registry: ServerRegistry, changes: dict[str, Any], reason: str
) -> None:
    """The reason names both values; the others go on."""
    add(registry, register())
    with pytest.raises(RegistrationRefusedError, match=reason):
        add(registry, register("b", **changes))
    assert [server.server_id for server in registry] == ["a"]


def test_dead_servers_bind_nobody(registry: ServerRegistry) -> None:
    """A cluster whose servers are all gone may come back with another model."""
    add(registry, register())
    registry.sweep(100.0)
    add(registry, register("b", model_id="other"), 100.0)


def test_assignment_is_taken_off_completely(registry: ServerRegistry) -> None:
    """Whatever was counted, a release leaves nothing, also when it is repeated."""
    server = add(registry, register())
    first, second = Assignment(server), Assignment(server)
    first.set(pending_tokens=10, held_tokens=20)
    second.set(pending_tokens=5, held_tokens=5)
    first.set(pending_tokens=3, held_tokens=30)
    assert (server.num_streams, server.pending_tokens, server.held_tokens) == (2, 8, 35)
    first.release()
    first.release()
    first.set(pending_tokens=9, held_tokens=9)
    assert (server.num_streams, server.pending_tokens, server.held_tokens) == (1, 5, 5)


def left(move_answers_at_s: float | None = None, incarnation: int = 1) -> LeftDrain:
    return LeftDrain(incarnation=incarnation, move_answers_at_s=move_answers_at_s)


def test_drains_are_kept_for_the_next_router_process(registry: ServerRegistry) -> None:
    """Of servers that have not come back yet too, but not of one that ends by itself."""
    kept: list[Mapping[ServerId, LeftDrain]] = []
    drains = Drains(registry, list, kept.append)
    drains.take_up({ServerId("c"): left(40.0)})
    first = add(registry, register("a"))
    add(registry, register("b"))
    drains.begin(first.server_id, 5.0, 20.0, force=False)
    assert kept[-1] == {"a": left(25.0), "c": left(40.0)}
    third = add(registry, register("c"))
    assert third.state is ServerState.DRAINING
    drains.begin(third.server_id, None, 21.0, force=False)
    assert kept[-1] == {"a": left(25.0), "c": left()}
    first.is_leaving = True
    drains.note_changes()
    assert kept[-1] == {"c": left()}
    assert add(registry, register("a", incarnation=2)).state is ServerState.ALIVE
    drains.end(third.server_id)
    assert kept[-1] == {}
    again = add(registry, register("c", incarnation=2))
    assert again.state is ServerState.ALIVE
    drains.tick_now(22.0)
    assert len(kept) == 4, "told of changes only"


def test_a_drain_outlives_its_router_with_its_server_process(registry: ServerRegistry) -> None:
    """A process that was started while there was no router takes streams; one that crashes under
    the eyes of the new router comes back drained, and is the one that is drained from then on."""
    kept: list[Mapping[ServerId, LeftDrain]] = []
    drains = Drains(registry, list, kept.append)
    drains.take_up({ServerId("a"): left(), ServerId("b"): left(7.0)})
    assert add(registry, register("a", incarnation=2)).state is ServerState.ALIVE
    same = add(registry, register("b"))
    assert same.drain is not None
    assert same.drain.move_answers_at_s == 7.0
    drains.tick_now(1.0)
    assert kept == [{"b": left(7.0)}]
    assert add(registry, register("b", incarnation=2)).state is ServerState.DRAINING
    drains.tick_now(2.0)
    assert kept[-1] == {"b": left(7.0, incarnation=2)}


@pytest.mark.parametrize("text", [None, "", "[", '{"a": 1.5}', '{"a": {"incarnation": "x"}}'])
def test_what_tells_of_no_drains(text: str | None) -> None:
    """Nothing is drained, and the router starts."""
    assert read_drains(text) == {}


def test_drains_are_read_as_they_were_written() -> None:
    """With and without a time for answers."""
    drains = {ServerId("a"): left(1.5), ServerId("b"): left(incarnation=1 << 61)}
    assert read_drains(write_drains(drains)) == drains
