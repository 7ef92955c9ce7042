"""The servers that the router knows, and how they are. No sockets, no clock of its own.

::

    Register ──▶ ALIVE ⇄ SUSPECT ──▶ DEAD        silent for SUSPECT_AFTER_S, DEAD_AFTER_S
                 ALIVE ⇄ DRAINING ──▶ DEAD       by an operator's wish (`drains`), who may take it
                                                 back; or by its own, which is final

A process is told apart by (server id, incarnation). When a server id registers with a new
incarnation, the old process is dead at once, and can never come back.

A server that comes back from the dead still has streams that went elsewhere meanwhile. It is shown
another router incarnation, as if the router had been replaced; so it drops them and registers anew.

An operator's drain is of a server id: a process that crashes and comes back under it is still
drained. It ends with an orderly exit: whoever starts such a server again wants it back. After a
restart of the router it is of the process that had it: nobody saw how another one came there.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from router import timing
from router.placement import ServerLoad, ServerState
from router.recovery.left_drains import LeftDrain
from streamfill.messages import PROTOCOL_VERSION
from streamfill.messages import server_to_router as s
from streamfill.messages.common import Role, ServerCounters
from streamfill.stream.ids import ServerId

FORGET_DEAD_AFTER_S = 600.0
"""A dead server is shown in the status for so long; one that was drained and ended in order, not at
all."""

NEVER_S = float("inf")

MAX_SUPERSEDED = 64
"""Old incarnations remembered per server id."""


class RegistrationRefusedError(Exception):
    """A server cannot take part; the text is the reason it is told."""


@dataclass(frozen=True, slots=True)
class Drain:
    """What an operator wants of a server that is to become empty."""

    move_answers_at_s: float
    """From then on answers are moved as well; infinity: they are finished there."""

    @classmethod
    def taken_up(cls, left: LeftDrain) -> Drain:
        """As an earlier router process left it."""
        return cls(NEVER_S if left.move_answers_at_s is None else left.move_answers_at_s)

    def leave(self, incarnation: int) -> LeftDrain:
        """For a router process after this one; of the server process ``incarnation``."""
        at_s = None if self.move_answers_at_s == NEVER_S else self.move_answers_at_s
        return LeftDrain(incarnation=incarnation, move_answers_at_s=at_s)


@dataclass(eq=False, slots=True)
class Server:
    """One server process, and what of this router's work it has."""

    facts: s.Register
    identity: bytes
    """ZeroMQ's name of its newest connection."""
    router_incarnation: int
    """What it knows this router by."""
    heard_s: float
    registered_s: float
    state: ServerState = ServerState.ALIVE
    drain: Drain | None = None
    """An operator's wish. None: there is none."""
    is_leaving: bool = False
    """It said itself that it drains, and will end."""
    reachable: bool = True
    counters: ServerCounters = field(default_factory=ServerCounters)
    loop_age_s: float = 0.0
    controller_alive: bool = False
    policy: str = ""
    """In force, with its options, as last heard. Empty: it has not said yet."""
    policy_request_id: int = 0
    """Of the newest wish that is settled here; see `policies`."""
    policy_due_s: float = 0.0
    """When to ask it about its policy (again), should that be needed."""
    num_streams: int = 0
    pending_tokens: int = 0
    held_tokens: int = 0

    @property
    def server_id(self) -> ServerId:
        return ServerId(self.facts.server_id)

    @property
    def role(self) -> Role:
        return self.facts.role

    @property
    def is_dead(self) -> bool:
        return self.state is ServerState.DEAD

    @property
    def state_reason(self) -> str:
        """Why it drains; empty when it does not."""
        if self.state is not ServerState.DRAINING:
            return ""
        return "it is stopping" if self.is_leaving else "an operator drains it"

    def load(self, spare_tokens: int | None = None) -> ServerLoad:
        """What placement looks at; the argument is what the waiting room says."""
        counters = self.counters
        return ServerLoad(
            server_id=self.server_id,
            role=self.facts.role,
            state=self.state,
            num_streams=self.num_streams,
            pending_tokens=self.pending_tokens,
            held_tokens=self.held_tokens,
            reported_pending_tokens=counters.num_pending_tokens,
            pool_tokens=self.facts.pool_tokens,
            spare_tokens=spare_tokens,
            has_free_slot=counters.num_free_slots > 0 or not counters.num_total_slots,
        )


