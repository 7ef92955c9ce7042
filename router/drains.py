"""Servers that are to become empty: by an operator's wish, or because they are about to end.

1. The server gets nothing new (`placement` takes only living ones).
2. Streams without a commit are moved to other servers from the token log, one by one, while their
   clients stream on (`moves`). Decode servers are no longer where KV goes ahead of commits.
3. Answers are finished there, or moved when their time is over.
4. What could not be moved, since nobody else can take it, is tried again every second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from router.placement import ServerState
from router.recovery.left_drains import LeftDrain
from router.servers import NEVER_S, Drain, Server, ServerRegistry
from router.session import Session
from streamfill.errors import ErrorCode, FailedPreconditionError, StreamError
from streamfill.messages.common import Role
from streamfill.observability.logging import log_event
from streamfill.stream.ids import ServerId

logger = logging.getLogger(__name__)

REPEAT_S = 1.0
"""What stays on a draining server is looked at so often; a server that comes is noticed at once."""


class Drains:
    """Owned by the router's loop."""

    def __init__(
        self,
        registry: ServerRegistry,
        sessions: Callable[[], Iterable[Session]],
        keep: Callable[[Mapping[ServerId, LeftDrain]], None] = lambda drains: None,
    ) -> None:
        """
        Args:
            registry: all servers.
            sessions: all streams that have not ended, as they are when it is called.
            keep: told of all drains in force, when they have become others: for a router process
                after this one.
        """
        self._registry = registry
        self._sessions = sessions
        self._keep = keep
        self._kept: Mapping[ServerId, LeftDrain] = {}
        self._repeat_s = 0.0

    def take_up(self, drains: Mapping[ServerId, LeftDrain]) -> None:
        """Those that an earlier router process left. Called once, before any server registers."""
        self._kept = drains
        self._registry.expected_drains.update(drains)

    def begin(
        self, server_id: ServerId, answers_s: float | None, now_s: float, *, force: bool
    ) -> Server:
        """An operator wants the server empty. Again: with another time for the answers.

        Args:
            server_id: of a living server.
            answers_s: answers that have not ended after so long are moved. None: never.
            force: also the last prefill server that takes new streams.

        Raises:
            StreamError: NOT_FOUND, no living server has this id.
            FailedPreconditionError: it is the last one.
        """
        server = self._living(server_id)
        if not force and self._is_last_prefill(server):
            raise FailedPreconditionError(
                f"{server_id} is the last prefill server that takes streams: without it no request "
                "is served; add another one first (`streamfill servers add prefill`), or force it"
            )
        server.drain = Drain(NEVER_S if answers_s is None else now_s + answers_s)
        server.state = ServerState.DRAINING
        log_event(
            logger,
            "server_drained",
            server_id=server_id,
            answers_s=answers_s,
            num_streams=server.num_streams,
        )
        self.leave(server, now_s)
        self.note_changes()
        return server

    def end(self, server_id: ServerId) -> Server:
        """The operator takes it back. Without effect on a server that is not drained.

        Raises:
            StreamError: NOT_FOUND, no living server has this id.
            FailedPreconditionError: the server is about to end.
        """
        server = self._living(server_id)
        if server.is_leaving:
            raise FailedPreconditionError(
                f"{server_id} is stopping by itself and takes nothing any more; a server that is "
                "started under its id takes its place"
            )
        if server.drain is not None:
            server.drain = None
            server.state = ServerState.ALIVE
            log_event(logger, "server_resumed", server_id=server_id)
            self.note_changes()
        return server

    def note_changes(self) -> None:
        """Have the drains kept for a router process after this one, if they became others: servers
        come under an id, end in order and are forgotten."""
        drains = dict(self._registry.expected_drains)
        for server in self._registry:
            if server.drain is not None and not server.is_leaving:
                drains[server.server_id] = server.drain.leave(server.facts.incarnation)
        if drains != self._kept:
            self._kept = drains
            self._keep(drains)

    def leave(self, server: Server, now_s: float) -> None:
        """Take off the server what can be elsewhere."""
        answers = server.drain is not None and now_s >= server.drain.move_answers_at_s
        for session in self._sessions():
            session.move_from(server, answers=answers)
            if server.role is Role.DECODE:
                session.leave_target(server)

    def tick(self, now_s: float) -> None:
        """Called at least every `REPEAT_S`."""
        if now_s >= self._repeat_s:
            self.tick_now(now_s)

    def tick_now(self, now_s: float) -> None:
        """Another server may be there for what waits."""
        self._repeat_s = now_s + REPEAT_S
        self.note_changes()
        for server in self._registry:
            if server.state is ServerState.DRAINING and server.num_streams:
                self.leave(server, now_s)

    def _living(self, server_id: ServerId) -> Server:
        living = {server.server_id: server for server in self._registry if not server.is_dead}
        if server_id not in living:
            names = ", ".join(sorted(living)) or "none"
            raise StreamError(
                f"there is no living server {server_id!r}; living are: {names}",
                code=ErrorCode.NOT_FOUND,
            )
        return living[server_id]

    def _is_last_prefill(self, server: Server) -> bool:
        others = (each for each in self._registry if each is not server)
        takes_streams = server.role is Role.PREFILL and server.state is not ServerState.DRAINING
        return takes_streams and not any(
            each.role is Role.PREFILL and each.state is ServerState.ALIVE for each in others
        )
