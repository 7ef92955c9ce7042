"""Which policy the servers schedule by, and what their schedulers decided about each stream.

A *wish* is a policy that somebody asked for. The newest one that at least one server accepted
stays: every prefill server that registers later gets it, and one that did not answer gets it again,
so that a restarted server does not fall back to its configuration. A wish for one server stays with
that server's id only. Decode servers have no policy to choose; they only say what they do.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

from router import timing
from router.interface import PolicyOutcome, ServerStreams
from router.legs import Send
from router.questions import Questions
from router.servers import Server, ServerRegistry
from streamfill.errors import ErrorCode, InvalidArgumentError, StreamError, UnavailableError
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import Role
from streamfill.observability.logging import log_event
from streamfill.stream.ids import ServerId

logger = logging.getLogger(__name__)

MAX_OPEN_WISHES = 32
"""Wishes that a late answer may still make the one that stays."""


class _Wish(NamedTuple):
    message: r.SetPolicy
    """Sent under the same ``request_id`` to every server, now and later: a greater one is newer."""
    server_id: ServerId | None
    """The one server that it is for. None: all prefill servers."""


class Policies:
    """Owned by the cluster."""

    def __init__(self, send: Send, questions: Questions, registry: ServerRegistry) -> None:
        self._send = send
        self._questions = questions
        self._registry = registry
        self._wishes: OrderedDict[int, _Wish] = OrderedDict()
        self._accepted: dict[ServerId | None, _Wish] = {}

    async def set(
        self,
        policy: str,
        options: Mapping[str, str],
        server_id: ServerId | None,
        timeout_s: float,
    ) -> dict[ServerId, PolicyOutcome]:
        """Make living prefill servers, or one of them, schedule by another policy.

        Raises:
            UnavailableError: no prefill server is alive.
            StreamError: NOT_FOUND, no living prefill server has this id.
            InvalidArgumentError: every server refused it; with the reason of the first.
        """
        servers = self._chosen(server_id)
        message = r.SetPolicy(
            request_id=self._questions.new_id(), policy=policy, options=dict(options)
        )
        self._wishes[message.request_id] = _Wish(message, server_id)
        if len(self._wishes) > MAX_OPEN_WISHES:
            self._wishes.popitem(last=False)
        for server in servers:
            server.policy_due_s = time.monotonic() + timing.POLICY_REPEAT_S
        answers = await self._questions.ask(servers, message, s.PolicySet, timeout_s)
        outcomes = {
            server.server_id: _outcome(server, answers[server.server_id], timeout_s)
            for server in servers
        }
        result = {name: "ok" if each.ok else each.reason for name, each in outcomes.items()}
        log_event(logger, "policy_set", policy=policy, options=dict(options), result=result)
        refusals = [each.reason for each in answers.values() if each is not None and not each.ok]
        if len(refusals) == len(servers):
            raise InvalidArgumentError(refusals[0], details={"policy": policy})
        return outcomes

    async def describe(
        self, stream_id: int | None, timeout_s: float
    ) -> dict[ServerId, ServerStreams]:
        """What the schedulers of all living servers say of their streams, or of one stream."""
        servers = [server for server in self._registry if not server.is_dead]
        question = r.DescribeStreams(request_id=self._questions.new_id())
        answers = await self._questions.ask(servers, question, s.StreamsDescribed, timeout_s)
        described: dict[ServerId, ServerStreams] = {}
        for server in servers:
            answer = answers[server.server_id]
            streams = () if answer is None else answer.streams
            described[server.server_id] = ServerStreams(
                answered=answer is not None,
                role=server.role,
                policy=server.policy,
                streams=[x for x in streams if stream_id is None or x.stream_id == stream_id],
            )
        return described

    def heard(self, server: Server, message: s.PolicySet | s.StreamsDescribed) -> None:
        """A server said what is in force there."""
        server.policy = message.policy
        if isinstance(message, s.StreamsDescribed):
            return
        wish = self._wishes.get(message.request_id)
        if message.ok and wish is not None:
            before = self._accepted.get(wish.server_id)
            if before is None or before.message.request_id < message.request_id:
                self._accepted[wish.server_id] = wish
        valid = self._wish_for(server)
        if message.ok or (valid is not None and valid.message.request_id == message.request_id):
            server.policy_request_id = message.request_id
        if not message.ok:
            log_event(
                logger,
                "policy_refused",
                level=logging.WARNING,
                server_id=server.server_id,
                reason=message.reason,
            )

    def settle(self, server: Server, now_s: float) -> None:
        """Tell a living server what to do, or ask what it does, unless it is known to do it."""
        wish = self._wish_for(server)
        if wish is not None and wish.message.request_id != server.policy_request_id:
            self._send(server, wish.message)
        elif not server.policy:
            self._send(server, r.DescribeStreams(request_id=self._questions.new_id()))
        else:
            return
        server.policy_due_s = now_s + timing.POLICY_REPEAT_S

    def tick(self, now_s: float) -> None:
        """Settle those that did not answer, or that a wish passed by."""
        for server in self._registry:
            if not server.is_dead and now_s >= server.policy_due_s:
                self.settle(server, now_s)

    def _chosen(self, server_id: ServerId | None) -> list[Server]:
        living = [x for x in self._registry if x.role is Role.PREFILL and not x.is_dead]
        if not living:
            raise UnavailableError("no prefill server is alive")
        chosen = [x for x in living if server_id is None or x.server_id == server_id]
        if not chosen:
            known = ", ".join(sorted(x.server_id for x in living))
            raise StreamError(
                f"server_id is {server_id!r}; it must be a living prefill server: {known}",
                code=ErrorCode.NOT_FOUND,
                details={"server_id": str(server_id)},
            )
        return chosen

    def _wish_for(self, server: Server) -> _Wish | None:
        """What stays for this server: the newer one of its own and of all servers'."""
        if server.role is not Role.PREFILL:
            return None
        wishes = (self._accepted.get(server.server_id), self._accepted.get(None))
        return max(
            (wish for wish in wishes if wish is not None),
            key=lambda wish: wish.message.request_id,
            default=None,
        )


def _outcome(server: Server, answer: s.PolicySet | None, timeout_s: float) -> PolicyOutcome:
    if answer is not None:
        return PolicyOutcome(ok=answer.ok, policy=answer.policy, reason=answer.reason)
    reason = f"did not answer within {timeout_s:g} s; changes as soon as it can"
    if server.is_dead:
        reason = "died before it answered"
    return PolicyOutcome(ok=False, policy=server.policy, reason=reason)
