"""Bodies of requests: read within limits of size and time, and while the client is there."""

from __future__ import annotations

import asyncio
import codecs
import logging
from collections.abc import AsyncIterator, Awaitable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Receive

from streamfill.errors import CancelledStreamError, InvalidArgumentError
from streamfill.observability.logging import log_event

logger = logging.getLogger(__name__)

BODY_SILENCE_S = 15.0
"""A whole request is sent in one go; a client that pauses for so long has lost its network, or
wants to hold the connection."""
BODY_TOTAL_S = 120.0
"""For a body that comes byte by byte. The largest one takes seconds on a slow line."""


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body of an ordinary request.

    Raises:
        HTTPException: 413, it is larger than ``max_bytes``; said before more than that is read.
            408, it comes too slowly.
        CancelledStreamError: the client went away.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(f"{announced} bytes", max_bytes)
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(BODY_TOTAL_S):
            while True:
                async with asyncio.timeout(BODY_SILENCE_S):
                    message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise CancelledStreamError("the client went away while it sent its request")
                parts.append(message.get("body", b""))
                num_bytes += len(parts[-1])
                if num_bytes > max_bytes:
                    raise _too_large(f"more than {max_bytes} bytes", max_bytes)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        detail = (
            f"the body did not come to its end: nothing for {BODY_SILENCE_S:g} s, or not all "
            f"within {BODY_TOTAL_S:g} s; {num_bytes} bytes are here"
        )
        raise HTTPException(408, detail) from error


class TextUpload:
    """A body of text that arrives over a long time."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._is_read = asyncio.Event()
        self._is_gone = asyncio.Event()

    async def pieces(self) -> AsyncIterator[str]:
        """The text as it comes, cut between characters. No piece is empty.

        Raises:
            InvalidArgumentError: it is not UTF-8; names the byte and its place.
            CancelledStreamError: the client went away before the end.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        num_bytes = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._is_gone.set()
                raise CancelledStreamError("the client went away before the end of its upload")
            data = message.get("body", b"")
            is_last = not message.get("more_body", False)
            num_before = num_bytes - len(decoder.getstate()[0])
            num_bytes += len(data)
            try:
                text = decoder.decode(data, is_last)
            except UnicodeDecodeError as error:
                raise _not_utf8(error, num_before) from error
            if text:
                yield text
            if is_last:
                self._is_read.set()
                return

    async def gone(self) -> None:
        """Returns when the client is not there any more."""
        read, gone = (asyncio.create_task(event.wait()) for event in (self._is_read, self._is_gone))
        try:
            await asyncio.wait({read, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not self._is_gone.is_set():
                await until_gone(self._receive)
        finally:
            read.cancel()
            gone.cancel()


async def until_gone(receive: Receive) -> None:
    """Returns when the client of a request whose body was read is not there any more."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(gone: Awaitable[object], work: Awaitable[None]) -> None:
    """Runs ``work``, which is cancelled when ``gone`` returns first."""
    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        else:
            log_event(logger, "client_gone", level=logging.DEBUG)
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


def _too_large(size: str, max_bytes: int) -> HTTPException:
    detail = f"the body has {size}, at most {max_bytes} are taken (router.max_body_bytes)"
    return HTTPException(413, detail)


def _not_utf8(error: UnicodeDecodeError, num_before: int) -> InvalidArgumentError:
    byte, offset = error.object[error.start], num_before + error.start
    return InvalidArgumentError(
        f"the body is not UTF-8: byte 0x{byte:02x} at offset {offset} ({error.reason})",
        details={"field": "body", "offset_bytes": offset, "byte": f"0x{byte:02x}"},
    )
