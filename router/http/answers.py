"""Sends the answer of a request: as one JSON object, or as server-sent events.

1. The choices begin. Nothing is sent before the first event of one of them, so that a request that
   fails until then is answered by a status.
2. Each event of a choice is one ``data:`` line; the next one is not fetched before the client's
   connection has taken it.
3. ``data: [DONE]`` is the end. Without it, the answer is not complete: its last event is an error.

A client that goes away meanwhile cancels its streams.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from router.http.bodies import until_gone, while_connected
from router.http.choices import Choice, ChoiceEvent, Choices
from router.http.errors import ErrorReply, error_object
from router.http.replies import ChoiceText, ReplyForm
from router.http.usage import usage_of
from router.interface import DoneEvent, StreamManager, TokenEvent
from streamfill.errors import StreamError

_END = b"data: [DONE]\n\n"
_HEADERS = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would collect events before it passes them on
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An ASGI application that answers one request. Raises ``StreamError`` while nothing is
    sent."""

    manager: StreamManager
    choices: Sequence[Choice]
    form: ReplyForm
    request_id: str
    """Told in a header; ASCII."""
    streams: bool
    includes_usage: bool
    gone: Callable[[], Awaitable[None]] | None = None
    """Returns when the client is not there any more. None: its body was read, look at the rest."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        send_all = (
            self._send_events(send) if self.streams else self._send_whole(scope, receive, send)
        )
        await while_connected(until_gone(receive) if self.gone is None else self.gone(), send_all)

    async def _send_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        texts = [ChoiceText() for _ in self.choices]
        async with Choices(self.manager, self.choices) as running:
            async for happened in running.events():
                text = texts[happened.index]
                if isinstance(happened.event, DoneEvent):
                    text.done = happened.event
                else:
                    text.tokens.append(happened.event)
        done = {n: text.done for n, text in enumerate(texts) if text.done is not None}
        whole = self.form.whole(texts, usage_of(self.choices, done))
        response = Response(
            msgspec.json.encode(whole),
            media_type="application/json",
            headers={"x-request-id": self.request_id},
        )
        await response(scope, receive, send)

    async def _send_events(self, send: Send) -> None:
        has_begun = False
        last = _END
        try:
            async with (
                Choices(self.manager, self.choices) as running,
                aclosing(self._parts(running.events())) as parts,
            ):
                async for part in parts:
                    if not has_begun:
                        has_begun = True
                        await send(self._start())
                    await send(_body(part, more=True))
        except StreamError as error:
            if not has_begun:
                raise
            last = _event(ErrorReply(error=error_object(error)))
        await send(_body(last, more=False))

    async def _parts(self, events: AsyncIterator[ChoiceEvent]) -> AsyncGenerator[bytes, None]:
        begun: set[int] = set()
        done: dict[int, DoneEvent] = {}
        async for happened in events:
            index, event = happened.index, happened.event
            if index not in begun:
                begun.add(index)
                if (first := self.form.begin(index)) is not None:
                    yield _event(first)
            if isinstance(event, TokenEvent):
                chunk = self.form.token(index, event)
            else:
                done[index] = event
                chunk = self.form.done(index, event)
            if chunk is not None:
                yield _event(chunk)
        if self.includes_usage:
            yield _event(self.form.usage(usage_of(self.choices, done)))

    def _start(self) -> dict[str, object]:
        named = {
            **_HEADERS,
            "content-type": "text/event-stream; charset=utf-8",
            "x-request-id": self.request_id,
        }
        headers = [(key.encode(), value.encode("latin-1")) for key, value in named.items()]
        return {"type": "http.response.start", "status": 200, "headers": headers}


def _event(data: msgspec.Struct) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def _body(data: bytes, *, more: bool) -> dict[str, object]:
    return {"type": "http.response.body", "body": data, "more_body": more}
