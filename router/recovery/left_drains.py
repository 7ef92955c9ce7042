"""Drains of servers as a router process leaves them to the next one: one fact in the log's file,
all of them together, in JSON."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from streamfill.stream.ids import ServerId


class LeftDrain(msgspec.Struct, frozen=True, kw_only=True):
    """An operator's wish to have a server empty. Fields are only added, with a default."""

    incarnation: int
    """Of the server process: it is drained still when it registers again. Another one that was
    started under its id while there was no router is not."""
    move_answers_at_s: float | None
    """By this machine's clock, from which on answers are moved as well. None: never."""


def write_drains(drains: Mapping[ServerId, LeftDrain]) -> str:
    """For `LogFile.set_meta`."""
    return msgspec.json.encode(drains).decode()


def read_drains(text: str | None) -> dict[ServerId, LeftDrain]:
    """What `write_drains` made; nothing where there is nothing of this form."""
    try:
        found = msgspec.json.decode(text or "{}", type=dict[str, LeftDrain])
    except msgspec.MsgspecError:
        return {}
    return {ServerId(server_id): drain for server_id, drain in found.items()}
