"""Exactly-once, in-order delivery of a stream's operations on the receiving side.

Table of what is known per stream, with who owns an entry:

====================  =========================================================
``OpenStream``         makes the entry, or replaces one of an older attempt
``Splice``, ``Commit`` ``seq`` = next: delivered; lower: acknowledged again;
                       higher: a gap, asked for
``Cancel``, ``Forget`` take the entry away
====================  =========================================================
"""

from __future__ import annotations

from typing import NamedTuple

from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s


class Admission(NamedTuple):
    """What to do with one message."""

    deliver: bool
    """Hand it to the scheduler."""
    reply: s.ServerToRouter | None
    """Answer to send at once."""


class InboundGate:
    """Admits the router's stream messages once and in order. Pure: no sockets, no clock."""

    def __init__(self) -> None:
        self._streams: dict[int, tuple[int, int]] = {}
        self.num_duplicates = 0
        self.num_gaps = 0
        self.num_stale = 0

    def __len__(self) -> int:
        return len(self._streams)

    def admit(self, message: r.RouterToServer) -> Admission:
        """Whether ``message`` goes to the scheduler, and what is answered."""
        match message:
            case r.OpenStream(stream_id=stream_id, attempt=attempt):
                known = self._streams.get(stream_id)
                if known is not None and known[0] >= attempt:
                    self.num_duplicates += 1
                    return Admission(False, _received(stream_id, known))
                self._streams[stream_id] = (attempt, 0)
                return Admission(True, s.Received(stream_id=stream_id, attempt=attempt, seq=0))
            case (
                r.Splice(stream_id=stream_id, attempt=attempt, seq=seq)
                | r.Commit(stream_id=stream_id, attempt=attempt, seq=seq)
            ):
                return self._admit_operation(stream_id, attempt, seq)
            case (
                r.Cancel(stream_id=stream_id, attempt=attempt)
                | r.Forget(stream_id=stream_id, attempt=attempt)
            ):
                known = self._streams.get(stream_id)
                if known is not None and known[0] <= attempt:
                    del self._streams[stream_id]
                return Admission(True, None)
            case _:
                return Admission(True, None)

    def clear(self) -> None:
        """Forget every stream: the router that knew them is gone."""
        self._streams.clear()

    def drop(self, stream_id: int, attempt: int) -> None:
        """Forget one stream that the scheduler gave up, unless a newer attempt was opened since."""
        known = self._streams.get(stream_id)
        if known is not None and known[0] <= attempt:
            del self._streams[stream_id]

    def _admit_operation(self, stream_id: int, attempt: int, seq: int) -> Admission:
        known = self._streams.get(stream_id)
        if known is None or known[0] < attempt:
            self.num_gaps += 1
            return Admission(
                False, s.ResyncRequest(stream_id=stream_id, attempt=attempt, have_seq=-1)
            )
        if known[0] > attempt:
            self.num_stale += 1
            return Admission(False, None)
        if seq <= known[1]:
            self.num_duplicates += 1
            return Admission(False, _received(stream_id, known))
        if seq > known[1] + 1:
            self.num_gaps += 1
            return Admission(
                False, s.ResyncRequest(stream_id=stream_id, attempt=attempt, have_seq=known[1])
            )
        self._streams[stream_id] = (attempt, seq)
        return Admission(True, s.Received(stream_id=stream_id, attempt=attempt, seq=seq))


def _received(stream_id: int, known: tuple[int, int]) -> s.Received:
    return s.Received(stream_id=stream_id, attempt=known[0], seq=known[1])
