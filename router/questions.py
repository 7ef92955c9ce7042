"""Questions to several servers at once, each answered by one message with the question's number."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterable
from typing import TypeAlias, TypeVar

from router.legs import Send
from router.servers import Server
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.stream.ids import ServerId

Question: TypeAlias = r.FlushCache | r.SetPolicy | r.DescribeStreams
Answer: TypeAlias = s.CacheFlushed | s.PolicySet | s.StreamsDescribed

A = TypeVar("A", s.CacheFlushed, s.PolicySet, s.StreamsDescribed)


class Questions:
    """Those under way. Owned by the cluster."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._ids = itertools.count(1)
        self._waiting: dict[tuple[Server, int], asyncio.Future[Answer | None]] = {}

    def new_id(self) -> int:
        """For the ``request_id`` of a question. Each is greater than all before."""
        return next(self._ids)

    async def ask(
        self, servers: Iterable[Server], question: Question, answer: type[A], timeout_s: float
    ) -> dict[ServerId, A | None]:
        """What each server answers; None: nothing in time, or it died meanwhile.

        Args:
            servers: those that are dead get None at once.
            question: under a number of its own, from ``new_id``.
            answer: the kind of message that answers it; others of its number are ignored.
        """
        asked = {server: self._put(server, question) for server in servers}
        waiting = [future for future in asked.values() if not future.done()]
        try:
            if waiting:
                await asyncio.wait(waiting, timeout=timeout_s)
        finally:
            for server in asked:
                self._waiting.pop((server, question.request_id), None)
        answers: dict[ServerId, A | None] = {}
        for server, future in asked.items():
            got = future.result() if future.done() else None
            answers[server.server_id] = got if isinstance(got, answer) else None
        return answers

    def answered(self, server: Server, message: Answer) -> None:
        """A server said something; what nobody waits for any more is dropped."""
        future = self._waiting.get((server, message.request_id))
        if future is not None and not future.done():
            future.set_result(message)

    def lost(self, server: Server) -> None:
        """A server died: nobody waits for it any longer."""
        for (asked, _), future in self._waiting.items():
            if asked is server and not future.done():
                future.set_result(None)

    def _put(self, server: Server, question: Question) -> asyncio.Future[Answer | None]:
        future: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        if server.is_dead:
            future.set_result(None)
            return future
        self._waiting[server, question.request_id] = future
        self._send(server, question)
        return future
