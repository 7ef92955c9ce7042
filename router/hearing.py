"""What servers say of one stream, besides how far they have come: taken in, and what follows.

Progress is for the client and stays with the session. Where a message ends the stream, how it ends
is returned: ending it is up to the session.
"""

from __future__ import annotations

import logging
import time
from typing import assert_never

from router.answering import Answering
from router.attempts import Attempts
from router.cluster import Cluster, StreamMessage
from router.ended_streams import Ending
from router.legs import GenerateLeg, Leg, PrefillLeg
from router.prefilling import Prefilling
from router.servers import Server
from streamfill.errors import ErrorCode, InternalError, ProtocolError, StreamError
from streamfill.messages import server_to_router as s
from streamfill.messages.common import Finish, FinishReason
from streamfill.observability.logging import log_event
from streamfill.stream.state import StreamState, StreamStateMachine

logger = logging.getLogger(__name__)

RETRYABLE_CODES = frozenset(
    {ErrorCode.INTERNAL, ErrorCode.UNAVAILABLE, ErrorCode.ABORTED, ErrorCode.UNKNOWN}
)
"""Codes of `StreamFailed` that speak of the server, not of the request."""

LegMessage = s.Received | s.ResyncRequest | s.Output | s.HandoffReport | s.StreamFailed


class Hearing:
    """Owned by the session. Decides what a message means; has nothing of its own."""

    __slots__ = ("_attempts", "_cluster", "_machine", "_prefilling")

    def __init__(
        self,
        cluster: Cluster,
        machine: StreamStateMachine,
        prefilling: Prefilling,
        attempts: Attempts,
    ) -> None:
        self._cluster = cluster
        self._machine = machine
        self._prefilling = prefilling
        self._attempts = attempts

    def hear(self, leg: Leg, message: LegMessage, now_s: float) -> Ending | None:
        """The server of this leg says this about it."""
        match message:
            case s.Received(seq=seq):
                self._prefilling.acknowledge(leg, seq, now_s)
            case s.Output():
                return self._on_output(leg, message, now_s)
            case s.ResyncRequest(have_seq=have_seq):
                return self._on_resync(leg, have_seq, now_s)
            case s.HandoffReport():
                self._attempts.handoff_reported(message)
            case s.StreamFailed():
                return self._on_failed(leg, message)
            case _:
                assert_never(message)
        return None

    def drop_stale(self, server: Server, message: StreamMessage) -> None:
        """It is about no attempt of now."""
        self._cluster.num_stale_messages += 1
        if isinstance(message, s.Received | s.Output | s.Progress):
            # It still works on what is over. An attempt that is newer there stays.
            now_s = time.monotonic()
            self._cluster.cancels.add(server, self._machine.stream_id, message.attempt, now_s)

    def _on_resync(self, leg: Leg, have_seq: int, now_s: float) -> Ending | None:
        """The server misses what is behind this number; below 0: it misses the stream."""
        log_event(
            logger,
            "resync",
            stream_id=self._machine.stream_id,
            server_id=leg.server.server_id,
            have_seq=have_seq,
        )
        self._cluster.metrics.resyncs.inc()
        if isinstance(leg, GenerateLeg) or have_seq < 0:
            reason = f"server {leg.server.server_id} does not know the stream"
            return self._attempts.lose(leg, reason)
        if not leg.resync(have_seq, now_s):
            self._attempts.restart(leg, now_s)
        return None

    def _on_failed(self, leg: Leg, message: s.StreamFailed) -> Ending | None:
        try:
            code = ErrorCode(message.code)
        except ValueError:
            code = ErrorCode.UNKNOWN
        if code in RETRYABLE_CODES:
            return self._attempts.lose(leg, f"server {leg.server.server_id}: {message.message}")
        is_early = self._machine.can_enter(StreamState.REJECTED)
        ending = StreamState.REJECTED if is_early else StreamState.FAILED
        return Ending(ending, StreamError.from_code(code, message.message))

    def _on_output(self, leg: Leg, output: s.Output, now_s: float) -> Ending | None:
        attempts = self._attempts
        answering = attempts.answering
        leg.acknowledge(leg.last_seq, now_s)
        if answering is None or leg is not attempts.producer():
            self._cluster.num_stale_messages += 1  # a repetition of what was handed off
            return None
        if not answering.hear(leg, output, now_s):
            return None
        finish, server_id = output.finish, leg.server.server_id
        if finish is not None and finish.reason is FinishReason.ABORT:
            return attempts.lose(leg, f"server {server_id} aborted: {finish.message}")
        try:
            ended_by = answering.take(leg, output, now_s)
        except (StreamError, ProtocolError) as error:
            reason = f"server {server_id} sent bad tokens: {error}"
            return Ending(StreamState.FAILED, InternalError(reason))
        if ended_by is not None:
            return self._finish(answering, ended_by, leg if ended_by is finish else None)
        answering.flush()
        if isinstance(leg, PrefillLeg):
            attempts.first_token_out(leg, now_s)
        return None

    def _finish(self, answering: Answering, finish: Finish, through: Leg | None) -> Ending:
        """The answer is complete; `through` is the leg whose server knows it."""
        self._attempts.finished(through)
        done = answering.done(
            finish,
            self._attempts.route(),
            num_prompt_tokens=self._prefilling.log.num_tokens,
            num_invalidated_tokens=self._prefilling.num_invalidated_tokens,
        )
        return Ending(StreamState.DONE, done)
