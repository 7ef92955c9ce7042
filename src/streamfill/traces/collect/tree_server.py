"""Serves a folder of pages on localhost, for a crawl that leaves the network alone."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

_POLL_S: Final = 0.05
"""How long the end of the server may take."""


class _SilentHandler(SimpleHTTPRequestHandler):
    """Writes no line per request."""

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the crawl counts its own failures."""


@contextmanager
def served_tree(folder: Path) -> Iterator[str]:
    """The URL under which ``folder`` can be read inside the block, on a free port of localhost."""
    handler = functools.partial(_SilentHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(
            target=server.serve_forever, args=(_POLL_S,), name="tree-server", daemon=True
        )
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()