class Assignment:
    """A stream's share in the load of a server. Owned by the stream; `release` ends it."""

    __slots__ = ("_held", "_pending", "_released", "server")

    def __init__(self, server: Server) -> None:
        self.server = server
        self._pending = self._held = 0
        self._released = False
        server.num_streams += 1

    def set(self, *, pending_tokens: int, held_tokens: int) -> None:
        """How many tokens are to be computed, and how many there are."""
        if not self._released:
            self.server.pending_tokens += pending_tokens - self._pending
            self.server.held_tokens += held_tokens - self._held
            self._pending, self._held = pending_tokens, held_tokens

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """For a moment the load is that of all others."""
        if self._released:
            yield
            return
        pending, held = self._pending, self._held
        self.set(pending_tokens=0, held_tokens=0)
        self.server.num_streams -= 1
        try:
            yield
        finally:
            self.server.num_streams += 1
            self.set(pending_tokens=pending, held_tokens=held)

    def release(self) -> None:
        """Take it off. Idempotent."""
        if not self._released:
            self.set(pending_tokens=0, held_tokens=0)
            self._released = True
            self.server.num_streams -= 1


@dataclass(frozen=True, slots=True)
class Registration:
    """What a `Register` meant."""

    server: Server
    lost: Server | None
    """The process, possibly this same one, whose streams are gone."""
    is_new: bool
    """False for a repetition that changes nothing."""


