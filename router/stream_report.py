"""What others are told of one stream: the status page while it looks, log and traces at the end."""

from __future__ import annotations

import logging

from router.attempts import Attempts
from router.ended_streams import EndedStream, Ending
from router.interface import Acknowledged, DoneEvent, OpenOptions
from router.traces import TRACE_PARENT
from router.watch.frames import MAX_ERROR_CHARS, MAX_ID_CHARS, StreamFacts, ToMs
from streamfill.errors import StreamError
from streamfill.observability.lifetime import Lifetime
from streamfill.observability.logging import log_event
from streamfill.stream.ids import StreamId
from streamfill.stream.state import StreamState

logger = logging.getLogger(__name__)


class StreamReport:
    """Owned by the session. Remembers whose trace the stream belongs to, and why it ended badly."""

    __slots__ = ("_attempts", "_error", "_lifetime", "_options", "_stream_id", "_trace_parent")

    def __init__(
        self, stream_id: StreamId, options: OpenOptions, lifetime: Lifetime, attempts: Attempts
    ) -> None:
        """Called within the call that opens the stream."""
        self._stream_id = stream_id
        self._options = options
        self._lifetime = lifetime
        self._attempts = attempts
        self._trace_parent = TRACE_PARENT.get()
        self._error = ""

    def facts(
        self, to_ms: ToMs, state: StreamState, far: Acknowledged, num_output_tokens: int
    ) -> StreamFacts:
        """See `watch.source.WatchedStream`.

        Args:
            far: how far the prompt has come, or had when the stream ended.
            num_output_tokens: of the answer.
        """
        options, route = self._options, self._attempts.route()
        first, last = self._lifetime.entries[0], self._lifetime.entries[-1]
        num_known_tokens = far.num_received_tokens
        return StreamFacts(
            id=str(self._stream_id),
            request_id=options.request_id[:MAX_ID_CHARS],
            tenant=options.tenant,
            mode=options.mode.value,
            state=state.value,
            priority=options.priority,
            num_known_tokens=num_known_tokens,
            num_computed_tokens=num_known_tokens if num_output_tokens else far.num_computed_tokens,
            num_invalidated_tokens=far.num_invalidated_tokens,
            num_output_tokens=num_output_tokens,
            num_attempts=route.num_attempts,
            prefill_server=route.prefill_server,
            decode_server=route.decode_server,
            handoff=route.handoff[:MAX_ERROR_CHARS],
            error=self._error[:MAX_ERROR_CHARS],
            opened_ms=to_ms(first.at_s),
            ended_ms=to_ms(last.at_s) if last.event.is_ending else None,
        )

    def note_end(self, how: DoneEvent | StreamError) -> None:
        """The stream has ended, here or in an earlier router process."""
        self._error = "" if isinstance(how, DoneEvent) else str(how)

    def ended(
        self, ending: Ending, *, num_prompt_tokens: int, num_output_tokens: int
    ) -> EndedStream:
        """What is left of the stream. Called once; `log_end` follows."""
        state, how = ending
        options, route = self._options, self._attempts.route()
        self.note_end(how)
        return EndedStream(
            stream_id=self._stream_id,
            request_id=options.request_id,
            mode=options.mode.value,
            outcome=state.value,
            error=self._error,
            entries=self._lifetime.entries,
            prefill_server=route.prefill_server,
            decode_server=route.decode_server,
            handoff=route.handoff,
            num_attempts=route.num_attempts,
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            trace_parent=self._trace_parent,
        )

    def log_end(self, ended: EndedStream, how: DoneEvent | StreamError) -> None:
        """Say that it has ended. Called once, when that is certain to outlive this process."""
        log_event(
            logger,
            "stream_ended",
            stream_id=ended.stream_id,
            request_id=ended.request_id,
            outcome=ended.outcome,
            reason=how.finish_reason if isinstance(how, DoneEvent) else ended.error,
            num_prompt_tokens=ended.num_prompt_tokens,
            num_attempts=ended.num_attempts,
        )
