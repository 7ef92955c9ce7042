"""`/metrics` of one process, on a port of its own, answered by threads.

The process's own loop has no part in it: a scrape is answered at once while a server computes a
long step. Each connection is one request and gets a thread, a bounded number at a time and for a
bounded time, so that nobody who connects and says nothing costs more than that.
"""

from __future__ import annotations

import errno
import logging
import socket
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final

from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from streamfill.curve.exposure import is_loopback
from streamfill.errors import ConfigError
from streamfill.observability.logging import RateLimited, log_event
from streamfill.observability.metrics import METRICS_PATH
from streamfill.observability.metrics_token import CHALLENGE, is_token_of, read_token

logger = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 16
"""At the same time. Prometheus opens one; one more is closed unheard, and counted in the log."""
CONNECTION_TIMEOUT_S: Final = 10.0
"""For each read and write. Prometheus itself gives a scrape ten seconds."""
CLOSE_TIMEOUT_S: Final = 2.0
_POLL_S: Final = 3600.0
"""The accepting thread sleeps until a connection comes, or `close` ends the sleep."""


class MetricsServer:
    """Serves from its making on. `close` ends it."""

    def __init__(
        self,
        registry: Collector,
        *,
        host: str,
        port: int,
        section: str,
        token_file: str | None = None,
    ) -> None:
        """
        Args:
            registry: what a scrape is answered from. Used in several threads at once.
            host: address to listen on.
            port: 0 for any free one.
            section: of the cluster file, for the errors: ``router``, ``prefill``, ...
            token_file: with what each scrape has to carry; read again for each, so that a new one
                counts at once. None: nothing is asked for.

        Raises:
            ConfigError: the address cannot be had, or there is no token in the file; names the key
                and what to do.
        """
        if token_file is not None:
            read_token(Path(token_file))
        elif not is_loopback(host):
            log_event(
                *(logger, "metrics_open_to_the_network"),
                level=logging.WARNING,
                address=host,
                remedy="set metrics_token_file, or keep metrics_host at 127.0.0.1",
            )
        try:
            self._server = _Server(host, port, registry, token_file)
        except OSError as error:
            raise _config_error(section, host, port, error) from error
        self.port = int(self._server.server_address[1])
        """That is bound."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening. Requests under way are given up at the end of the process."""
        # The order matters: the accepting thread sleeps until its socket has news.
        stopper = threading.Thread(target=self._server.shutdown, name="metrics-stop", daemon=True)
        stopper.start()
        while stopper.is_alive() and self._thread.is_alive():
            self._server.wake()
            stopper.join(0.01)
        self._thread.join(CLOSE_TIMEOUT_S)
        self._server.server_close()


class _Server(ThreadingMixIn, TCPServer):
    """Not http.server's, whose bind asks the name service for this machine's name."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = MAX_CONNECTIONS

    def __init__(self, host: str, port: int, registry: Collector, token_file: str | None) -> None:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        self.address_family = found[0]
        self.registry = registry
        self._token_file = token_file
        self._log_refused = RateLimited()
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._log_full = RateLimited()
        self._log_failed = RateLimited()
        super().__init__((host, port), _Handler)

    def wake(self) -> None:
        """End the sleep of the accepting thread: a socket that is shut down has news at once."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it was already

    def is_allowed(self, headers: Sequence[str], peer: str) -> bool:
        """Whether a scrape with these ``Authorization`` headers is answered. Without a readable
        token none is."""
        if self._token_file is None:
            return True
        reason = "no token, or not the right one"
        try:
            if is_token_of(headers, read_token(Path(self._token_file))):
                return True
        except ConfigError as error:
            reason = str(error)
        if self._log_refused.allow():
            log_event(
                *(logger, "scrape_refused"),
                level=logging.WARNING,
                peer=peer,
                reason=reason,
                num_suppressed=self._log_refused.num_suppressed,
            )
        return False

    def verify_request(self, request: Any, client_address: Any) -> bool:
        if self._places.acquire(blocking=False):
            return True
        if self._log_full.allow():
            log_event(
                logger,
                "metrics_connections_full",
                level=logging.WARNING,
                max_connections=MAX_CONNECTIONS,
                num_suppressed=self._log_full.num_suppressed,
            )
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        is_foreign = isinstance(error, OSError)  # the other side went away
        if not is_foreign and self._log_failed.allow():
            log_event(logger, "scrape_failed", level=logging.ERROR, exception=error)


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: _Server
    timeout = CONNECTION_TIMEOUT_S

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != METRICS_PATH:
            self._reply(404, "text/plain; charset=utf-8", f"try {METRICS_PATH}\n".encode())
            return
        if not self.server.is_allowed(
            self.headers.get_all("Authorization", []), str(self.client_address[0])
        ):
            self._reply(401, "text/plain; charset=utf-8", b"a token is needed\n", CHALLENGE)
            return
        encode, content_type = choose_encoder(self.headers.get("Accept", ""))
        self._reply(200, content_type, encode(self.server.registry))

    def version_string(self) -> str:
        return "streamfill"

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape is nothing to tell of."""

    def _reply(
        self, status: int, content_type: str, body: bytes, challenge: str | None = None
    ) -> None:
        self.send_response(status)
        if challenge is not None:
            self.send_header("WWW-Authenticate", challenge)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _config_error(section: str, host: str, port: int, error: OSError) -> ConfigError:
    key = f"{section}.metrics_port"
    if error.errno == errno.EADDRINUSE:
        remedy = f'is in use on {host}; choose another, 0 for any free one, or "off"'
        return ConfigError(key, port, remedy)
    if error.errno == errno.EACCES:
        return ConfigError(key, port, "needs more rights; choose a port above 1023")
    remedy = f"is no address of this machine ({error.strerror}); try 127.0.0.1"
    return ConfigError("metrics_host", host, remedy)
