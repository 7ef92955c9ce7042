"""The other end of the launcher's control socket, for commands."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final, assert_never

import msgspec

from streamfill.launcher.control_messages import (
    MAX_LINE_BYTES,
    Progress,
    Refused,
    Reply,
    Request,
    ServerAdded,
    ServerRemoved,
)
from streamfill.launcher.control_server import short_path
from streamfill.launcher.errors import LaunchError
from streamfill.launcher.state import ClusterState

_POLL_S: Final = 1.0
"""Between two looks whether the launcher still lives."""
_NAME: Final = "the launcher"
_DECODER: Final[msgspec.json.Decoder[Reply]] = msgspec.json.Decoder(Reply)


def ask_launcher(
    state: ClusterState, folder: Path, request: Request, tell: Callable[[str], None]
) -> ServerAdded | ServerRemoved:
    """Have the launcher of a running cluster do something, and wait until it is done.

    Args:
        state: of that cluster.
        folder: its state folder.
        tell: called with each line about how far it is.

    Raises:
        LaunchError: it refused, and says why; or it cannot be reached, or ended meanwhile.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_POLL_S)
        try:
            with short_path(folder) as path:
                connection.connect(path)
            connection.sendall(msgspec.json.encode(request) + b"\n")
        except OSError as error:
            reason = (
                f"(pid {state.launcher_pid}) cannot be reached ({error.strerror or error}); it may "
                "still be starting, or be of another version of streamfill"
            )
            raise LaunchError(_NAME, reason) from error
        received = b""
        while True:
            line, newline, rest = received.partition(b"\n")
            if not newline:
                received += _receive(connection, state)
                continue
            received = rest
            reply = _decoded(line)
            match reply:
                case Progress(text=text):
                    tell(text)
                case Refused(reason=reason):
                    raise LaunchError(_NAME, f"refused: {reason}")
                case ServerAdded() | ServerRemoved():
                    return reply
                case _:
                    assert_never(reply)


def _receive(connection: socket.socket, state: ClusterState) -> bytes:
    while True:
        try:
            received = connection.recv(MAX_LINE_BYTES)
        except TimeoutError:
            if state.is_alive:
                continue
            received = b""
        except OSError as error:
            raise LaunchError(_NAME, f"was lost: {error}") from error
        if not received:
            raise LaunchError(_NAME, "ended before it answered")
        return received


def _decoded(line: bytes) -> Reply:
    try:
        return _DECODER.decode(line)
    except msgspec.DecodeError as error:
        reason = f"said what cannot be read ({error}); is it of another version of streamfill?"
        raise LaunchError(_NAME, reason) from error
