"""Notes what happens to one request while it runs, and makes its record."""

from __future__ import annotations

from typing import Final

from streamfill.errors import ErrorCode, StreamError
from streamfill.loadgen.records import Event, Preempted, RequestRecord, as_event
from streamfill.loadgen.target import Reply, ServerAccount
from streamfill.observability.lifetime import PREEMPTION_KINDS, LifetimeEntry, LifetimeEvent
from streamfill.traces.script import Script

_ENDINGS = {
    ErrorCode.CANCELLED: LifetimeEvent.ABORTED,
    ErrorCode.DEADLINE_EXCEEDED: LifetimeEvent.DEADLINE,
    ErrorCode.RESOURCE_EXHAUSTED: LifetimeEvent.REJECTED,
}
"""What is not here has FAILED."""

_SAME_S: Final = 1e-6
"""Times in records are exact to a microsecond."""


class RequestLog:
    """What is known so far of one request. All times are of one monotonic clock, in seconds.

    When the query, each piece and the whole prompt were there follows from the script and the time
    at which the request was due. What the generator did is noted as it does it.

    Attributes:
        script: what the client does.
        due_s: when the request was due.
    """

    def __init__(
        self,
        script: Script,
        *,
        index: int,
        zero_s: float,
        due_s: float,
        released_s: float | None = None,
        is_warm_up: bool = False,
    ) -> None:
        """
        Args:
            index: place in the trace.
            zero_s: start of the schedule; 0 of the record's times.
            released_s: when the limit on requests at the same time let it begin; None: at once.
                Waiting for it counts in all latencies, but the generator is not late by it.
            is_warm_up: leave it out of the figures.
        """
        self.script = script
        self.due_s = due_s
        self._index = index
        self._zero_s = zero_s
        self._free_s = due_s if released_s is None else released_s
        self._is_warm_up = is_warm_up
        self._lag_s: list[float] = []
        self._sent: list[LifetimeEntry] = []
        self._num_sent = 0
        self._warm_ups: list[ServerAccount] = []
        self._num_warm_ups = 0
        self._warm_up_errors: list[str] = []
        self._reply: Reply | None = None
        self._error: StreamError | None = None
        self._end_s: float | None = None

    def note_free(self, at_s: float) -> None:
        """Until now the target held the client up: the generator is not late by that."""
        self._free_s = max(self._free_s, at_s)

    def note_act(self, due_s: float, at_s: float) -> None:
        """The generator did something that was due."""
        self._lag_s.append(max(0.0, at_s - max(due_s, self._free_s)))

    def note_sent(self, num_segments: int, at_s: float) -> None:
        """Of the pieces, the first so many have been sent by now."""
        for number in range(self._num_sent, num_segments):
            self._sent.append(LifetimeEntry(LifetimeEvent.SEGMENT_SENT, at_s, number))
        self._num_sent = max(self._num_sent, num_segments)

    def note_warm_up(self, outcome: Reply | StreamError) -> None:
        """An extra request ended. That it failed does no harm to the answer."""
        self._num_warm_ups += 1
        if isinstance(outcome, Reply):
            self._warm_ups.append(outcome.account)
        else:
            self._warm_up_errors.append(f"warm-up {self._num_warm_ups}: {outcome}")

    def note_reply(self, reply: Reply, at_s: float) -> None:
        """The answer is complete."""
        self._reply, self._end_s = reply, at_s

    def note_failure(self, error: StreamError, at_s: float) -> None:
        """There will be no answer. What comes after an answer changes nothing."""
        if self._end_s is None:
            self._error, self._end_s = error, at_s

    def record(self) -> RequestRecord:
        """Everything; after `note_reply` or `note_failure`."""
        assert self._end_s is not None
        reply, error = self._reply, self._error
        last = ServerAccount() if reply is None else reply.account
        accounts = [*self._warm_ups, last]
        token_ids = None if reply is None else reply.token_ids
        num_tokens = 0
        if reply is not None:
            num_tokens = len(token_ids or ()) or last.num_output_tokens or len(reply.token_times_s)
        return RequestRecord(
            index=self._index,
            request_id=self.script.request_id,
            session_id=self.script.session_id,
            is_warm_up=self._is_warm_up,
            client_events=self._client_events(self._end_s),
            server_events=tuple(event for each in accounts for event in self._moved(each)),
            preemptions=tuple(loss for each in accounts for loss in _preemptions(each)),
            lag_s=tuple(round(lag_s, 6) for lag_s in self._lag_s),
            num_segments=len(self.script.steps),
            num_requests=1 + self._num_warm_ups,
            error_code=None if error is None else str(error.code),
            error="; ".join([*([error.message] if error else ()), *self._warm_up_errors]),
            token_ids=token_ids,
            text="" if reply is None else reply.text,
            num_output_tokens=num_tokens,
            num_prompt_tokens=last.num_prompt_tokens,
            num_cached_tokens=last.num_cached_tokens,
            num_computed_tokens=_total(accounts, "num_computed_tokens"),
            num_recomputed_tokens=_total(accounts, "num_recomputed_tokens"),
            num_reused_tokens=last.num_reused_tokens,
            num_invalidated_tokens=_total(accounts, "num_invalidated_tokens"),
            handoff=last.handoff,
            handoff_bytes=_total(accounts, "handoff_bytes"),
        )

    def _client_events(self, end_s: float) -> tuple[Event, ...]:
        script = self.script
        entries = [LifetimeEntry(LifetimeEvent.OPENED, self.due_s)]
        for number, step in enumerate(script.steps):
            at_s = self.due_s + step.due_s
            entries.append(LifetimeEntry(LifetimeEvent.SEGMENT_RECEIVED, at_s, number))
        commit_s = self.due_s + script.commit_due_s
        entries.append(LifetimeEntry(LifetimeEvent.COMMIT_RECEIVED, commit_s))
        entries = [entry for entry in entries if entry.at_s <= end_s or entry is entries[0]]
        entries += self._sent
        if self._reply is not None:
            entries += token_entries(self._reply.token_times_s)
        entries.sort(key=lambda entry: entry.at_s)
        ending = LifetimeEvent.DONE
        if self._error is not None:
            ending = _ENDINGS.get(self._error.code, LifetimeEvent.FAILED)
        entries.append(LifetimeEntry(ending, max(end_s, entries[-1].at_s)))
        return tuple(_event(entry, -self._zero_s) for entry in entries)

    def _moved(self, account: ServerAccount) -> list[Event]:
        """The server's events, on this clock; nothing where its start is not known."""
        if account.opened_s is None:
            return []
        shift_s = account.opened_s - self._zero_s
        return [_event(entry, shift_s) for entry in account.lifetime]


