"""The logic of a server, between the router's messages and the engine. Runs in the scheduler's
thread.

One turn, ``step``:

1. ``handle`` the messages that arrived (the same ones, in the same order, on every tensor-parallel
   rank);
2. ``collect`` what the engine finished: segments are now computed, answers have new tokens;
3. ``schedule``: decide over all streams (``scheduling``), then start the chosen requests;
4. report progress.

Life of a stream: ``OpenStream`` → ``Splice``* → ``Commit`` → answer, or ``Generate`` → answer. What
is missing of the prompt is computed in steps of bounded size, so that no stream waits for more than
one step of another's context; the request that samples is started when the rest fits one step.

The core holds no KV: it only believes that tokens are in the radix tree and looks again whenever it
matters (``stream_kv``). KV that was taken comes back from host memory (``restoring``), or is simply
computed again.
"""

from __future__ import annotations

import logging
import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, assert_never

import msgspec

from streamfill.engine.interface import Engine, RequestUpdate
from streamfill.errors import ConfigError, ErrorCode, ProtocolError
from streamfill.kv_transfer.codecs import NO_CODEC
from streamfill.links.server_link import Inbound, RouterLost
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import pack_ids, unpack_ids
from streamfill.messages.common import Finish, FinishReason, Sampling, ServerCounters, StreamMode
from streamfill.messages.control import StreamTelemetry
from streamfill.observability.logging import log_event
from streamfill.preemption.standing import StandingPlan
from streamfill.scheduling.plan import RunReason, StepPlan, StreamRun
from streamfill.serving.account import WorkAccount
from streamfill.serving.deciding import Decider, PolicySetting, PreemptionSetting
from streamfill.serving.records import Answer, InFlight, Phase, StreamRecord, Streams
from streamfill.serving.residency import ResidencyReports
from streamfill.serving.restoring import Restoring
from streamfill.serving.stream_kv import StreamKv

logger = logging.getLogger(__name__)

CLOSED_KEPT = 4096
"""Ended streams whose opening is refused, should it come late: some seconds' worth, and frames are
under way for less."""
DONE_RETENTION_S = 120.0
"""The router forgets a finished stream within seconds; this bounds the memory if it cannot."""


@dataclass(frozen=True)
class TransportCounters:
    """What the KV transport holds right now."""

    num_transfers: int = 0
    staging_bytes: int = 0


class StepCounts(NamedTuple):
    """What the loop did. All since the start."""

    num_turns: int = 0
    num_steps: int = 0
    """Turns behind which the engine had something to compute."""
    num_runs: Mapping[RunReason, int] = MappingProxyType({})
    """Requests given to the engine."""