class ServerRegistry:
    """All servers by id. Owned by the router's loop."""

    def __init__(self, incarnation: int, vocab_size: int) -> None:
        self.expected_drains: dict[ServerId, LeftDrain] = {}
        """Of servers that an earlier router process knew, and that have not registered here yet."""
        self.num_changes = 0
        """How often the living servers became others."""
        self._incarnation = incarnation
        self._vocab_size = vocab_size
        self._servers: dict[ServerId, Server] = {}
        self._by_identity: dict[bytes, Server] = {}
        self._superseded: dict[ServerId, list[int]] = {}

    def __iter__(self) -> Iterator[Server]:
        return iter(list(self._servers.values()))

    def by_id(self, server_id: ServerId) -> Server:
        """Raises KeyError."""
        return self._servers[server_id]

    def by_identity(self, identity: bytes) -> Server | None:
        """The server behind a connection."""
        return self._by_identity.get(identity)

    def register(self, identity: bytes, facts: s.Register, now_s: float) -> Registration:
        """Take a server in.

        Raises:
            RegistrationRefusedError: it cannot work with this router or the other servers.
        """
        self._check(facts)
        server_id = ServerId(facts.server_id)
        known = self._servers.get(server_id)
        if known is not None and known.facts.incarnation == facts.incarnation:
            if not known.is_dead and now_s - known.registered_s < timing.REGISTER_REPEAT_S:
                self._heard(known, identity, now_s)
                return Registration(known, None, is_new=False)
            incarnation = known.router_incarnation
        else:
            incarnation = self._incarnation
        lost = None if known is None or known.is_dead else known
        if known is not None:
            self._remove(known)
            if known.facts.incarnation != facts.incarnation:
                superseded = self._superseded.setdefault(server_id, [])
                superseded.append(known.facts.incarnation)
                del superseded[:-MAX_SUPERSEDED]
        server = Server(
            facts=facts,
            identity=identity,
            router_incarnation=incarnation,
            heard_s=now_s,
            registered_s=now_s,
        )
        server.drain = self._drain_of(known, facts)
        if server.drain is not None:
            server.state = ServerState.DRAINING
        self._servers[server_id] = server
        self._by_identity[identity] = server
        self.num_changes += 1
        return Registration(server, lost, is_new=True)

    def heartbeat(
        self, identity: bytes, beat: s.ServerHeartbeat, now_s: float
    ) -> tuple[Server, bool] | int:
        """Note a sign of life.

        Returns:
            the server and whether it just came back from being suspected; or, when the router
            does not count on this process, the router incarnation to show it, so that it drops
            its streams and registers.
        """
        server = self._servers.get(ServerId(beat.server_id))
        if server is None or server.facts.incarnation != beat.incarnation:
            return fresh_incarnation()
        if server.is_dead:
            if server.router_incarnation == self._incarnation:
                server.router_incarnation = fresh_incarnation()
            return server.router_incarnation
        server.counters = beat.counters
        server.loop_age_s = beat.loop_age_s
        server.controller_alive = beat.controller_alive
        return server, self._heard(server, identity, now_s)

    def sweep(self, now_s: float) -> tuple[list[Server], list[Server]]:
        """Servers that became suspect, and servers that died, since the last call."""
        suspects: list[Server] = []
        dead: list[Server] = []
        for server in self:
            silent_s = now_s - server.heard_s
            if server.is_dead:
                was_removed = server.is_leaving and server.drain is not None
                if was_removed or silent_s > FORGET_DEAD_AFTER_S:
                    del self._servers[server.server_id]
            elif silent_s > (
                timing.DEAD_AFTER_S if server.reachable else timing.UNREACHABLE_DEAD_AFTER_S
            ):
                self._remove(server)
                dead.append(server)
            elif server.state is ServerState.ALIVE and (
                silent_s > timing.SUSPECT_AFTER_S or not server.reachable
            ):
                server.state = ServerState.SUSPECT
                suspects.append(server)
        return suspects, dead

    def forgive(self, stalled_s: float) -> None:
        """This process itself stood still for so long and could not hear anybody."""
        for server in self:
            server.heard_s += stalled_s

    def _heard(self, server: Server, identity: bytes, now_s: float) -> bool:
        if server.identity != identity:
            self._by_identity.pop(server.identity, None)
            server.identity = identity
            self._by_identity[identity] = server
        server.heard_s = now_s
        server.reachable = True
        recovered = server.state is ServerState.SUSPECT
        if recovered:
            server.state = ServerState.ALIVE
        return recovered

    def _remove(self, server: Server) -> None:
        server.state = ServerState.DEAD
        self.num_changes += 1
        self._by_identity.pop(server.identity, None)

    def _drain_of(self, known: Server | None, facts: s.Register) -> Drain | None:
        """What an operator wants of a server that registers. Called once for each registration."""
        left = self.expected_drains.pop(ServerId(facts.server_id), None)
        if known is not None:
            return None if known.is_leaving else known.drain
        if left is None or left.incarnation != facts.incarnation:
            return None
        return Drain.taken_up(left)

    def _check(self, facts: s.Register) -> None:
        if facts.protocol_version != PROTOCOL_VERSION:
            raise RegistrationRefusedError(
                f"protocol version {facts.protocol_version}, the router speaks {PROTOCOL_VERSION}"
            )
        if facts.vocab_size != self._vocab_size:
            raise RegistrationRefusedError(
                f"vocabulary of {facts.vocab_size}, the router's model has {self._vocab_size}"
            )
        if facts.incarnation in self._superseded.get(ServerId(facts.server_id), ()):
            raise RegistrationRefusedError(
                f"another process took over as {facts.server_id}; server ids must differ"
            )
        for other in self:
            if other.is_dead or other.facts.server_id == facts.server_id:
                continue
            if other.facts.model_id != facts.model_id:
                raise RegistrationRefusedError(
                    f"model {facts.model_id}, {other.server_id} serves {other.facts.model_id}"
                )
            if other.role is not facts.role and other.facts.page_size != facts.page_size:
                raise RegistrationRefusedError(
                    f"page size {facts.page_size}, {other.role.value} server {other.server_id} "
                    f"has {other.facts.page_size}"
                )


def fresh_incarnation() -> int:
    """A number that no other process has; fits a signed 64-bit integer."""
    return secrets.randbits(62)
