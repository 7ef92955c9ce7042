"""One stream in the router: where it is, how far it has come, and how it ends.

1. `try_place`: a prefill server is chosen; `OpenStream`, then splices as the prompt grows.
2. A decode server is chosen as well, to which the prefill server may send KV already: `PushTo`.
   `commit`: it is chosen again, the same one unless another is far better; `Commit` names it.
3. The prefill server's first `Output` goes to the client at once; then `Generate` goes to the
   decode server, which goes on with the second token when the KV is there, or recomputes.
4. The last token, a stop string, an error, the client or the deadline end it: `Forget` goes to
   servers that are through with it, `Cancel` to those that may not be.

Whatever breaks in between, `_recover` starts a new attempt: before the first token by giving the
prompt to a prefill server, afterwards by giving prompt and answer so far to any server; a decode
server gets the prompt's KV again, if its prefill server still has it. Outputs are
numbered, so the client sees each token once.

All methods are called from the router's loop and never wait. What clients ask for comes through
`handle.ClientHandle`, which keeps the order of their operations.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import assert_never

from router import timing
from router.accounts import WorkRecord
from router.answer import Answer
from router.cluster import Cluster, StreamMessage
from router.ended_streams import EndedStream
from router.events import EventQueue
from router.interface import (
    Acknowledged,
    CommitOptions,
    DoneEvent,
    MoveReason,
    OpenOptions,
    Payer,
    Usage,
)
from router.legs import GenerateLeg, PrefillLeg
from router.moves import Moves
from router.placement.loads import ServerState
from router.placement.placer import StreamPlacing
from router.prompt import Prompt
from router.recovery import records as rec
from router.recovery.journal import Journal
from router.recovery.replay import LoggedStream, LoggedToken
from router.recovery.translate import done_of, error_of
from router.retries import Retries
from router.sampling import fit_max_new_tokens
from router.segments import SegmentRecord
from router.servers import Assignment, Server
from router.traces import TRACE_PARENT
from router.watch.frames import MAX_ERROR_CHARS, MAX_ID_CHARS, StreamFacts, ToMs
from streamfill.errors import (
    CancelledStreamError,
    DeadlineExceededError,
    ErrorCode,
    InternalError,
    ProtocolError,
    StreamError,
    UnavailableError,
)
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import pack_ids, unpack_ids
from streamfill.messages.common import Finish, FinishReason, HandoffTarget, KvPeer, Role, Sampling
from streamfill.observability.lifetime import Lifetime, LifetimeEvent
from streamfill.observability.logging import log_event
from streamfill.stream.ids import SeqNo, StreamId, TransferId
from streamfill.stream.state import StreamState, StreamStateMachine
from streamfill.stream.token_log import LoggedSplice
from streamfill.stream.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

NEVER_S = float("inf")

RETRYABLE_CODES = frozenset(
    {ErrorCode.INTERNAL, ErrorCode.UNAVAILABLE, ErrorCode.ABORTED, ErrorCode.UNKNOWN}
)
"""Codes of `StreamFailed` that speak of the server, not of the request."""

_Leg = PrefillLeg | GenerateLeg


@dataclass(slots=True)
class _Target:
    """The decode server that the answer is to go on at, and its reserved share of load."""

    load: Assignment
    transfer_id: TransferId | None = None
    """Of the hand-off, once the stream is committed."""
    transfer_failed: bool = False


@dataclass(frozen=True, slots=True)
class _Committed:
    """What the client asked for, as far as there is room for it, and the answer to it."""

    sampling: Sampling
    answer: Answer
    keep_s: float


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
        self._work = WorkRecord(self.lifetime, now_s)
        self.client_seq = 0
        """Newest operation of the client that was applied."""
        self.place_wait_s = timing.PLACE_WAIT_S
        """How long a commit waits for a prefill server."""
        self.journal: Journal | None = None
        """None: the stream ends with this process."""
        self._due_s: float | None = None
        """When `tick` has something to do; None: it is to be found out."""
        self._cluster = cluster
        self._tokenizer = tokenizer
        self._on_end = on_end
        self._idle_timeout_s = idle_timeout_s
        self._touched_s = now_s
        self._deadline_s = NEVER_S if options.deadline_s is None else now_s + options.deadline_s
        self._prefill: PrefillLeg | None = None
        self._generate: GenerateLeg | None = None
        self._target: _Target | None = None
        self._committed: _Committed | None = None
        self._placing = StreamPlacing(cluster.placer, self.stream_id, options.namespace)
        self._attempt = 0
        self._num_placed_anew = 0
        """Attempts that did not fail, but were begun elsewhere before much was sent."""
        self.moves = Moves()
        self._retries = Retries()
        self._heard_s = now_s
        self._gap_asked_s = float("-inf")
        self._invalidated_before = 0
        self._num_cached_tokens: int | None = None
        self._handoff = "none"
        self._handoff_report: s.HandoffReport | None = None
        """Of the newest hand-off, if it went well."""
        self._kv_codec = "none"
        self._decoded_by_prefill = False
        self._prefill_server = ""
        self._decode_server = ""
        self._last_acknowledged: Acknowledged | None = None
        self._num_output_tokens = 0
        self._error = ""
        self._trace_parent = TRACE_PARENT.get()
        self._resume_by_s = NEVER_S
        """When its client must have come back."""
        if stream_id is None:
            self.lifetime.record(LifetimeEvent.OPENED)

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
        if self.options.deadline_s is not None:
            self._deadline_s = opened_s + self.options.deadline_s
        self.client_seq = found.client_seq
        self._attempt = 1
        if self.options.needs_call or found.committed is not None:
            self._resume_by_s = self._touched_s + timing.RESUME_WAIT_S
        if found.committed is not None:
            self._take_up_answer(found.committed, found.tokens)
        if found.ended is not None:
            self._take_up_end(found.ended)

    def _take_up_answer(self, commit: rec.Committed, tokens: Sequence[LoggedToken]) -> None:
        self.machine.advance(StreamState.COMMITTED)
        stop, skip_special = commit.stop, commit.skip_special_tokens
        answer = Answer(self._tokenizer, self.prompt.log.ids, stop, skip_special)
        self._committed = _Committed(commit.sampling, answer, commit.keep_s)
        if tokens:
            self.machine.advance(StreamState.DECODING)
        for token in tokens:
            event = answer.push(token.token_id, token.logprob, silent=token.is_silent)
            self.events.put_token(event)

    def _take_up_end(self, ended: rec.Ended) -> None:
        self.machine.finish(StreamState(ended.state))
        self._last_acknowledged = self.acknowledged()
        self._num_output_tokens = self.num_output_tokens
        self.prompt = Prompt(self._tokenizer, None)
        self._committed = None
        if ended.finished is not None:
            self.events.close(done_of(ended.finished))
        elif ended.failure is not None:
            failure = ended.failure
            self.events.close(error_of(failure.code, failure.message, failure.details))

    def resumed(self, payer: Payer | None) -> bool:
        """Its client came back. Returns whether the stream is on this account now."""
        self.touch()
        self._cluster.metrics.log.resumed.inc()
        takes = payer is not None and self.options.payer is None and not self.machine.is_terminal
        if takes:
            self.options = replace(self.options, payer=payer)
        self._due_s = None
        return takes

    # For the client's handle.

    @property
    def state(self) -> StreamState:
        """Where the stream is in its life."""
        return self.machine.state

    def acknowledged(self) -> Acknowledged:
        """How far the prompt has come."""
        if self._last_acknowledged is not None:
            return self._last_acknowledged
        computed = 0
        invalidated = self._invalidated_before + self.moves.num_invalidated_tokens
        if self._prefill is not None:
            computed = min(self._prefill.num_computed_tokens, self.prompt.log.num_tokens)
            invalidated += self._prefill.num_invalidated_tokens
        return Acknowledged(
            client_seq=self.client_seq if self.journal is None else self.journal.durable_seq,
            num_received_tokens=self.prompt.log.num_tokens,
            num_computed_tokens=computed,
            num_invalidated_tokens=invalidated,
        )

    @property
    def num_output_tokens(self) -> int:
        """Of the answer, as far as it has come."""
        if self._committed is None:
            return self._num_output_tokens
        return self._committed.answer.num_tokens

    def facts(self, to_ms: ToMs) -> StreamFacts:
        """See `watch.source.WatchedStream`."""
        far, num_output_tokens = self.acknowledged(), self.num_output_tokens
        first, last = self.lifetime.entries[0], self.lifetime.entries[-1]
        num_known_tokens = far.num_received_tokens
        return StreamFacts(
            id=str(self.stream_id),
            request_id=self.options.request_id[:MAX_ID_CHARS],
            tenant=self.options.tenant,
            mode=self.options.mode.value,
            state=self.state.value,
            priority=self.options.priority,
            num_known_tokens=num_known_tokens,
            num_computed_tokens=num_known_tokens if num_output_tokens else far.num_computed_tokens,
            num_invalidated_tokens=far.num_invalidated_tokens,
            num_output_tokens=num_output_tokens,
            num_attempts=self._attempt - self._num_placed_anew,
            prefill_server=self._prefill_server,
            decode_server="" if self._decoded_by_prefill else self._decode_server,
            handoff=self._handoff[:MAX_ERROR_CHARS],
            error=self._error[:MAX_ERROR_CHARS],
            opened_ms=to_ms(first.at_s),
            ended_ms=to_ms(last.at_s) if last.event.is_ending else None,
        )

    def touch(self) -> None:
        """The client did something."""
        self._touched_s = time.monotonic()
        self._resume_by_s = NEVER_S

    def send_changes(
        self,
        logged: list[LoggedSplice],
        segment: int | None,
        *,
        commit_follows: bool = False,
        next_in_s: float | None = None,
    ) -> None:
        """Send what was just recorded in the prompt's log."""
        now_s = time.monotonic()
        if self._prefill is not None:
            for each in logged:
                self._prefill.splice(
                    each, now_s, commit_follows=commit_follows, next_in_s=next_in_s
                )
                self.moves.splice(each, now_s)
            if not commit_follows:
                self._count_uncommitted(self._prefill)
            if logged:
                self._note_sent(self._prefill, min(each.splice.keep_tokens for each in logged))
        if self._target is not None:
            self._target.load.set(pending_tokens=0, held_tokens=self.prompt.log.num_tokens)
        if segment is not None:
            self.segments.sent(segment, self.prompt.log.last_seq, self.prompt.log.num_tokens)
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
        self._settle_move()
        self._cluster.room.leave(self.stream_id)
        log = self.prompt.log
        room_tokens = self._cluster.room_tokens()
        self._committed = _Committed(
            fit_max_new_tokens(options.sampling, log.num_tokens, room_tokens),
            Answer(self._tokenizer, log.ids, options.stop, options.skip_special_tokens),
            options.keep_s,
        )
        if self.journal is not None:
            sampling = self._committed.sampling
            self.journal.committed(seq, self.prompt, logged, sampling, options)
        self._heard_s = now_s
        if self._prefill is not None:
            self._send_commit(self._prefill, self._committed, now_s)
        else:
            self.try_place(now_s)
        self._due_s = None

    def cancel(self, reason: str) -> None:
        """The client gave it up. Idempotent."""
        self.end(StreamState.ABORTED, CancelledStreamError(f"cancelled: {reason}"))

    # Placement.

    def try_place(self, now_s: float) -> None:
        """Find a server for what comes next, if none has it; called when one became alive."""
        if self.machine.is_terminal or self._producer() is not None:
            if self.state is StreamState.OPEN and self._prefill is not None:
                self._assign_decode(self._prefill)
            return
        self._retries.wait(now_s)
        if self._retries.begin_try(now_s):
            if self._committed is not None and self._committed.answer.num_tokens:
                self._place_generate(self._committed, now_s)
            else:
                self._place_prefill(now_s)
            if self._producer() is not None:
                self._retries.placed()
        self._due_s = None

    @property
    def may_be_placed(self) -> bool:
        """Whether `place_by` is of use."""
        is_here = self._prefill is not None and not self.moves.is_under_way
        return is_here and self._placing.is_open(self.prompt.log.num_tokens)

    def place_by(self, prompt: Sequence[int], *, is_complete: bool) -> None:
        """Ask the placement policy again, as long as little or nothing was sent: what the prompt
        begins with is known only now.

        Args:
            prompt: as it will be.
            is_complete: its commit is right behind.
        """
        leg = self._prefill
        if leg is None:
            return
        with leg.load.left_out():
            server = self._cluster.choose_prefill(
                self._placing,
                prompt,
                is_complete=is_complete,
                need_tokens=len(prompt) + 1,
                avoid=self._retries.failed_on,
            )
        if server is not None and server is not leg.server:
            self._drop(leg)
            self._attempt += 1  # a server that is come back to takes no attempt that it cancelled
            self._num_placed_anew += 1
            self._cluster.metrics.placed_anew.inc()
            self._begin_prefill(server, time.monotonic())

    def _note_sent(self, leg: PrefillLeg, keep_tokens: int) -> None:
        self._placing.sent(leg.server.server_id, keep_tokens, self.prompt.log.ids, time.monotonic())

    @property
    def is_kept_by_server(self) -> bool:
        """Whether a server has the prompt and will answer it, if only because it had it before it
        began to drain."""
        leg = self._producer()
        return leg is not None and leg.server.state in (ServerState.ALIVE, ServerState.DRAINING)

    def movable_leg(self) -> PrefillLeg | None:
        """Its attempt, while another server could take it over: before the commit, and when it is
        not on its way already."""
        if self.state is not StreamState.OPEN or self.moves.is_under_way:
            return None
        return self._prefill

    def move_from(self, server: Server, *, answers: bool = False) -> None:
        """Leave a draining server, if another can take the stream: before the commit, and an
        answer too where that is wanted."""
        leg = self.movable_leg()
        if leg is not None and leg.server is server:
            need_tokens = self.prompt.log.num_tokens + 1
            to = self._choose_prefill(need_tokens)
            if to is not None:
                self.move_to(to, MoveReason.DRAIN, f"{server.server_id} drains")
        elif answers and self._committed is not None:
            self._move_answer(server, self._committed)

    def move_to(self, server: Server, reason: MoveReason, why: str) -> None:
        """Begin a new attempt there; the old one is cancelled once the server has the prompt. Only
        while there is a `movable_leg` elsewhere."""
        old = self._prefill
        assert old is not None
        now_s = time.monotonic()
        self.moves.begin(old, reason, now_s)
        self._note_move(old.server, server.server_id, reason, why)
        self._attempt += 1
        self._begin_prefill(server, now_s)
        self._due_s = None

    def _move_answer(self, server: Server, committed: _Committed) -> None:
        if self._target is not None and self._target.load.server is server:
            self._release_target()  # the hand-off finds another one
        leg = self._producer()
        if leg is None or leg.server is not server:
            sender = self._prefill  # of a hand-off under way
            if sender is not None and sender.server is server and not sender.is_through:
                self._lose_leg(sender, f"{server.server_id} drains")
            return
        need_tokens = self.prompt.log.num_tokens + committed.sampling.max_new_tokens
        elsewhere = self._choose_prefill(need_tokens)
        if elsewhere is None and committed.answer.num_tokens:
            elsewhere = self._cluster.choose_decode(need_tokens=need_tokens)
        if elsewhere is not None:
            self._note_move(server, "another", MoveReason.DRAIN, "the time for answers is over")
            self._drop(leg)
            self.try_place(time.monotonic())

    def _note_move(self, server: Server, to: str, reason: MoveReason, why: str) -> None:
        self._cluster.metrics.moved(reason)
        log_event(
            logger,
            "stream_moved",
            stream_id=self.stream_id,
            from_server=server.server_id,
            to_server=to,
            reason=reason,
            why=why,
        )

    def _settle_move(self) -> None:
        """The new attempt stays."""
        old = self.moves.settle()
        if old is not None:
            now_s = time.monotonic()
            self._cluster.cancels.add(old.server, self.stream_id, old.attempt, now_s)

    def leave_target(self, server: Server) -> None:
        """A decode server that dies or drains will not be handed this stream."""
        target, leg = self._target, self._prefill
        if target is None or target.load.server is not server or self.state is not StreamState.OPEN:
            return
        self._release_target()
        if leg is not None:
            self._assign_decode(leg)

    def _assign_decode(self, leg: PrefillLeg) -> None:
        """Choose the decode server ahead of the commit, so that KV can go there."""
        if self._target is None:
            num_tokens = self.prompt.log.num_tokens
            decode = self._cluster.choose_decode(
                need_tokens=num_tokens + 1, avoid=self._retries.failed_on
            )
            if decode is None:
                return
            self._target = _Target(Assignment(decode))
            self._target.load.set(pending_tokens=0, held_tokens=num_tokens)
        elif leg.has_peer:
            return
        leg.push_to(_kv_peer(self._target.load.server))

    def _choose_prefill(self, need_tokens: int) -> Server | None:
        return self._cluster.choose_prefill(
            self._placing,
            self.prompt.log.ids,
            is_complete=self._committed is not None,
            need_tokens=need_tokens,
            avoid=self._retries.failed_on,
        )

    def _place_prefill(self, now_s: float) -> None:
        server = self._choose_prefill(self.prompt.log.num_tokens + 1)
        if server is not None:
            self._attempt += 1
            self._begin_prefill(server, now_s)

    def _begin_prefill(self, server: Server, now_s: float) -> None:
        leg = PrefillLeg(self._cluster.send, server, self.stream_id, self._attempt, self.prompt.log)
        leg.begin(self.options, now_s)
        self._prefill = leg
        self._note_sent(leg, 0)
        self._prefill_server = server.server_id
        self._heard_s = now_s
        if self._committed is not None:
            self._send_commit(leg, self._committed, now_s)
        else:
            self._count_uncommitted(leg)
            self._assign_decode(leg)

    def _count_uncommitted(self, leg: PrefillLeg) -> None:
        num_tokens = self.prompt.log.num_tokens
        self._cluster.room.put(self.stream_id, leg.server, num_tokens, self.options.share)

    def _send_commit(self, leg: PrefillLeg, committed: _Committed, now_s: float) -> None:
        num_tokens = self.prompt.log.num_tokens
        prefer = None if self._target is None else self._target.load.server.server_id
        self._release_target()
        self._handoff = "none"
        self._handoff_report = None
        decode = None
        if committed.sampling.max_new_tokens > 1:
            need_tokens = num_tokens + committed.sampling.max_new_tokens
            decode = self._cluster.choose_decode(
                need_tokens=need_tokens,
                avoid=self._retries.failed_on,
                prefer=prefer,
            )
        handoff = None
        if decode is not None:
            transfer_id = self._cluster.new_transfer_id()
            handoff = _handoff_target(decode, transfer_id)
            self._target = _Target(Assignment(decode), transfer_id)
            self._target.load.set(pending_tokens=0, held_tokens=num_tokens)
        commit = r.Commit(
            stream_id=self.stream_id,
            attempt=leg.attempt,
            seq=leg.next_seq,
            num_prompt_tokens=num_tokens,
            sampling=committed.sampling,
            handoff=handoff,
            keep_s=committed.keep_s,
        )
        leg.send_commit(commit, now_s)
        self.lifetime.record(LifetimeEvent.COMMIT_SENT)

    def _start_decode(self, committed: _Committed, leg: PrefillLeg, now_s: float) -> None:
        """The first token is out; the rest comes from the decode server."""
        self.lifetime.record(LifetimeEvent.HANDOFF_STARTED)
        target = self._target
        if target is None or target.load.server.is_dead:
            self._release_target()
            self._note_handoff("failed: the decode server is gone")
            self.try_place(now_s)
            return
        self._target = None
        transfer_id = None if target.transfer_failed else target.transfer_id
        self._begin_generate(committed, target.load, leg.attempt, transfer_id, now_s)

    def _place_generate(self, committed: _Committed, now_s: float) -> None:
        need_tokens = self.prompt.log.num_tokens + committed.sampling.max_new_tokens
        for role in (Role.DECODE, Role.PREFILL):
            server = (
                self._choose_prefill(need_tokens)
                if role is Role.PREFILL
                else self._cluster.choose_decode(
                    need_tokens=need_tokens, avoid=self._retries.failed_on
                )
            )
            if server is not None:
                self._attempt += 1
                load = Assignment(server)
                transfer_id = self._hand_off_again(load) if role is Role.DECODE else None
                self._begin_generate(committed, load, self._attempt, transfer_id, now_s)
                return

    def _hand_off_again(self, load: Assignment) -> TransferId | None:
        """Have the prompt's KV sent to this decode server as well, if it may still be anywhere."""
        leg = self._prefill
        if leg is None or leg.server.is_dead or not leg.hands_off:
            return None
        self._handoff = "none"
        self._handoff_report = None
        transfer_id = self._cluster.new_transfer_id()
        message = r.HandOff(
            stream_id=self.stream_id,
            attempt=leg.attempt,
            target=_handoff_target(load.server, transfer_id),
        )
        self._cluster.send(leg.server, message)
        return transfer_id

    def _begin_generate(
        self,
        committed: _Committed,
        load: Assignment,
        attempt: int,
        transfer_id: TransferId | None,
        now_s: float,
    ) -> None:
        message = r.Generate(
            stream_id=self.stream_id,
            attempt=attempt,
            prompt_ids=pack_ids(self.prompt.log.ids),
            output_ids=pack_ids(committed.answer.token_ids),
            sampling=committed.sampling,
            transfer_id=transfer_id,
            namespace=self.options.namespace,
            share=self.options.share,
        )
        held_tokens = self.prompt.log.num_tokens + committed.answer.num_tokens
        load.set(pending_tokens=0, held_tokens=held_tokens)
        self._generate = GenerateLeg(self._cluster.send, load, message)
        self._generate.begin(now_s)
        self._heard_s = now_s
        if load.server.role is Role.DECODE:
            self._decode_server = load.server.server_id
        self._decoded_by_prefill = load.server.role is Role.PREFILL

    def _producer(self) -> _Leg | None:
        """Who takes the prompt in, or is expected to send the next token."""
        if self._generate is not None:
            return self._generate
        if self._prefill is None or self._committed is None:
            return self._prefill
        is_through = self._prefill.hands_off and self._committed.answer.num_tokens > 0
        return None if is_through else self._prefill

    # What servers say.

    def on_message(self, server: Server, message: StreamMessage) -> None:
        """Take a message in; what belongs to no current attempt is dropped."""
        leg = self._leg_of(server, message.attempt)
        now_s = time.monotonic()
        if leg is None:
            if not self.moves.heard(server, message, now_s):
                self._drop_stale(server, message)
            return
        match message:
            case s.Output():
                self._on_output(leg, message, now_s)
            case s.Received(seq=seq):
                self._acknowledge(leg, seq, now_s)
            case s.Progress():
                self._on_progress(leg, message, now_s)
            case s.ResyncRequest(have_seq=have_seq):
                self._on_resync(leg, have_seq, now_s)
            case s.HandoffReport():
                self._on_handoff_report(message)
            case s.StreamFailed():
                self._on_failed(leg, message)
            case _:
                assert_never(message)
        if isinstance(leg, PrefillLeg) and leg.is_accepted:
            self._settle_move()
        self._due_s = None

    def _acknowledge(self, leg: _Leg, seq: int, now_s: float) -> None:
        leg.acknowledge(seq, now_s)
        if leg is self._prefill and not self.moves.is_under_way:
            # What the only server that takes the prompt in has, it will not ask for.
            self.prompt.log.forget(SeqNo(self._prefill.acknowledged_log_seq))

    def _leg_of(self, server: Server, attempt: int) -> _Leg | None:
        for leg in (self._generate, self._prefill):
            if leg is not None and leg.server is server and leg.attempt == attempt:
                return leg
        return None

    def _drop_stale(self, server: Server, message: StreamMessage) -> None:
        self._cluster.num_stale_messages += 1
        if isinstance(message, s.Received | s.Output | s.Progress):
            # It still works on what is over. An attempt that is newer there stays.
            now_s = time.monotonic()
            self._cluster.cancels.add(server, self.stream_id, message.attempt, now_s)

    def _on_progress(self, leg: _Leg, message: s.Progress, now_s: float) -> None:
        self._acknowledge(leg, message.seq, now_s)
        if isinstance(leg, PrefillLeg):
            leg.progress(message.num_computed_tokens, message.num_invalidated_tokens)
            # Less than a page is not computed ahead.
            reached = message.num_computed_tokens + leg.server.facts.page_size - 1
            self.segments.computed(leg.log_seq(message.seq), reached)
            self.events.put_acknowledged(self.acknowledged)

    def _on_resync(self, leg: _Leg, have_seq: int, now_s: float) -> None:
        log_event(
            logger,
            "resync",
            stream_id=self.stream_id,
            server_id=leg.server.server_id,
            have_seq=have_seq,
        )
        self._cluster.metrics.resyncs.inc()
        if isinstance(leg, GenerateLeg) or have_seq < 0:
            self._lose_leg(leg, f"server {leg.server.server_id} does not know the stream")
        elif not leg.resync(have_seq, now_s):
            self._restart(leg, now_s)

    def _restart(self, leg: PrefillLeg, now_s: float) -> None:
        """The log does not reach back far enough: the whole prompt, as a new attempt."""
        self._settle_move()
        self._drop(leg)
        self.try_place(now_s)

    def _on_handoff_report(self, report: s.HandoffReport) -> None:
        if self._target is not None and self._target.transfer_id == report.transfer_id:
            self._target.transfer_failed = not report.ok
        elif self._generate is None or self._generate.transfer_id != report.transfer_id:
            return
        if self._prefill is not None:
            self._prefill.is_through = True
            self._prefill.load.release()
        self._handoff_report = report if report.ok else None
        self._note_handoff("done" if report.ok else f"failed: {report.reason}")

    def _note_handoff(self, outcome: str) -> None:
        self._set_handoff(outcome)
        if outcome == "done":
            self.lifetime.record(LifetimeEvent.HANDOFF_DONE)
            return
        log_event(logger, "handoff_failed", stream_id=self.stream_id, outcome=outcome)
        if self._generate is not None:
            self._generate.transfer_failed()

    def _set_handoff(self, outcome: str) -> None:
        self._handoff = outcome
        metrics = self._cluster.metrics
        (metrics.handoffs_done if outcome == "done" else metrics.handoffs_failed).inc()

    def _on_failed(self, leg: _Leg, message: s.StreamFailed) -> None:
        try:
            code = ErrorCode(message.code)
        except ValueError:
            code = ErrorCode.UNKNOWN
        if code in RETRYABLE_CODES:
            self._lose_leg(leg, f"server {leg.server.server_id}: {message.message}")
            return
        is_early = self.machine.can_enter(StreamState.REJECTED)
        ending = StreamState.REJECTED if is_early else StreamState.FAILED
        self.end(ending, StreamError.from_code(code, message.message))

    # The answer.

    def _on_output(self, leg: _Leg, output: s.Output, now_s: float) -> None:
        committed = self._committed
        leg.acknowledge(leg.last_seq, now_s)
        if committed is None or leg is not self._producer():
            self._cluster.num_stale_messages += 1  # a repetition of what was handed off
            return
        self._heard_s = now_s
        if isinstance(leg, GenerateLeg):
            leg.num_cached_tokens = output.num_cached_tokens
        elif self._num_cached_tokens is None:
            self._num_cached_tokens = output.num_cached_tokens
        if output.first_index > committed.answer.num_tokens:
            self._ask_for_missing(leg, committed, now_s)
            return
        if output.kv_codec != "none":
            self._kv_codec = output.kv_codec
        finish = output.finish
        if finish is not None and finish.reason is FinishReason.ABORT:
            self._lose_leg(leg, f"server {leg.server.server_id} aborted: {finish.message}")
            return
        if finish is not None and self._is_only_first(leg, committed, finish):
            finish = None
        if output.account is not None:
            self._work.add(leg.server.server_id, leg.attempt, output.account, now_s)
        try:
            ended_by = self._take(committed, output, finish)
        except (StreamError, ProtocolError) as error:
            reason = f"server {leg.server.server_id} sent bad tokens: {error}"
            self.end(StreamState.FAILED, InternalError(reason))
            return
        if ended_by is not None:
            self._finish(committed, ended_by, leg if ended_by is finish else None)
            return
        if self.journal is not None:
            self.journal.flush()
        if isinstance(leg, PrefillLeg) and self._producer() is None:
            self._start_decode(committed, leg, now_s)

    def _is_only_first(self, leg: _Leg, committed: _Committed, finish: Finish) -> bool:
        """A prefill server that hands off has made the one token that it was to make."""
        return (
            finish.reason is FinishReason.LENGTH
            and isinstance(leg, PrefillLeg)
            and leg.hands_off
            and committed.sampling.max_new_tokens > 1
        )

    def _take(
        self, committed: _Committed, output: s.Output, finish: Finish | None
    ) -> Finish | None:
        """Give the client what it does not have yet of these tokens; returns how they end."""
        ids = unpack_ids(output.token_ids)
        answer = committed.answer
        if finish is not None and not ids and not answer.num_tokens:
            raise ProtocolError("an end without a token")
        max_new_tokens = committed.sampling.max_new_tokens
        for place in range(answer.num_tokens - output.first_index, len(ids)):
            ended_by = finish if place == len(ids) - 1 else None
            event = answer.push(
                ids[place],
                output.logprobs[place] if place < len(output.logprobs) else None,
                silent=ended_by is not None and ended_by.matched_token_id == ids[place],
            )
            if answer.matched_stop is not None:
                ended_by = Finish(reason=FinishReason.STOP)
            elif ended_by is None and answer.num_tokens >= max_new_tokens:
                ended_by = Finish(reason=FinishReason.LENGTH)
            if event.index == 0:
                self.machine.advance(StreamState.DECODING)
            self._record_token(event.index, is_last=ended_by is not None)
            (self.events.put_token if self.journal is None else self.journal.token)(event)
            if ended_by is not None:
                return ended_by
        return finish

    def _record_token(self, index: int, *, is_last: bool) -> None:
        """As `Lifetime.record_token`, which counts, whereas the index is known here."""
        at_s = time.monotonic()
        self._cluster.metrics.tokens_out.inc()
        if self.options.payer is not None:
            self.options.payer.used(1)
        if index < 2:
            first = LifetimeEvent.FIRST_TOKEN if index == 0 else LifetimeEvent.SECOND_TOKEN
            self.lifetime.record(first, at_s=at_s)
        elif not is_last:
            self.lifetime.record(LifetimeEvent.TOKEN, at_s=at_s)
        if is_last:
            self.lifetime.record(LifetimeEvent.LAST_TOKEN, at_s=at_s)

    def _ask_for_missing(self, leg: _Leg, committed: _Committed, now_s: float) -> None:
        if now_s - self._gap_asked_s < timing.GAP_REPEAT_S:
            return
        self._gap_asked_s = now_s
        message = r.ResendOutput(
            stream_id=self.stream_id,
            attempt=leg.attempt,
            from_index=committed.answer.num_tokens,
        )
        self._cluster.send(leg.server, message)

    def _finish(self, committed: _Committed, finish: Finish, through: _Leg | None) -> None:
        """The answer is complete; `through` is the leg whose server knows it."""
        answer = committed.answer
        if through is not None:
            through.is_through = True
        if self._generate is None:
            no_target = self._target is None
            self._decoded_by_prefill = no_target and committed.sampling.max_new_tokens > 1
        elif self._handoff == "none" and self._generate.transfer_id is not None:
            # A short answer overtakes the report, and tells as well whether the KV was there.
            if self._generate.found_prompt(self.prompt.log.num_tokens):
                self._set_handoff("done")
            else:
                self._set_handoff("failed: not reported before the end of the answer")
        report = self._handoff_report
        done = DoneEvent(
            finish_reason=finish.reason.value,
            text_tail=answer.flush(),
            matched_stop=answer.matched_stop or finish.matched_token_id,
            usage=Usage(
                num_prompt_tokens=self.prompt.log.num_tokens,
                num_output_tokens=answer.num_tokens,
                num_cached_tokens=self._num_cached_tokens or 0,
                num_invalidated_tokens=self.acknowledged().num_invalidated_tokens,
                num_computed_tokens=self._work.num_computed_tokens,
                num_recomputed_tokens=self._work.num_recomputed_tokens,
                num_reused_tokens=self._work.num_reused_tokens,
            ),
            prefill_server=self._prefill_server,
            decode_server="" if self._decoded_by_prefill else self._decode_server,
            decoded_by_prefill=self._decoded_by_prefill,
            handoff=self._handoff,
            num_attempts=self._attempt - self._num_placed_anew,
            lifetime=self.lifetime,
            handoff_bytes=None if report is None else report.num_bytes,
            handoff_s=None if report is None else report.seconds,
            kv_codec=self._kv_codec,
        )
        self._end(StreamState.DONE, done)

    # Failure and time.

    def on_streams_lost(self, server: Server, reason: str) -> None:
        """Nothing that was on this server is there any more."""
        for leg in (self._generate, self._prefill):
            if leg is not None and leg.server is server:
                self._lose_leg(leg, reason)
        self.moves.lost(server)
        self.leave_target(server)

    def _lose_leg(self, leg: _Leg, reason: str) -> None:
        if leg is self._producer():
            self._recover(leg, reason)
        elif leg is self._prefill:
            handoff_open = self._handoff == "none" and self._generate is not None
            self._drop(leg)
            if handoff_open:
                self._note_handoff(f"failed: {reason}")

    def _recover(self, leg: _Leg, reason: str) -> None:
        """What was to come next will not come: try again, elsewhere if possible."""
        now_s = time.monotonic()
        may_retry = self._retries.failed(leg.began_s, leg.server, now_s)
        self._cluster.metrics.attempts_failed.inc()
        self._cluster.metrics.retries.inc(may_retry)
        log_event(
            logger,
            "attempt_failed",
            level=logging.WARNING,
            stream_id=self.stream_id,
            attempt=leg.attempt,
            num_failures=self._retries.num_failures,
            reason=reason,
        )
        self._drop(leg)
        old = self.moves.go_back()
        if old is not None:
            self._prefill = old
            self._prefill_server = old.server.server_id
            self._count_uncommitted(old)
        elif may_retry:
            self.try_place(now_s)
        else:
            num_failures = self._retries.num_failures
            message = f"{num_failures} attempts failed in a row; the last one: {reason}"
            self.end(StreamState.FAILED, UnavailableError(message))

    def _drop(self, leg: _Leg) -> None:
        leg.load.release()
        now_s = time.monotonic()
        self._cluster.cancels.add(leg.server, self.stream_id, leg.attempt, now_s)
        if isinstance(leg, PrefillLeg):
            self._invalidated_before += leg.num_invalidated_tokens
            self._prefill = None
            self._cluster.room.leave(self.stream_id)
        else:
            self._generate = None

    def _release_target(self) -> None:
        if self._target is not None:
            self._target.load.release()
            self._target = None

    def tick(self, now_s: float) -> None:
        """Deadlines and repetitions. Called by the manager when `due_s` has come."""
        if self._cluster.room.is_waiting(self.stream_id):
            self._touched_s = now_s  # its client is not idle, we keep it waiting
        if now_s >= self._deadline_s:
            message = f"the stream's deadline of {self.options.deadline_s} s is over"
            self.end(StreamState.DEADLINE, DeadlineExceededError(message))
        elif self.state is StreamState.OPEN and now_s >= self._touched_s + self._idle_timeout_s:
            message = f"not committed and not touched for {self._idle_timeout_s} s"
            self.end(StreamState.ABORTED, StreamError(message, code=ErrorCode.ABORTED))
        elif now_s >= self._resume_by_s:
            message = f"its client did not come back within {timing.RESUME_WAIT_S} s of a restart"
            self.end(StreamState.ABORTED, StreamError(message, code=ErrorCode.ABORTED))
        elif self._retries.gave_up(now_s):
            message = f"no server to go on with for {timing.REPLACE_WAIT_S} s"
            self.end(StreamState.FAILED, UnavailableError(message))
        else:
            self.try_place(now_s)
            if self._prefill is not None and not self._prefill.tick(now_s):
                self._restart(self._prefill, now_s)
            if self._generate is not None:
                self._generate.tick(now_s)
            self._probe(now_s)
            self._due_s = None

    def _probe(self, now_s: float) -> None:
        """The last message of an answer has no follower that would show its loss."""
        producer = self._producer()
        if self._committed is None or now_s < self._heard_s + timing.PROBE_AFTER_S:
            return
        self._heard_s = now_s
        if producer is not None:
            self._ask_for_missing(producer, self._committed, now_s)

    def is_due(self, now_s: float) -> bool:
        """Whether `tick` has something to do; the manager looks at nothing else."""
        if self._due_s is None:
            self._due_s = self._find_due_s()
        return now_s >= self._due_s

    def _find_due_s(self) -> float:
        if self.machine.is_terminal:
            return NEVER_S
        if self.state is StreamState.OPEN:
            due_s = self._touched_s + self._idle_timeout_s
        else:
            due_s = self._heard_s + timing.PROBE_AFTER_S
        due_s = min(due_s, self._deadline_s, self._resume_by_s, self._retries.due_s)
        for leg in (self._prefill, self._generate):
            if leg is not None:
                due_s = min(due_s, leg.due_s)
        return due_s

    # The end.

    def end(self, state: StreamState, error: StreamError) -> None:
        """End badly, or do nothing when the stream has ended already."""
        self._end(state, error)

    def _end(self, state: StreamState, end: DoneEvent | StreamError) -> None:
        if not self.machine.finish(state):
            return
        self.lifetime.record(LifetimeEvent(state.value))
        self._last_acknowledged = self.acknowledged()
        self._leave_servers()
        self._cluster.room.forget(self.stream_id)
        say = partial(
            log_event,
            logger,
            "stream_ended",
            stream_id=self.stream_id,
            request_id=self.options.request_id,
            outcome=state,
            reason=end.finish_reason if isinstance(end, DoneEvent) else str(end),
            num_prompt_tokens=self.prompt.log.num_tokens,
            num_attempts=self._attempt - self._num_placed_anew,
        )
        ended = EndedStream(
            stream_id=self.stream_id,
            request_id=self.options.request_id,
            mode=self.options.mode.value,
            outcome=state.value,
            error="" if isinstance(end, DoneEvent) else str(end),
            entries=self.lifetime.entries,
            prefill_server=self._prefill_server,
            decode_server="" if self._decoded_by_prefill else self._decode_server,
            handoff=self._handoff,
            num_attempts=self._attempt - self._num_placed_anew,
            num_prompt_tokens=self.prompt.log.num_tokens,
            num_output_tokens=self.num_output_tokens,
            trace_parent=self._trace_parent,
        )
        self._error = ended.error
        # What is kept for late calls must be small.
        self._num_output_tokens = self.num_output_tokens
        self.prompt = Prompt(self._tokenizer, None)
        self._committed = None
        self._due_s = NEVER_S
        if self.journal is None:
            say()
            self.events.close(end)
        else:
            self.journal.ended(state.value, end, say)
        self._on_end(self, ended)

    def _leave_servers(self) -> None:
        self._settle_move()
        legs = [leg for leg in (self._prefill, self._generate) if leg is not None]
        for server in {leg.server for leg in legs}:
            here = [leg for leg in legs if leg.server is server]
            attempt = max(leg.attempt for leg in here)
            if all(leg.is_through for leg in here):
                self._cluster.cancels.forget(server, self.stream_id, attempt, time.monotonic())
            else:
                self._cluster.cancels.add(server, self.stream_id, attempt, time.monotonic())
        for leg in legs:
            leg.load.release()
        self._release_target()
        self._prefill = self._generate = None


def _kv_peer(server: Server) -> KvPeer:
    facts = server.facts
    return KvPeer(
        server_id=facts.server_id, host=facts.kv_host, control_ports=facts.kv_control_ports
    )


def _handoff_target(server: Server, transfer_id: TransferId) -> HandoffTarget:
    peer = _kv_peer(server)
    return HandoffTarget(
        transfer_id=transfer_id,
        server_id=peer.server_id,
        host=peer.host,
        control_ports=peer.control_ports,
    )
