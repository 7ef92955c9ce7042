"""One stream in the router: how far it has come, and how it ends.

1. `try_place`: a prefill server is chosen; `OpenStream`, then splices as the prompt grows.
2. A decode server is chosen as well, to which the prefill server may send KV already: `PushTo`.
   `commit`: it is chosen again, the same one unless another is far better; `Commit` names it.
3. The prefill server's first `Output` goes to the client at once; then `Generate` goes to the
   decode server, which goes on with the second token when the KV is there, or recomputes.
4. The last token, a stop string, an error, the client or the deadline end it: `Forget` goes to
   servers that are through with it or are to keep its KV, `Cancel` to the others.

Whatever breaks in between, a new attempt follows (`attempts`).

The session owns the stream's state and its end, and hands what happens to those who know what to
do::

    Session ──▶ Timeouts     when its time is over
            ──▶ Hearing      what servers say, besides how far they have come
            ──▶ Attempts     the servers that it is on, and where it goes next
            │       ├──▶ Prefilling    the prompt on its server: PrefillLeg, Moves
            │       ├──▶ Decoding      the answer on its server: GenerateLeg, Handoff
            │       └──▶ Answering     from the commit on: what was asked for, what has come
            ──▶ StreamReport    what others are told of it

All methods are called from the router's loop and never wait. What clients ask for comes through
`handle.ClientHandle`, which keeps the order of their operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from router import timing
from router.answer import Answer
from router.answering import Answering
from router.attempts import Attempts
from router.cluster import Cluster, StreamMessage
from router.decoding import Decoding
from router.ended_streams import EndedStream, Ending
from router.events import EventQueue
from router.hearing import Hearing
from router.interface import Acknowledged, CommitOptions, MoveReason, OpenOptions, Payer
from router.legs import Leg, PrefillLeg
from router.prefilling import Prefilling
from router.prompt import Prompt
from router.recovery.journal import Journal
from router.recovery.replay import LoggedStream
from router.recovery.translate import end_of
from router.sampling import fit_max_new_tokens
from router.segments import SegmentRecord
from router.servers import Server
from router.stream_report import StreamReport
from router.timeouts import Timeouts
from router.watch.frames import StreamFacts, ToMs
from streamfill.errors import CancelledStreamError, StreamError
from streamfill.messages import server_to_router as s
from streamfill.messages.common import Sampling
from streamfill.observability.lifetime import Lifetime, LifetimeEvent
from streamfill.stream.ids import StreamId
from streamfill.stream.state import StreamState, StreamStateMachine
from streamfill.stream.token_log import LoggedSplice
from streamfill.stream.tokenizer import TextTokenizer

NEVER_S = float("inf")


class _Remains(NamedTuple):
    """What late calls about an ended stream are told, besides its state. Small."""

    acknowledged: Acknowledged
    num_output_tokens: int


class Session:
    """State of one stream. Owned by the manager; `on_end` is called exactly once."""

    def __init__(
        self,
        cluster: Cluster,
        tokenizer: TextTokenizer,
        prompt: Prompt,
        options: OpenOptions,
        *,
        idle_timeout_s: float,
        on_end: Callable[[Session, EndedStream], None],
        stream_id: StreamId | None = None,
    ) -> None:
        """With a `stream_id` it is one that the log knows: `take_up` follows."""
        now_s = time.monotonic()
        self.stream_id = cluster.new_stream_id() if stream_id is None else stream_id
        self.options = options
        self.prompt = prompt
        self.machine = StreamStateMachine(self.stream_id)
        self.events = EventQueue()
        self.lifetime = Lifetime()
        self.segments = SegmentRecord(self.lifetime)
        self.timeouts = Timeouts(
            idle_timeout_s=idle_timeout_s, deadline_after_s=options.deadline_s, now_s=now_s
        )
        self.prefilling = Prefilling(cluster, self.stream_id, options, prompt.log)
        decoding = Decoding(cluster, self.stream_id, options, self.lifetime)
        self.attempts = Attempts(cluster, self.stream_id, self.lifetime, self.prefilling, decoding)
        self.client_seq = 0
        """Newest operation of the client that was applied."""
        self.place_wait_s = timing.PLACE_WAIT_S
        """How long a commit waits for a prefill server."""
        self.journal: Journal | None = None
        """None: the stream ends with this process."""
        self._cluster = cluster
        self._tokenizer = tokenizer
        self._on_end = on_end
        self._began_s = now_s
        self._due_s: float | None = None
        """When `tick` has something to do; None: it is to be found out."""
        self._handoff = decoding.handoff
        self._hearing = Hearing(cluster, self.machine, self.prefilling, self.attempts)
        self._report = StreamReport(self.stream_id, options, self.lifetime, self.attempts)
        self._remains: _Remains | None = None
        """From the end on."""
        if stream_id is None:
            self.lifetime.record(LifetimeEvent.OPENED)

    # A log.

    def keep(self, journal: Journal, logged: Sequence[LoggedSplice]) -> None:
        """The stream is to outlive this process. Called once, when it was opened.

        Args:
            journal: its own.
            logged: what its first messages made of the prompt.
        """
        self.journal = journal
        self.events.keeps_tokens = True
        opened_s = self.lifetime.entries[0].at_s
        journal.opened(self.options, opened_s, self.prompt, logged)

    def take_up(self, found: LoggedStream, journal: Journal | None, opened_s: float) -> None:
        """Be the stream that an earlier router process left behind. Called once, first.

        Args:
            found: what the log knows of it.
            journal: its own; None: the log has failed meanwhile.
            opened_s: when it was opened, by this process's clock.
        """
        self.journal = journal
        self.place_wait_s = timing.RESTART_PLACE_WAIT_S
        if journal is not None:
            journal.taken_up(found)
        self.events.keeps_tokens = True
        self.lifetime.record(LifetimeEvent.OPENED, at_s=opened_s)
        self.client_seq = found.client_seq
        commit, ended, answering = found.committed, found.ended, None
        needs_client = self.options.needs_call or commit is not None
        self.timeouts.take_up(opened_s, needs_client=needs_client)
        if commit is not None:
            self.machine.advance(StreamState.COMMITTED)
            answering = self._begin_answer(
                commit.sampling, commit.stop, commit.skip_special_tokens, commit.keep_s
            )
            answering.take_up(found.tokens, self.events)
        self.attempts.take_up(answering)
        if ended is not None:
            self.machine.finish(StreamState(ended.state))
            self.lifetime.record(LifetimeEvent(ended.state))  # at the latest
            self._leave()
            end = end_of(ended)
            if end is not None:
                self._report.note_end(end)
                self.events.close(end)

    def resumed(self, payer: Payer | None) -> bool:
        """Its client came back. Returns whether the stream is on this account now."""
        self.timeouts.touch()
        self._cluster.metrics.log.resumed.inc()
        takes = payer is not None and self.options.payer is None and not self.machine.is_terminal
        if takes:
            self.options = replace(self.options, payer=payer)
            if self.attempts.answering is not None:
                self.attempts.answering.payer = payer
        self._due_s = None
        return takes

    # How it is.

    @property
    def state(self) -> StreamState:
        """Where the stream is in its life."""
        return self.machine.state

    def acknowledged(self) -> Acknowledged:
        """How far the prompt has come."""
        if self._remains is not None:
            return self._remains.acknowledged
        leg, num_tokens = self.prefilling.leg, self.prompt.log.num_tokens
        return Acknowledged(
            client_seq=self.client_seq if self.journal is None else self.journal.durable_seq,
            num_received_tokens=num_tokens,
            num_computed_tokens=0 if leg is None else min(leg.num_computed_tokens, num_tokens),
            num_invalidated_tokens=self.prefilling.num_invalidated_tokens,
        )

    @property
    def num_output_tokens(self) -> int:
        """Of the answer, as far as it has come."""
        if self._remains is not None:
            return self._remains.num_output_tokens
        answering = self.attempts.answering
        return 0 if answering is None else answering.answer.num_tokens

    def facts(self, to_ms: ToMs) -> StreamFacts:
        """See `watch.source.WatchedStream`."""
        return self._report.facts(to_ms, self.state, self.acknowledged(), self.num_output_tokens)

    # For the client's handle.

    def send_changes(
        self,
        logged: list[LoggedSplice],
        segment: int | None,
        *,
        commit_follows: bool = False,
        next_in_s: float | None = None,
    ) -> None:
        """Send what was just recorded in the prompt's log."""
        log, target = self.prompt.log, self._handoff.target
        self.prefilling.changed(
            logged, time.monotonic(), commit_follows=commit_follows, next_in_s=next_in_s
        )
        if target is not None:
            target.load.set(pending_tokens=0, held_tokens=log.num_tokens)
        if segment is not None:
            self.segments.sent(segment, log.last_seq, log.num_tokens)
        self._due_s = None

    def commit(self, options: CommitOptions, seq: int, logged: Sequence[LoggedSplice]) -> None:
        """The prompt is complete. The caller checked everything.

        Args:
            options: how to answer.
            seq: the client's number.
            logged: what the commit itself changed of the prompt.
        """
        now_s = time.monotonic()
        self.machine.advance(StreamState.COMMITTED)
        num_tokens, room_tokens = self.prompt.log.num_tokens, self._cluster.room_tokens()
        sampling = fit_max_new_tokens(options.sampling, num_tokens, room_tokens)
        answering = self._begin_answer(
            sampling, options.stop, options.skip_special_tokens, options.keep_s
        )
        if self.journal is not None:
            self.journal.committed(seq, self.prompt, logged, sampling, options)
        self.attempts.commit(answering, now_s)
        self._due_s = None

    def cancel(self, reason: str) -> None:
        """The client gave it up. Idempotent."""
        self.end(StreamState.ABORTED, CancelledStreamError(f"cancelled: {reason}"))

    def _begin_answer(
        self, sampling: Sampling, stop: Sequence[str], skip_special_tokens: bool, keep_s: float
    ) -> Answering:
        journal = self.journal
        return Answering(
            self._cluster,
            self.machine,
            self.lifetime,
            answer=Answer(self._tokenizer, self.prompt.log.ids, stop, skip_special_tokens),
            sampling=sampling,
            keep_s=keep_s,
            payer=self.options.payer,
            put=self.events.put_token if journal is None else journal.token,
            flush=_nothing if journal is None else journal.flush,
            began_s=self._began_s,
        )

    # For those who place it.

    def try_place(self, now_s: float) -> None:
        """Find a server for what comes next, if none has it; called when one became alive."""
        if not self.machine.is_terminal:
            self.attempts.try_place(now_s)
            self._due_s = None

    def move_from(self, server: Server, *, answers: bool = False) -> None:
        """Leave a draining server, if another can take the stream: before the commit, and an
        answer too where that is wanted."""
        self.attempts.move_from(server, answers=answers)
        self._due_s = None

    def move_to(self, server: Server, reason: MoveReason, why: str) -> None:
        """Begin a new attempt there; the old one is cancelled once the server has the prompt. Only
        while there is a `movable_leg` elsewhere."""
        self.attempts.move_to(server, reason, why)
        self._due_s = None

    def leave_target(self, server: Server) -> None:
        """A decode server that dies or drains will not be handed this stream."""
        self.attempts.leave_target(server)

    def on_streams_lost(self, server: Server, reason: str) -> None:
        """Nothing that was on this server is there any more."""
        self._end_by(self.attempts.server_lost(server, reason))
        self._due_s = None

    # What servers say.

    def on_message(self, server: Server, message: StreamMessage) -> None:
        """Take a message in; what belongs to no current attempt is dropped."""
        attempts, prefilling = self.attempts, self.prefilling
        leg = attempts.leg_of(server, message.attempt)
        now_s = time.monotonic()
        if leg is None:
            if not prefilling.moves.heard(server, message, now_s):
                self._hearing.drop_stale(server, message)
            return
        if isinstance(message, s.Progress):
            self._on_progress(leg, message, now_s)
        else:
            self._end_by(self._hearing.hear(leg, message, now_s))
        if isinstance(leg, PrefillLeg) and leg.is_accepted:
            prefilling.settle_move()
        self._due_s = None

    def _on_progress(self, leg: Leg, message: s.Progress, now_s: float) -> None:
        self.prefilling.acknowledge(leg, message.seq, now_s)
        if isinstance(leg, PrefillLeg):
            leg.progress(message)
            # Less than a page is not computed ahead.
            reached = message.num_computed_tokens + leg.server.facts.page_size - 1
            self.segments.computed(leg.log_seq(message.seq), reached)
            self.events.put_acknowledged(self.acknowledged)

    # Time.

    def is_due(self, now_s: float) -> bool:
        """Whether `tick` has something to do; the manager looks at nothing else."""
        if self._due_s is None:
            self._due_s = self._find_due_s()
        return now_s >= self._due_s

    def tick(self, now_s: float) -> None:
        """Deadlines and repetitions. Called by the manager when it is due."""
        if self._cluster.room.is_waiting(self.stream_id):
            self.timeouts.is_held_back(now_s)
        ending = self.timeouts.over(now_s, is_open=self.state is StreamState.OPEN)
        self._end_by(ending or self.attempts.tick(now_s))
        self._due_s = None

    def _find_due_s(self) -> float:
        if self.machine.is_terminal:
            return NEVER_S
        is_open = self.state is StreamState.OPEN
        return min(self.timeouts.due_s(is_open=is_open), self.attempts.due_s())

    # The end.

    def end(self, state: StreamState, error: StreamError) -> None:
        """End badly, or do nothing when the stream has ended already."""
        self._end_by(Ending(state, error))

    def _end_by(self, ending: Ending | None) -> None:
        if ending is None or not self.machine.finish(ending.state):
            return
        self.lifetime.record(LifetimeEvent(ending.state.value))
        num_prompt_tokens = self.prompt.log.num_tokens
        self._leave()
        ended = self._report.ended(
            ending, num_prompt_tokens=num_prompt_tokens, num_output_tokens=self.num_output_tokens
        )
        say = partial(self._report.log_end, ended, ending.how)
        if self.journal is None:
            say()
            self.events.close(ending.how)
        else:
            self.journal.ended(ending.state.value, ending.how, say)
        self._on_end(self, ended)

    def _leave(self) -> None:
        """Keep only what late calls need."""
        self._remains = _Remains(self.acknowledged(), self.num_output_tokens)
        self.attempts.leave()
        self.prompt = Prompt(self._tokenizer, None)
        self._due_s = NEVER_S


def _nothing() -> None:
    """Tokens that are in no log need no flush."""
