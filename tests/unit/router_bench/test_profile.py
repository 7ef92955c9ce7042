"""From py-spy's stacks to a table of functions."""

from __future__ import annotations

from streamfill.router_bench.profile import LIBRARIES, Row, by_function, by_module

MAIN = "main (router/__main__.py:61);Handle._run (asyncio/events.py:80)"
STACKS = [
    f"{MAIN};Session.on_message (router/session.py:423);encode (streamfill/messages/codec.py:29) 3",
    f"{MAIN};RouterLink.send (router/link.py:102);Socket.send (zmq/sugar/socket.py:713) 5",
    f"{MAIN};RouterLink._receive (/a/b/router/link.py:140) 1",
    f"{MAIN} 1",
    "Thread.run (threading.py:982);EndedStreams._run (router/ended_streams.py:83) 70",
]


def test_a_library_counts_for_its_caller() -> None:
    """Of our functions the innermost; other threads do not count."""
    assert by_function(STACKS) == [
        Row("router/link.py: RouterLink.send", 0.5),
        Row("streamfill/messages/codec.py: encode", 0.3),
        Row("router/link.py: RouterLink._receive", 0.1),
        Row(LIBRARIES, 0.1),
    ]


def test_modules_add_their_functions_up() -> None:
    """The largest first."""
    assert by_module(STACKS)[0] == Row("router/link.py", 0.6)


def test_no_look_is_no_row() -> None:
    """And no division by nothing."""
    assert by_function([]) == []
