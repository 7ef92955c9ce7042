"""HTTP calls of targets: JSON in, JSON or server-sent events out, and one border of errors.

Server-sent events as inference servers send them: lines ``data: {json}``, ended by
``data: [DONE]``. Lines of other fields and comments are skipped, an event of several ``data`` lines
is put together, and a stream that ends in the middle is an error.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from streamfill.errors import (
    DeadlineExceededError,
    ErrorCode,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    StreamError,
    UnavailableError,
)

if TYPE_CHECKING:
    import aiohttp

CONNECT_TIMEOUT_S: Final = 30.0
"""A server under two thousand new connections may be slow to take one; a dead one says so."""
SILENCE_TIMEOUT_S: Final = 600.0
"""Between two bytes of an answer: a request may wait this long in an overloaded server's queue."""
MAX_EVENT_BYTES: Final = 1 << 24
_MAX_ERROR_CHARS: Final = 300


class HttpStatusError(Exception):
    """An answer that is not 200. Leaves this package only as a ``StreamError``.

    Attributes:
        status: of HTTP.
        text: what the server said, shortened.
    """

    def __init__(self, *, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status = status
        self.text = text


class EventParser:
    """Bytes of a stream to the data of its events. Holds at most one event."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The data of each event that ends in these bytes.

        Raises:
            UnavailableError: an event longer than ``MAX_EVENT_BYTES``.
        """
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            field = line.removesuffix(b"\r")
            if not field:
                if self._data:
                    yield b"\n".join(self._data)
                    self._data.clear()
            elif field.startswith(b"data:"):
                self._data.append(field[5:].removeprefix(b" "))
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise UnavailableError(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")


class HttpEndpoint:
    """One server, any number of calls at the same time. The key it was given is never shown."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        self.base_url = base_url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str) -> Any:
        """The JSON of an answer. Raises ``HttpStatusError`` and ``StreamError``."""
        return await self._call("GET", path, None)

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON of an answer, or its text where it is none. Raises as `get`."""
        return await self._call("POST", path, body)

    async def events(
        self, path: str, body: Mapping[str, Any]
    ) -> AsyncGenerator[tuple[float, dict[str, Any]], None]:
        """Each event of an answer with the time of its arrival, until ``[DONE]``.

        To be closed by its reader (``contextlib.aclosing``), which drops the connection.

        Raises:
            HttpStatusError: the answer is not 200.
            StreamError: the connection failed, or the stream is broken or was cut off.
        """
        parser = EventParser()
        with _translated(self.base_url):
            async with self._open().post(
                self.base_url + path, json=body, allow_redirects=False
            ) as response:
                await _check_status(response)
                async for chunk in response.content.iter_any():
                    now = time.monotonic()
                    for data in parser.feed(chunk):
                        if data == b"[DONE]":
                            return
                        yield now, _event(data)
        raise UnavailableError(f"{self.base_url} ended an answer in the middle")

    async def close(self) -> None:
        """Drops all connections. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        with _translated(self.base_url):
            async with self._open().request(
                method, self.base_url + path, json=body, allow_redirects=False
            ) as response:
                await _check_status(response)
                text = await response.text(errors="replace")
        try:
            return json.loads(text)
        except ValueError:
            return text

    def _open(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                # The run decides how many requests are open, not the connector.
                connector=aiohttp.TCPConnector(limit=0),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S
                ),
                headers=self._headers,
            )
        return self._session


def as_stream_error(error: HttpStatusError, base_url: str) -> StreamError:
    """The error of this project that says the same."""
    message = f"{base_url} answered {error.status}: {error.text or 'no reason given'}"
    match error.status:
        case 429:
            return ResourceExhaustedError(message)
        case 408 | 504:
            return DeadlineExceededError(message)
        case 401:
            return StreamError(message, code=ErrorCode.UNAUTHENTICATED)
        case 403:
            return StreamError(message, code=ErrorCode.PERMISSION_DENIED)
        case 404 | 405:
            return FailedPreconditionError(message)
        case status if 400 <= status < 500:
            return InvalidArgumentError(message)
    return UnavailableError(message)


def error_text(body: str) -> str:
    """The reason in the body of an error, in one line: of OpenAI's form, of others, or as it is."""
    text = body
    try:
        decoded = json.loads(body)
    except ValueError:
        decoded = None
    if isinstance(decoded, dict):
        inner = decoded.get("error", decoded)
        said = inner.get("message", inner.get("detail")) if isinstance(inner, dict) else inner
        text = said if isinstance(said, str) else body
    return " ".join(text.split())[:_MAX_ERROR_CHARS]


def _event(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        shown = data[:80].decode("utf-8", errors="replace")
        raise UnavailableError(f"the server sent an event that is no JSON: {shown!r}") from error
    if not isinstance(event, dict):
        raise UnavailableError(f"the server sent an event that is no object: {str(event)[:80]!r}")
    if event.get("error"):
        # An error in the middle of an answer comes with status 200.
        code = event["error"].get("code") if isinstance(event["error"], dict) else None
        status = code if isinstance(code, int) and code >= 400 else 500
        said = error_text(json.dumps(event))
        raise HttpStatusError(status=status, text=said)
    return event


async def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        text = error_text(await response.text(errors="replace"))
        raise HttpStatusError(status=response.status, text=text)


@contextmanager
def _translated(base_url: str) -> Iterator[None]:
    import aiohttp

    try:
        yield
    except TimeoutError as error:  # aiohttp's own time-outs are of this class too
        raise DeadlineExceededError(f"{base_url} was silent for too long") from error
    except aiohttp.InvalidURL as error:
        raise InvalidArgumentError(f"{base_url!r} is no address") from error
    except (aiohttp.ClientError, asyncio.IncompleteReadError, OSError) as error:
        # Not `error` itself: its text may hold what was sent.
        raise UnavailableError(f"{base_url}: {type(error).__name__}") from error
