"""The HTTP server of the router: its socket, uvicorn in the router's loop, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.access.key_ring import KeyRing
from router.http.app import make_app
from router.http.errors import error_response
from router.http.protocol import counting_protocol
from router.interface import StreamManager
from router.refusals import Note, not_counted
from router.tls import RouterTls
from streamfill.config import RouterConfig
from streamfill.errors import ConfigError, InternalError, UnavailableError
from streamfill.observability.logging import log_event

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_S = 30
"""A connection without a request. Clients that ask again and again save the handshake."""
MAX_HEAD_BYTES = 64 * 1024
PING_INTERVAL_S = 20.0
"""On WebSockets, for what lies between. A missing answer is no reason to close: while a client is
held back its answers are not read. TCP notices when a machine is gone."""
PROBE_S = 10
"""TCP asks a silent client so often whether it is there, as gRPC does."""
UNREAD_S = 60
"""A client that takes nothing of its answer for so long, or does not answer TCP, is gone."""
START_S = 10.0
STOP_SLACK_S = 2.0
"""Behind the grace, for uvicorn's own polling."""


class HttpServer:
    """Serves one core. ``start``, then ``stop``."""

    def __init__(
        self,
        manager: StreamManager,
        config: RouterConfig,
        *,
        keys: KeyRing | None = None,
        tls: RouterTls | None = None,
        on_refused: Note = not_counted,
    ) -> None:
        """Args:
        manager: the core.
        config: says where and how much.
        keys: that are asked for. None: none are.
        tls: None: in the clear.
        on_refused: called for each refusal.
        """
        self._host = config.http_host or config.host
        self._host_key = "router.host" if config.http_host is None else "router.http_host"
        self._port = config.http_port or 0
        app = _answered_at_the_end(
            make_app(
                manager,
                config.max_body_bytes,
                config.http_allow_origins,
                keys,
                on_refused,
                status_page=config.status_page,
            )
        )
        self._server = _Server(
            uvicorn.Config(
                app,
                http=counting_protocol(on_refused),
                ws="websockets-sansio",
                ws_max_size=config.max_body_bytes,
                ws_ping_interval=PING_INTERVAL_S,
                ws_ping_timeout=None,
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                ssl_context_factory=None if tls is None else lambda *_: tls.ssl_context(),
            )
        )
        self._server.config.load()  # imports more of uvicorn, which in the running loop is a stall
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Bind and serve. Returns the port, which differs from the wanted one only if that was 0.

        Raises:
            ConfigError: the address cannot be bound.
        """
        listener = self._bind()
        self._serving = asyncio.create_task(
            self._server.serve(sockets=[listener]), name="router-http"
        )
        async with asyncio.timeout(START_S):
            while not self._server.started and not self._serving.done():  # noqa: ASYNC110
                await asyncio.sleep(0.005)  # uvicorn has a flag, and no event
        if self._serving.done():
            raise InternalError(f"the HTTP server did not start: {self._serving.exception()!r}")
        return int(listener.getsockname()[1])

    async def stop(self, grace_s: float) -> None:
        """Take no more connections, give requests that are open ``grace_s``, then cancel them."""
        if self._serving is None:
            return
        self._server.config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]
        self._server.should_exit = True
        done, _ = await asyncio.wait({self._serving}, timeout=grace_s + STOP_SLACK_S)
        if not done:
            self._serving.cancel()
            await asyncio.wait({self._serving})
        if not self._serving.cancelled() and (error := self._serving.exception()) is not None:
            log_event(logger, "http_stop_failed", level=logging.ERROR, exception=error)
        if tasks := set(self._server.server_state.tasks):
            await asyncio.wait(tasks, timeout=STOP_SLACK_S)
        for connection in list(self._server.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()

    def _bind(self) -> socket.socket:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except OSError as error:
            raise self._config_error(error) from error
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _notice_vanished(listener)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise self._config_error(error) from error
        listener.setblocking(False)
        return listener

    def _config_error(self, error: OSError) -> ConfigError:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            remedy = f"cannot be bound on {self._host}; choose a free port, 0 for any, or off"
            return ConfigError("router.http_port", self._port, remedy)
        remedy = f"is no address of this machine ({error.strerror}); try 127.0.0.1"
        return ConfigError(self._host_key, self._host, remedy)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the router's."""
        yield


def _answered_at_the_end(app: ASGIApp) -> ASGIApp:
    """``app``, which answers requests that are cancelled, as a stop does with those that did not
    end in time."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noting_send(message: Message) -> None:
            nonlocal has_begun
            has_begun = has_begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await app(scope, receive, noting_send)
        except asyncio.CancelledError:
            if scope["type"] != "http" or has_begun:
                raise
            # Nobody waits for this task but uvicorn, which would log a bug.
            response = error_response(UnavailableError("the router is shutting down"))
            await response(scope, receive, send)

    return run


def _notice_vanished(listener: socket.socket) -> None:
    """Connections have the options of the socket that accepts them (tcp(7), socket(7))."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_S)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_S * 1000)
