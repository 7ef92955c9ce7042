"""One stream's side of the log: what happens to it is written before its client hears of it.

Used by the stream's session and handle, in the router's loop. Tokens and the end go to the client's
`EventQueue` from here, when they are durable.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from router.events import EventQueue
from router.interface import CommitOptions, DoneEvent, OpenOptions, TokenEvent
from router.prompt import Prompt
from router.recovery import records as rec
from router.recovery.interface import StreamLog, Ticket
from router.recovery.prompt_state import EMPTY, PromptState, change_between
from router.recovery.replay import LoggedStream
from router.recovery.translate import error_of, failure_of, finished_of
from streamfill.errors import StreamError
from streamfill.messages.codec import pack_ids
from streamfill.messages.common import Sampling
from streamfill.stream.token_log import LoggedSplice

REWRITE_BYTES: Final = 256 * 1024
"""Changes of an open stream are put together to one when they have become so many bytes,"""
REWRITE_RATIO: Final = 4
"""and so many times those of the prompt that they make: updates replace much of what was logged."""
MAX_REFUSALS: Final = 16
"""Refused operations that are told again to a client that comes back; it has few under way."""


class Journal:
    """Of one stream that its client may come back to."""

    def __init__(self, log: StreamLog, stream_id: int, events: EventQueue) -> None:
        self.durable_seq = 0
        """Newest operation of the client that outlives this process."""
        self._log = log
        self._stream_id = stream_id
        self._events = events
        self._state: PromptState = EMPTY
        self._ticket = Ticket(0)
        self._opened: rec.Opened | None = None
        self._num_bytes = 0
        self._unsaid: list[TokenEvent] = []
        self._refusals: deque[rec.Refused] = deque(maxlen=MAX_REFUSALS)

    def opened(
        self, options: OpenOptions, opened_s: float, prompt: Prompt, logged: Sequence[LoggedSplice]
    ) -> None:
        """The stream exists. Called once, before anything else."""
        record = rec.Opened(
            mode=options.mode,
            opened_s=opened_s,
            priority=options.priority,
            request_id=options.request_id,
            deadline_s=options.deadline_s,
            ttft_slo_s=options.ttft_slo_s,
            tenant=options.tenant,
            namespace=options.namespace,
            share=options.share,
            needs_call=options.needs_call,
            change=self._change(prompt, logged),
        )
        self._opened = record
        self._append(record)

    def taken_up(self, found: LoggedStream) -> None:
        """Instead of `opened`: the log has the stream already."""
        self._opened = found.opened
        self._state = found.prompt.state
        self._num_bytes = found.num_bytes
        self._refusals.extend(found.refused)
        self.durable_seq = found.client_seq

    def changed(self, seq: int, prompt: Prompt, logged: Sequence[LoggedSplice]) -> None:
        """An operation was applied."""
        self._applied(seq)
        change = self._change(prompt, logged) or _nothing(prompt)
        self._append(rec.Changed(seq=seq, change=change))
        self._when_durable_seq(seq)
        state_bytes = 4 * prompt.log.num_tokens + len(self._state.text)
        if self._num_bytes > max(REWRITE_BYTES, REWRITE_RATIO * state_bytes):
            self._rewrite(seq, prompt)

    def refused(self, seq: int, error: StreamError) -> None:
        """An operation was refused."""
        record = rec.Refused(seq=seq, code=str(error.code), message=error.message)
        self._refusals.append(record)
        self._append(record)

    def refusals_from(self, seq: int) -> list[tuple[int, StreamError]]:
        """Refused operations from this number on, with why, in their order."""
        return [
            (each.seq, error_of(each.code, each.message, {}))
            for each in self._refusals
            if each.seq >= seq
        ]

    def committed(
        self,
        seq: int,
        prompt: Prompt,
        logged: Sequence[LoggedSplice],
        sampling: Sampling,
        options: CommitOptions,
    ) -> None:
        """The prompt is complete. `sampling` is what came of the wish in `options`."""
        self._applied(seq)
        self._append(
            rec.Committed(
                seq=seq,
                sampling=sampling,
                stop=tuple(options.stop),
                skip_special_tokens=options.skip_special_tokens,
                keep_s=options.keep_s,
                change=self._change(prompt, logged),
            )
        )
        self._when_durable_seq(seq)

    def token(self, event: TokenEvent) -> None:
        """A token of the answer. Goes to the client behind the next `flush`."""
        self._unsaid.append(event)

    def flush(self) -> None:
        """Log the tokens that came since the last time."""
        events, self._unsaid = self._unsaid, []
        if events:
            self._append(rec.Answered(tokens=_tokens(events, last_is_silent=False)))
            self._log.when_durable(self._ticket, lambda: self._give(events))

    def ended(
        self, state: str, end: DoneEvent | StreamError, say: Callable[[], None] | None = None
    ) -> None:
        """The stream is over. Nothing follows.

        Args:
            say: called when the client is told: before, a router that dies has not ended it.
        """
        events, self._unsaid = self._unsaid, []
        finished, failure, silent = None, None, False
        if isinstance(end, DoneEvent):
            finished = finished_of(end)
            silent = bool(events) and events[-1].token_id == end.matched_stop
        else:
            failure = failure_of(end)
        tokens = _tokens(events, last_is_silent=silent) if events else None
        self._append(rec.Ended(state=state, tokens=tokens, finished=finished, failure=failure))

        def tell() -> None:
            if say is not None:
                say()
            self._give(events)
            self._events.close(end)

        self._log.when_durable(self._ticket, tell)

    async def durable(self) -> None:
        """Wait until all that was logged of the stream so far outlives this process."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._log.when_durable(self._ticket, lambda: _wake(future))
        await future

    def _give(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            self._events.put_token(event)

    def _applied(self, seq: int) -> None:
        """It may have been refused before, under the same number."""
        if self._refusals:
            left = [each for each in self._refusals if each.seq != seq]
            self._refusals = deque(left, MAX_REFUSALS)

    def _when_durable_seq(self, seq: int) -> None:
        def note() -> None:
            self.durable_seq = seq

        self._log.when_durable(self._ticket, note)

    def _change(self, prompt: Prompt, logged: Sequence[LoggedSplice]) -> rec.Change | None:
        after = prompt.text_state()
        if not logged and after == self._state:
            return None
        num_tokens = prompt.log.num_tokens
        keep_tokens = min((each.splice.keep_tokens for each in logged), default=num_tokens)
        change = change_between(self._state, after, prompt.log.ids, min(keep_tokens, num_tokens))
        self._state = after
        return change

    def _rewrite(self, seq: int, prompt: Prompt) -> None:
        assert self._opened is not None
        whole = change_between(EMPTY, self._state, prompt.log.ids, 0)
        self._opened = msgspec.structs.replace(self._opened, change=None)
        all_records: tuple[rec.Record, ...] = (
            self._opened,
            *self._refusals,
            rec.Changed(seq=seq, change=whole),
        )
        records = [rec.encode_record(record) for record in all_records]
        self._num_bytes = sum(map(len, records))
        self._ticket = self._log.rewrite(self._stream_id, records)

    def _append(self, record: rec.Record) -> None:
        body = rec.encode_record(record)
        self._num_bytes += len(body)
        self._ticket = self._log.append(self._stream_id, body)


def _tokens(events: Sequence[TokenEvent], *, last_is_silent: bool) -> rec.Tokens:
    has_logprobs = any(event.logprob is not None for event in events)
    return rec.Tokens(
        first_index=events[0].index,
        ids=pack_ids([event.token_id for event in events]),
        logprobs=tuple(event.logprob for event in events) if has_logprobs else (),
        last_is_silent=last_is_silent,
    )


def _nothing(prompt: Prompt) -> rec.Change:
    """An operation that changed nothing still has a number."""
    state = prompt.text_state()
    return change_between(state, state, prompt.log.ids, prompt.log.num_tokens)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
