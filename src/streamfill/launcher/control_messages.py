"""What is said on the launcher's control socket: a request, lines of progress, one outcome.

Each message is one line of JSON. There is one request to a connection.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from streamfill.messages.common import Role

CONTROL_SOCKET: Final = "launcher.sock"
"""In the cluster's state folder."""
MAX_LINE_BYTES: Final = 64 * 1024


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class AddServer(_Message, frozen=True, kw_only=True, tag="add_server"):
    """Start one more server."""

    role: Role
    settings: dict[str, Any] = {}
    """Keys of the role's section in the cluster file whose values are to differ."""


class RemoveServer(_Message, frozen=True, kw_only=True, tag="remove_server"):
    """End a server's process for good. Draining it is the router's work, and comes before."""

    server_id: str
    force: bool = False
    """Also the last prefill server."""


class Progress(_Message, frozen=True, kw_only=True, tag="progress"):
    """One more step; for people."""

    text: str


class ServerAdded(_Message, frozen=True, kw_only=True, tag="server_added"):
    """It is ready, and the router counts on it."""

    server_id: str
    pid: int
    ready_after_s: float
    """From its start until the router had it."""
    log_file: str


class ServerRemoved(_Message, frozen=True, kw_only=True, tag="server_removed"):
    """Its process has ended and will not be started again."""

    server_id: str
    ended: str
    """How: ``ended with exit code 0``."""


class Refused(_Message, frozen=True, kw_only=True, tag="refused"):
    """Nothing came of it."""

    reason: str


Request = AddServer | RemoveServer
Outcome = ServerAdded | ServerRemoved | Refused
Reply = Progress | Outcome
