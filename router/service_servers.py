"""`DrainServer` and `ResumeServer`: their requests as checked plain data."""

from __future__ import annotations

import math
from typing import NamedTuple

from router.request_checks import wrong
from streamfill.api import streamfill_pb2 as pb
from streamfill.stream.ids import ServerId

MAX_ID_CHARS = 256
"""No server has a longer one; a request may be as large as a document."""


class DrainWish(NamedTuple):
    """What an operator asks for; as the arguments of ``StreamManager.drain_server``."""

    server_id: ServerId
    answers_s: float | None
    force: bool


def drain_wish(message: pb.DrainServerRequest) -> DrainWish:
    """Which server, and how.

    Raises:
        InvalidArgumentError: there is no id, or the time is none.
    """
    answers_s: float | None = None
    if message.HasField("move_answers_after_s"):
        answers_s = message.move_answers_after_s
        if math.isnan(answers_s) or answers_s < 0:
            raise wrong("move_answers_after_s", answers_s, "0 or more")
    return DrainWish(server_id_of(message), answers_s, message.force)


def server_id_of(message: pb.DrainServerRequest | pb.ResumeServerRequest) -> ServerId:
    """The server that is meant.

    Raises:
        InvalidArgumentError: there is no id, or one that no server can have.
    """
    if not 0 < len(message.server_id) <= MAX_ID_CHARS:
        shown = message.server_id[:20]
        raise wrong("server_id", shown, "the id of a server, as `streamfill servers list` shows it")
    return ServerId(message.server_id)
