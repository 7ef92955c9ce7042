"""Where operations wait until their stream may grow. What is decided, `admission` decides.

1. `put` says on which server an uncommitted stream is and how many tokens it has there; `leave`
   that it is there no more.
2. `admit` returns when an operation may go on. Meanwhile the client is not listened to, so that
   gRPC's flow control holds it back in turn.
3. A stream that moves while its operation waits asks again where it comes to, at the end of the
   queue there. Without any server it waits on; one that begins an operation then is not held back,
   since there is no server to be spared.

Room that is made is given away in the next turn of the loop: streams that leave a dead or draining
server one by one would otherwise make room there for those that are about to leave as well.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from router.admission import (
    DEFAULT_CAP_POOLS,
    AdmissionCounters,
    AdmissionLimits,
    Decision,
    ServerAdmission,
    Verdict,
)
from router.metrics import RouterMetrics
from router.servers import Server
from streamfill.errors import ResourceExhaustedError, StreamError, UnavailableError
from streamfill.messages.common import NO_SHARE, Share
from streamfill.observability.logging import RateLimited, log_event
from streamfill.stream.ids import ServerId, StreamId

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wait:
    num_tokens: int
    """What the stream would have."""
    outcome: asyncio.Future[StreamError | None]
    """None: the operation may go on, or the stream has ended."""


class WaitingRoom:
    """Owned by the router's loop, one for all servers."""

    def __init__(self, limits: AdmissionLimits, metrics: RouterMetrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._servers: dict[Server, ServerAdmission] = {}
        self._places: dict[StreamId, Server] = {}
        self._waits: dict[StreamId, _Wait] = {}
        self._with_room: set[Server] = set()
        self._log_refused = RateLimited()

    async def admit(self, stream_id: StreamId, num_tokens: int) -> None:
        """Wait until the stream may have so many tokens; also returns when it ends meanwhile.

        They count from then on. Whoever gets them and does not use them says so by `put`.

        Raises:
            ResourceExhaustedError: too many wait, or it waited too long. Names both, and the cap.
            UnavailableError: it lost its server meanwhile, and no other came.
        """
        server = self._places.get(stream_id)
        if server is None:
            return
        decision = self._ask(stream_id, server, num_tokens)
        if decision.verdict is Verdict.ADMITTED:
            return
        if decision.verdict is Verdict.REFUSED:
            raise self._refusal(stream_id, num_tokens, waited=False)
        outcome: asyncio.Future[StreamError | None] = asyncio.get_running_loop().create_future()
        held_tokens = self._servers[server].tokens_of(stream_id)
        self._waits[stream_id] = _Wait(num_tokens, outcome)
        began_s = time.monotonic()
        try:
            await asyncio.wait({outcome}, timeout=self._limits.wait_s)
            error = outcome.result() if outcome.done() else self._timeout(stream_id, num_tokens)
        except BaseException:  # the call was given up
            self._give_up(stream_id, held_tokens)
            raise
        finally:
            del self._waits[stream_id]
        self._metrics.waited_for_room(time.monotonic() - began_s, refused=error is not None)
        if error is not None:
            raise error

    def take(self, stream_id: StreamId, num_tokens: int) -> bool:
        """`admit` where nothing has to wait; False: nothing happened."""
        server = self._places.get(stream_id)
        return server is None or self._servers[server].take(stream_id, num_tokens)

    def put(
        self, stream_id: StreamId, server: Server, num_tokens: int, share: Share = NO_SHARE
    ) -> None:
        """The uncommitted stream is on this server, with so many tokens.

        Args:
            share: on whose account; the same for all of its life.
        """
        admission = self._servers.get(server)
        if admission is None:
            cap_tokens = self._limits.cap_tokens or DEFAULT_CAP_POOLS * server.facts.pool_tokens
            admission = ServerAdmission(cap_tokens, self._limits.max_waiting)
            self._servers[server] = admission
        has_come = self._places.get(stream_id) is not server
        if has_come:
            self.leave(stream_id)
            self._places[stream_id] = server
        elif admission.tokens_of(stream_id) == num_tokens:
            return
        if num_tokens < admission.tokens_of(stream_id):
            self._made_room(server)
        admission.hold(stream_id, num_tokens, share)
        wait = self._waits.get(stream_id)
        if has_come and wait is not None and not wait.outcome.done():
            match self._ask(stream_id, server, wait.num_tokens).verdict:
                case Verdict.ADMITTED:
                    wait.outcome.set_result(None)
                case Verdict.REFUSED:
                    refusal = self._refusal(stream_id, wait.num_tokens, waited=False)
                    wait.outcome.set_result(refusal)
                case Verdict.WAITS:
                    pass

    def leave(self, stream_id: StreamId) -> None:
        """It is committed, or lost its server. What waits for it waits on. Idempotent."""
        server = self._places.pop(stream_id, None)
        if server is not None:
            self._servers[server].leave(stream_id)
            self._made_room(server)

    def forget(self, stream_id: StreamId) -> None:
        """It has ended. Idempotent."""
        self.leave(stream_id)
        self._wake([stream_id])

    def let_pass(self, stream_id: StreamId) -> None:
        """Its commit is there, right behind the operation that waits: neither is held back."""
        if stream_id in self._waits:
            self._withdraw(stream_id, refused=False)
            self._wake([stream_id])

    def is_waiting(self, stream_id: StreamId) -> bool:
        """Whether an operation of the stream waits."""
        return stream_id in self._waits

    def full_servers(self) -> set[ServerId]:
        """Where a new stream would wait."""
        return {server.server_id for server, one in self._servers.items() if one.is_full}

    def spare_tokens(self, server: Server) -> int | None:
        """How much may grow there before something has to wait. None: as much as may be."""
        admission = self._servers.get(server)
        return None if admission is None else admission.spare_tokens

    def counters(self, server: Server) -> AdmissionCounters | None:
        """None: no uncommitted stream was ever there."""
        admission = self._servers.get(server)
        return None if admission is None else admission.counters()

    def drop(self, server: Server) -> None:
        """The process is gone, and every stream was taken off it."""
        self._servers.pop(server, None)

    def _ask(self, stream_id: StreamId, server: Server, num_tokens: int) -> Decision:
        decision = self._servers[server].ask(stream_id, num_tokens)
        self._wake(decision.others)
        if decision.displaced is not None:
            wait = self._waits.get(decision.displaced)
            if wait is not None and not wait.outcome.done():
                refusal = self._refusal(decision.displaced, wait.num_tokens, waited=False)
                wait.outcome.set_result(refusal)
        return decision

    def _wake(self, stream_ids: Iterable[StreamId]) -> None:
        for stream_id in stream_ids:
            wait = self._waits.get(stream_id)
            if wait is not None and not wait.outcome.done():
                wait.outcome.set_result(None)

    def _timeout(self, stream_id: StreamId, num_tokens: int) -> StreamError:
        refusal = self._refusal(stream_id, num_tokens, waited=True)
        self._withdraw(stream_id, refused=True)
        return refusal

    def _give_up(self, stream_id: StreamId, held_tokens: int) -> None:
        """Take the operation back, wherever it is by now: waiting, or admitted just before."""
        server = self._places.get(stream_id)
        if server is not None:
            self._withdraw(stream_id, refused=False)
            self._servers[server].hold(stream_id, held_tokens)

    def _withdraw(self, stream_id: StreamId, *, refused: bool) -> None:
        server = self._places.get(stream_id)
        if server is not None:
            self._servers[server].withdraw(stream_id, refused=refused)
            self._made_room(server)

    def _made_room(self, server: Server) -> None:
        if server not in self._with_room:
            self._with_room.add(server)
            asyncio.get_running_loop().call_soon(self._give_room, server)

    def _give_room(self, server: Server) -> None:
        self._with_room.discard(server)
        admission = self._servers.get(server)
        if admission is not None:
            self._wake(admission.admit_waiting())

    def _refusal(self, stream_id: StreamId, num_tokens: int, *, waited: bool) -> StreamError:
        server = self._places.get(stream_id)
        if server is None:
            return UnavailableError(
                f"no prefill server to grow on for {self._limits.wait_s:g} s; the stream is kept, "
                "send the segment again"
            )
        admission = self._servers[server]
        num_waiting = admission.num_waiting
        if waited:
            why = f"the operation waited {self._limits.wait_s:g} s for room (admission_wait_s)"
            num_waiting -= 1  # without itself
        else:
            why = (
                f"{num_waiting} operations wait for room already, at most "
                f"{self._limits.max_waiting} (max_waiting_segments)"
            )
        if self._log_refused.allow():
            log_event(
                logger,
                "admission_refused",
                level=logging.WARNING,
                stream_id=stream_id,
                server_id=server.server_id,
                waited=waited,
                num_waiting=num_waiting,
                held_tokens=admission.held_tokens,
                cap_tokens=admission.cap_tokens,
            )
        return ResourceExhaustedError(
            f"no room for a context of {num_tokens} tokens: uncommitted contexts hold "
            f"{admission.held_tokens} tokens on server {server.server_id}, at most "
            f"{admission.cap_tokens} (max_uncommitted_tokens), and {why}; the stream is unharmed: "
            "send the segment again later, or commit or cancel streams",
            details={
                "server_id": server.server_id,
                "num_tokens": num_tokens,
                "held_tokens": admission.held_tokens,
                "limit_tokens": admission.cap_tokens,
                "num_waiting": num_waiting,
            },
        )