class ServingCore:
    """Common logic of both roles; ``PrefillCore`` and ``DecodeCore`` add the two ends of the
    hand-off."""

    def __init__(
        self,
        engine: Engine,
        send: Callable[[s.ServerToRouter], None],
        policy: PolicySetting,
        *,
        step_tokens: int,
        clock: Callable[[], float],
        preemption: PreemptionSetting | None = None,
    ) -> None:
        """
        Args:
            engine: requests, radix tree and pool of this rank.
            send: takes messages for the router; never blocks.
            policy: decides what is computed next, until it is changed.
            preemption: how KV may be taken from streams, until it is changed.
            step_tokens: prefill tokens of one step.
            clock: seconds, monotonic, the same on all ranks of a group.
        """
        self.engine = engine
        self._send = send
        self._clock = clock
        self._streams = Streams({}, {}, {})
        self._records, self._kept, self._by_key = self._streams
        self._closed: dict[int, int] = {}
        """Newest attempt of streams that the router ended, the last ``CLOSED_KEPT``."""
        self._num_requests = 0
        self._num_expired = 0
        self._num_turns = 0
        self._num_steps = 0
        self._num_runs: Counter[RunReason] = Counter()
        self.residency = ResidencyReports(engine, send, clock)
        self.plan = StandingPlan()
        self.decider = Decider(
            engine,
            self.plan,
            policy,
            preemption or PreemptionSetting(),
            step_tokens=step_tokens,
        )
        self.kv = StreamKv(engine, self.decider, self._streams, clock)
        self._restoring = Restoring(engine, self.decider, self.kv, self._streams)
        self.num_computed_tokens = 0
        self.num_interruptions = 0
        self.num_handoff_bytes = 0
        """Sent to decode servers; stays 0 on these."""
        self.num_early_bytes = 0
        self.draining = False
        self.kv_codec = NO_CODEC
        """Lossy codec that KV in the tree may have come through."""
        self.step_ended_s: float | None = None
        """When the engine's newest step ended, by ``time.monotonic``. None: nobody says."""

    @property
    def num_streams(self) -> int:
        """Streams that are not over."""
        return sum(record.phase is not Phase.DONE for record in self._records.values())

    @property
    def is_through(self) -> bool:
        """Nothing would be lost with this server now, besides what it has cached."""
        return self.num_streams == 0

    def step(self, messages: Sequence[Inbound]) -> None:
        """One turn, before the engine forms its next batch."""
        for message in messages:
            self.handle(message)
        self.collect()
        self.decider.note_step_end(self._clock(), self._by_key)
        self.note_losses()
        self.schedule()
        self._expire()
        self.residency.publish(is_idle=not self._by_key)
        self._num_turns += 1
        self._num_steps += bool(self._by_key)

    def handle(self, message: Inbound) -> None:
        """Apply one message. A bad one fails its stream, never the server."""
        try:
            self._dispatch(message)
        except (ProtocolError, ValueError) as error:
            if not isinstance(message, r.Splice | r.Commit | r.Generate):
                raise
            record = self._records.get(message.stream_id)
            if record is not None and record.attempt <= message.attempt:
                self._drop(record)
            self._report_failed(message.stream_id, message.attempt, ErrorCode.INTERNAL, str(error))

    @property
    def is_busy(self) -> bool:
        """Whether anything is with the engine."""
        return bool(self._by_key)

    def collect(self) -> None:
        """Take over what the engine finished."""
        for update in self.engine.poll():
            record = self._by_key.get(update.key)
            if record is None:
                continue  # cancelled; its request only had to run out
            if update.finish is not None:
                del self._by_key[update.key]
            if record.phase is Phase.ANSWERING:
                self._on_answer(record, update)
            else:
                self._on_segment(record, update)

    def note_losses(self) -> frozenset[int]:
        """Look for the KV of streams from which some was taken; returns those streams."""
        losers = self.engine.take_losers()
        for stream_id in losers:
            record = self._streams.find(stream_id)
            if record is None or record.phase is Phase.ANSWERING:
                continue  # its account is closed; what it lacks the engine computes
            if record.phase is not Phase.DONE or record.keep_s:
                self.kv.find(record)
        return losers

    def schedule(self) -> None:
        """Decide what to compute (phase 1), then acquire memory for it and start it (phase 2).

        A run whose KV is gone, or does not come back from host memory, makes the decision void, and
        it is made anew. Memory is taken by the engine when it forms its batch, in the order that
        the plan says; a run that finds none stays in the engine's queue, and the next decision
        knows.
        """
        self._restoring.restore_for_waiting()
        now_s = self._clock()
        plan = self._decide(now_s)
        num_admitted = 0
        for run in plan.runs:
            record = self._records[run.stream_id]
            if record.answer is not None and not self._admits(record):
                break  # those behind would take the memory that it waits for
            num_admitted += 1
            self._start(record, run, plan.num_tokens)
        if not self._by_key:
            self._restoring.use_idle_time(now_s)
        self.decider.note_step_start(now_s, plan._replace(runs=plan.runs[:num_admitted]))
        self.engine.allow_interrupts(plan.interruptible and len(self._by_key) == num_admitted > 0)

    def interrupt(self, messages: Sequence[Inbound], *, again: bool = False) -> StepPlan | None:
        """Between two layers of a step that may be interrupted: apply messages, and start the
        commits that need not wait for its end.

        Args:
            messages: see ``handle``; of streams only.
            again: in the same break, so there may be commits that came before the messages.

        Returns:
            What the engine has to compute now, and nothing else; ``end_interruption`` follows.
            None: there is nothing.
        """
        for message in messages:
            self.handle(message)
        if not again and not any(isinstance(message, r.Commit) for message in messages):
            return None
        plan = self._decide(self._clock(), is_interruption=True)
        for run in plan.runs:
            self._start(self._records[run.stream_id], run, plan.num_tokens)
        return plan if plan.runs else None

    def end_interruption(self, plan: StepPlan, seconds: float) -> None:
        """The engine has computed what ``interrupt`` started."""
        self.num_interruptions += 1
        started = {run.stream_id for run in plan.runs}
        interrupted = [
            record for record in self._by_key.values() if record.stream_id not in started
        ]
        self.decider.note_interruption(plan, seconds, interrupted)
        self.collect()

    def telemetry(self) -> tuple[StreamTelemetry, ...]:
        """All streams that are not over, for the preemption controller."""
        now_s, page_size = self._clock(), self.engine.facts.page_size
        return tuple(
            record.telemetry(now_s, page_size)
            for record in (*self._records.values(), *self._kept.values())
            if record.phase is not Phase.DONE or record.keep_until_s() is not None
        )

    def counters(self, num_malformed_frames: int) -> ServerCounters:
        """What this server holds right now."""
        memory, load, transport = (
            self.engine.memory(),
            self.engine.load(),
            self.transport_counters(),
        )
        room, kv = self.engine.host_room(), self.kv
        return ServerCounters(
            num_streams=len(self._records),
            num_waiting=load.num_waiting,
            num_running=load.num_running,
            num_pending_tokens=sum(
                record.num_missing
                for record in self._records.values()
                if record.phase is not Phase.DONE
            ),
            num_used_tokens=memory.used_tokens,
            num_cached_tokens=memory.evictable_tokens,
            num_free_tokens=memory.free_tokens,
            num_total_tokens=memory.total_tokens,
            num_free_slots=load.num_free_slots,
            num_total_slots=load.num_total_slots,
            num_transfers=transport.num_transfers,
            staging_bytes=transport.staging_bytes,
            num_malformed_frames=num_malformed_frames,
            num_evicted_tokens=self.engine.num_evicted_tokens,
            num_computed_tokens=self.num_computed_tokens,
            num_recomputed_tokens=kv.num_recomputed_tokens,
            num_preemptions=kv.num_preemptions,
            num_interruptions=self.num_interruptions,
            num_handoff_bytes=self.num_handoff_bytes,
            num_early_bytes=self.num_early_bytes,
            num_swap_outs=kv.num_swap_outs,
            num_swap_ins=kv.num_swap_ins,
            swap_out_bytes=kv.swap_out_bytes,
            swap_in_bytes=kv.swap_in_bytes,
            num_host_tokens=room.num_tokens - room.num_free_tokens,
            plan_version=self.plan.version,
        )

    def step_counts(self) -> StepCounts:
        """What the loop did since the start."""
        return StepCounts(self._num_turns, self._num_steps, dict(self._num_runs))

    def transport_counters(self) -> TransportCounters:
        """Overridden by the roles."""
        return TransportCounters()

    # Messages

    def _dispatch(self, message: Inbound) -> None:
        match message:
            case r.OpenStream():
                self._open(message)
            case r.Splice():
                self._splice(message)
            case r.Commit():
                self._commit(message)
            case r.Generate():
                self._generate(message)
            case r.PushTo() | r.HandOff() | r.HandoffFailed():
                self._about_handoff(message)
            case r.Cancel():
                self._cancel(message)
            case r.ResendOutput():
                self._resend(message)
            case r.Forget():
                record = self._streams.find(message.stream_id)
                if record is not None and record.attempt <= message.attempt:
                    self._forget(record)
                self._close(message)
            case r.FlushCache() | r.SetPolicy() | r.DescribeStreams():
                self._answer_question(message)
            case RouterLost():
                log_event(
                    logger, "router_lost", level=logging.WARNING, num_streams=len(self._records)
                )
                for record in list(self._records.values()):
                    self._drop(record)
                self._closed.clear()  # the next router counts attempts anew
                self._let_kept_go()
                self.residency.stop()
            case r.WatchResidency(block_tokens=block_tokens):
                self.residency.watch(block_tokens)
            case r.Registered() | r.RegistrationRefused() | r.RouterHeartbeat() | r.Malformed():
                pass  # the link's business
            case _:
                assert_never(message)

    def _open(self, message: r.OpenStream) -> None:
        if self._is_closed(message):
            return
        old = self._records.get(message.stream_id)
        if old is not None:
            if old.attempt >= message.attempt:
                return
            self._drop(old)
        self._drop_kept(message.stream_id)
        self._records[message.stream_id] = StreamRecord(
            stream_id=message.stream_id,
            attempt=message.attempt,
            mode=message.mode,
            priority=message.priority,
            ttft_slo_s=message.ttft_slo_s,
            namespace=message.namespace,
            share=message.share,
            opened_s=self._clock(),
            account=WorkAccount(self.engine.facts.page_size),
        )

    def _splice(self, message: r.Splice) -> None:
        record = self._find(message.stream_id, message.attempt)
        if record is None or record.phase is not Phase.OPEN:
            return
        keep_tokens, num_saved = message.keep_tokens, record.num_saved
        is_cut = keep_tokens < max(record.num_computed, num_saved)
        old_ids = record.ids[:] if is_cut else None
        record.splice(keep_tokens, self._unpack(message.token_ids), self._clock())
        record.seq = message.seq
        record.commit_follows = message.commit_follows
        record.hinted_next_s = None
        if message.next_in_s is not None:
            record.hinted_next_s = self._clock() + message.next_in_s
        if old_ids is not None:
            self.engine.untag(record.stream_id, old_ids, namespace=record.namespace)
            if keep_tokens < num_saved:
                self.kv.release_tail(record, old_ids, keep_tokens)
        self.kv.look_again(record)
        self._report_progress(record)

    def _commit(self, message: r.Commit) -> None:
        record = self._find(message.stream_id, message.attempt)
        if record is None or record.phase is not Phase.OPEN:
            return
        if message.num_prompt_tokens != len(record.ids) or not record.ids:
            raise ProtocolError(
                f"commit of {message.num_prompt_tokens} tokens, but {len(record.ids)} are here"
            )
        record.seq = message.seq
        record.keep_s = message.keep_s
        record.answer = Answer(message.sampling, num_brought=0, handoff=message.handoff)
        record.committed_s = self._clock()
        record.advance(Phase.COMMITTED)
        self.decider.note_commit(record)
        self.kv.look_again(record)

    def _answer_question(self, message: r.FlushCache | r.SetPolicy | r.DescribeStreams) -> None:
        """What concerns the server as a whole."""
        match message:
            case r.FlushCache(request_id=request_id):
                ok = self.num_streams == 0 and self.engine.flush()
                if ok:
                    self._let_kept_go()
                    self.decider.forget_experience()
                    self.kv_codec = NO_CODEC
                self._send(s.CacheFlushed(request_id=request_id, ok=ok))
            case r.SetPolicy():
                self._set_policy(message)
            case r.DescribeStreams(request_id=request_id):
                self._send(
                    s.StreamsDescribed(
                        request_id=request_id,
                        policy=self.decider.policy.spec,
                        streams=self.decider.describe(self._records, self._clock()),
                    )
                )
            case _:
                assert_never(message)

    def _set_policy(self, message: r.SetPolicy) -> None:
        """Decide by another policy from the next step on."""
        reason = ""
        try:
            self.decider.set_policy(message.policy, message.options)
        except ConfigError as error:
            reason = str(error)
        log_event(
            logger,
            "policy_set",
            asked=message.policy,
            options=dict(message.options),
            policy=self.decider.policy.spec,
            reason=reason,
        )
        self._send(
            s.PolicySet(
                request_id=message.request_id,
                ok=not reason,
                policy=self.decider.policy.spec,
                reason=reason,
            )
        )

    def _generate(self, message: r.Generate) -> None:
        if self._is_closed(message):
            return
        old = self._records.get(message.stream_id)
        prompt_ids, output_ids = self._unpack(message.prompt_ids), self._unpack(message.output_ids)
        if old is not None:
            if old.attempt > message.attempt:
                return
            if (
                old.attempt == message.attempt
                and old.answer is not None
                and old.answer.handoff is None
            ):
                self._report_progress(old)  # sent again: a sign of life is all it wants
                return
            self._drop(old)
        if not prompt_ids:
            raise ProtocolError("an answer to an empty prompt was asked for")
        now_s = self._clock()
        record = StreamRecord(
            stream_id=message.stream_id,
            attempt=message.attempt,
            mode=StreamMode.APPEND,
            priority=0,
            namespace=message.namespace,
            share=message.share,
            opened_s=now_s,
            account=WorkAccount(self.engine.facts.page_size),
        )
        record.splice(0, prompt_ids + output_ids, now_s)
        record.answer = Answer(
            message.sampling, num_brought=len(output_ids), transfer_id=message.transfer_id
        )
        self._drop_kept(message.stream_id)
        self._records[message.stream_id] = record
        self._place_answer(record)
        self._report_progress(record)

    def _place_answer(self, record: StreamRecord) -> None:
        """An answer was asked for: compute what is missing. Decode servers wait for its KV
        first."""
        record.committed_s = self._clock()
        record.advance(Phase.COMMITTED)
        self.kv.look_again(record)

    def _about_handoff(self, message: r.PushTo | r.HandOff | r.HandoffFailed) -> None:
        """Prefill servers are told where KV goes, decode servers that none comes. Overridden by the
        roles; what is meant for the other one changes nothing."""
        del message

    def _cancel(self, message: r.Cancel) -> None:
        record = self._streams.find(message.stream_id)
        if record is not None and record.attempt <= message.attempt:
            self._drop(record)
        self._close(message)

    def _close(self, message: r.Cancel | r.Forget) -> None:
        """The router ended all attempts up to this one, and hears that this server knows."""
        stream_id = message.stream_id
        self._closed[stream_id] = max(message.attempt, self._closed.pop(stream_id, 0))
        if len(self._closed) > CLOSED_KEPT:
            del self._closed[next(iter(self._closed))]
        self._send(s.Closed(stream_id=stream_id, attempt=message.attempt))

    def _is_closed(self, message: r.OpenStream | r.Generate) -> bool:
        """Whether it was overtaken by its end: nobody would end what it began again."""
        return self._closed.get(message.stream_id, -1) >= message.attempt

    def _resend(self, message: r.ResendOutput) -> None:
        record = self._find(message.stream_id, message.attempt)
        if record is None:
            self._send(
                s.ResyncRequest(stream_id=message.stream_id, attempt=message.attempt, have_seq=-1)
            )
        elif record.answer is not None:
            brought = record.answer.num_brought
            newest = brought + len(record.answer.token_ids)
            self._send_output(record, min(max(message.from_index, brought), newest))

    def _unpack(self, packed: bytes) -> array[int]:
        """Token ids, type code ``q``.

        Raises:
            ProtocolError: an id is not in the vocabulary; computing it would take the server down.
        """
        token_ids = array("q", unpack_ids(packed))
        if token_ids:
            for token_id in (min(token_ids), max(token_ids)):
                if not 0 <= token_id < self.engine.facts.vocab_size:
                    raise ProtocolError(f"token id {token_id} is not in the vocabulary")
        return token_ids

    def _find(self, stream_id: int, attempt: int) -> StreamRecord | None:
        record = self._records.get(stream_id)
        return record if record is not None and record.attempt == attempt else None

    # What the engine did

    def _on_segment(self, record: StreamRecord, update: RequestUpdate) -> None:
        in_flight = record.in_flight
        if update.finish is None or in_flight is None:
            return
        record.in_flight = None
        self.decider.touch(record)
        if update.finish.reason is FinishReason.ABORT:
            self._fail(
                record, ErrorCode.INTERNAL, f"the engine refused a segment: {update.finish.message}"
            )
            return
        now_s = self._clock()
        record.last_computed_s = now_s
        self.num_computed_tokens += in_flight.up_to - update.num_cached_tokens
        self.kv.ran(record, in_flight, update.num_cached_tokens, self._step_end_s())
        self.kv.computed(record, min(in_flight.up_to, in_flight.keep_tokens))
        self._report_progress(record)

    def _on_answer(self, record: StreamRecord, update: RequestUpdate) -> None:
        answer = record.answer
        if answer is None:
            raise RuntimeError(f"stream {record.stream_id:x} answers without an answer")
        first_index = answer.num_brought + len(answer.token_ids)
        if not answer.token_ids:
            # Its own chunks, computed since the commit, do not count.
            answer.num_cached_tokens = min(answer.num_cached_tokens, update.num_cached_tokens)
            self.num_computed_tokens += len(record.ids) - update.num_cached_tokens
            if record.in_flight is not None:
                self.kv.ran(record, record.in_flight, update.num_cached_tokens, self._step_end_s())
            if not answer.num_brought and answer.transfer_id is None:
                record.account.answered(len(record.ids))
        answer.token_ids.extend(update.token_ids)
        self.decider.note_output(record, len(update.token_ids))
        answer.logprobs.extend(update.logprobs)
        if update.finish is not None:
            record.in_flight = None
            if update.finish.reason is FinishReason.ABORT:
                self._fail(
                    record, ErrorCode.INTERNAL, f"the engine gave up: {update.finish.message}"
                )
                return
            answer.finish = self._real_finish(answer, update.finish)
        if record.in_flight is not None:
            record.in_flight.is_sampling = True
        self._send_output(record, first_index)
        if update.finish is not None:
            self._on_answered(record, answer)
            self._done(record)

    def _done(self, record: StreamRecord) -> None:
        """This server has done its part. What the stream computed since its commit is its own like
        the rest, if it is expected back."""
        self.decider.forget(record)
        record.advance(Phase.DONE)
        record.done_s = self._clock()
        if record.keep_s:
            self.kv.computed(record, record.num_prompt)
        else:
            self.kv.release_host(record)

    def _step_end_s(self) -> float:
        """When the engine's newest step ended; now, where nobody says."""
        return self._clock() if self.step_ended_s is None else self.step_ended_s

    def _on_answered(self, record: StreamRecord, answer: Answer) -> None:
        """The engine has sampled all that this server samples."""

    def _admits(self, record: StreamRecord) -> bool:
        """Whether an answer, or what is missing of its prompt, may start beside those that run. One
        that may not is asked for again in the next turn."""
        del record
        return True

    def _real_finish(self, answer: Answer, finish: Finish) -> Finish | None:
        """Why the whole answer ended, or None where only this server's part of it did."""
        if answer.handoff is None:
            return finish
        token_id = answer.token_ids[-1]
        stops = self.engine.facts.eos_token_ids.union(answer.sampling.stop_token_ids)
        if answer.sampling.max_new_tokens <= 1:
            return Finish(reason=FinishReason.LENGTH)
        if token_id in stops and not answer.sampling.ignore_eos:
            return Finish(reason=FinishReason.STOP, matched_token_id=token_id)
        return None

    def _send_output(self, record: StreamRecord, first_index: int) -> None:
        answer = record.answer
        if answer is None:
            return
        start = first_index - answer.num_brought
        self._send(
            s.Output(
                stream_id=record.stream_id,
                attempt=record.attempt,
                first_index=first_index,
                token_ids=pack_ids(answer.token_ids[start:]),
                logprobs=tuple(answer.logprobs[start:]),
                finish=answer.finish,
                num_cached_tokens=answer.num_cached_tokens,
                kv_codec=self.kv_codec,
                account=(
                    record.account.message(
                        self._clock() if self.step_ended_s is None else time.monotonic()
                    )
                    if start == 0 and answer.token_ids and not record.account.is_empty
                    else None
                ),
            )
        )

    def _report_progress(self, record: StreamRecord) -> None:
        self._send(
            s.Progress(
                stream_id=record.stream_id,
                attempt=record.attempt,
                seq=record.seq,
                num_known_tokens=len(record.ids),
                num_computed_tokens=record.num_computed,
                num_invalidated_tokens=record.num_invalidated,
            )
        )

    # Deciding and carrying out

    def _decide(self, now_s: float, *, is_interruption: bool = False) -> StepPlan:
        """A plan whose runs can be started: their KV is there. Of an interruption those of
        committed streams that memory suffices for."""
        while True:
            plan = self.decider.decide(
                self._records,
                self._by_key,
                now_s,
                kept=self._kept,
                is_interruption=is_interruption,
            )
            if is_interruption:
                plan = plan._replace(
                    runs=tuple(
                        run
                        for run in plan.runs
                        if run.reason in (RunReason.COMMIT, RunReason.COMMIT_CHUNK)
                    )
                )
            if not self._is_sound(plan):
                continue
            self.decider.apply_victims(plan)
            plan_with_kv = self._restoring.restore(plan)
            if plan_with_kv is not None:
                return plan_with_kv

    def _is_sound(self, plan: StepPlan) -> bool:
        """Whether the KV that the plan relies on is there. What is gone is noted, so that the next
        plan knows; nothing is evicted meanwhile, so this is False at most once per stream."""
        sound = True
        for run in plan.runs:
            record = self._records[run.stream_id]
            if self.kv.find(record):
                sound = False
        return sound

    def _start(self, record: StreamRecord, run: StreamRun, num_step_tokens: int) -> None:
        self._num_requests += 1
        self._num_runs[run.reason] += 1
        # SGLang aborts by prefix of the id; the closing sign keeps .1 from being a prefix of .10.
        key = f"{record.stream_id:x}.{record.attempt}.{self._num_requests};"
        self._by_key[key] = record
        record.in_flight = InFlight(
            key=key,
            up_to=run.up_to,
            num_new_tokens=run.up_to - record.num_computed,
            keep_tokens=run.up_to,
            num_in_tree=record.num_computed,
            began_s=self._clock(),
            reason=run.reason,
            num_step_tokens=num_step_tokens,
        )
        self.decider.touch(record)
        self.decider.note_start(record, run)
        answer = record.answer
        if not run.is_commit or answer is None:
            ids = record.ids[: run.up_to]
            self.engine.start_segment(key, record.stream_id, ids, namespace=record.namespace)
            return
        record.advance(Phase.ANSWERING)
        num_prompt = len(record.ids) - answer.num_brought
        self.engine.start_answer(
            key,
            record.stream_id,
            record.ids[:num_prompt],
            record.ids[num_prompt:],
            self._local_sampling(answer),
            namespace=record.namespace,
        )

    def _local_sampling(self, answer: Answer) -> Sampling:
        if answer.handoff is None:
            return answer.sampling
        return msgspec.structs.replace(
            answer.sampling, max_new_tokens=1, min_new_tokens=min(1, answer.sampling.min_new_tokens)
        )

    # Endings

    def _fail(self, record: StreamRecord, code: ErrorCode, message: str) -> None:
        self._drop(record)
        self._report_failed(record.stream_id, record.attempt, code, message)

    def _report_failed(self, stream_id: int, attempt: int, code: ErrorCode, message: str) -> None:
        log_event(
            logger,
            "stream_failed",
            level=logging.ERROR,
            stream_id=stream_id,
            attempt=attempt,
            code=code,
            message=message,
        )
        self._send(
            s.StreamFailed(stream_id=stream_id, attempt=attempt, code=code.value, message=message)
        )

    def _drop(self, record: StreamRecord) -> None:
        """Forget a stream and stop its work. Its KV stays in the tree, as ordinary evictable
        cache."""
        self._records.pop(record.stream_id, None)
        self._kept.pop(record.stream_id, None)
        # Or the tags of all streams that ever used a shared prefix would pile up on it.
        self.engine.untag(record.stream_id, record.ids, namespace=record.namespace)
        self.kv.release_host(record)
        self._stop(record)
        self.decider.forget(record)

    def _stop(self, record: StreamRecord) -> None:
        """Nobody wants any more what is under way for the stream."""
        if record.in_flight is not None:
            self._by_key.pop(record.in_flight.key, None)
            self.engine.abort(record.in_flight.key)
            record.in_flight = None

    def _forget(self, record: StreamRecord) -> None:
        """The router has the whole answer, here or from elsewhere: nothing is computed for it any
        more. From now on its KV stays tagged for as long as it is expected back."""
        if record.answer is None or not record.keep_s:
            self._drop(record)
            return
        self._stop(record)
        if record.phase is not Phase.DONE:
            self._done(record)
        record.done_s = self._clock()
        self._records.pop(record.stream_id, None)
        self._kept[record.stream_id] = record

    def _drop_kept(self, stream_id: int) -> None:
        """A new attempt begins of a stream that was kept: whatever goes by its id is the new one's
        from now on. A router whose stream is not over yet does that behind ``DONE_RETENTION_S``."""
        kept = self._kept.get(stream_id)
        if kept is not None:
            self._drop(kept)

    def _let_kept_go(self, until_s: float = math.inf) -> None:
        """Nobody came back to the streams that were kept until then."""
        for record in list(self._kept.values()):
            keep_until_s = record.keep_until_s()
            if keep_until_s is None or keep_until_s <= until_s:
                self._drop(record)

    def _expire(self) -> None:
        now_s = self._clock()
        self._let_kept_go(now_s)
        for record in list(self._records.values()):
            if record.done_s is not None and now_s - record.done_s > DONE_RETENTION_S:
                self._num_expired += 1
                self._forget(record)