def _preemptions(account: ServerAccount) -> list[Preempted]:
    """What was taken from a request, and what it cost to have it back."""
    return [
        (kind, entry.num_tokens or 0, entry.predicted_s, entry.actual_s)
        for entry in account.lifetime
        if (kind := PREEMPTION_KINDS.get(entry.event)) is not None
    ]


def token_entries(times_s: tuple[float, ...]) -> list[LifetimeEntry]:
    """The tokens of an answer as events; as ``lifetime.Lifetime.record_token`` has them. A third
    and last one that came together with the second is no LAST_TOKEN: that would be the second."""
    entries: list[LifetimeEntry] = []
    names = (LifetimeEvent.FIRST_TOKEN, LifetimeEvent.SECOND_TOKEN)
    for number, at_s in enumerate(times_s):
        is_last = number == len(times_s) - 1
        if number == len(names) and at_s - times_s[1] < _SAME_S:
            is_last = False
        if number < len(names):
            entries.append(LifetimeEntry(names[number], at_s))
        elif not is_last:
            entries.append(LifetimeEntry(LifetimeEvent.TOKEN, at_s))
        if is_last:
            entries.append(LifetimeEntry(LifetimeEvent.LAST_TOKEN, at_s))
    return entries


def _event(entry: LifetimeEntry, shift_s: float) -> Event:
    """To the microsecond: the rest is noise, and half of a file of records."""
    name, at_s, segment, num_tokens = as_event(entry, shift_s)
    return name, round(at_s, 6), segment, num_tokens


def _total(accounts: list[ServerAccount], field: str) -> int | None:
    """Over all requests made; None: the target does not say."""
    known = [value for each in accounts if (value := getattr(each, field)) is not None]
    return sum(known) if known else None
