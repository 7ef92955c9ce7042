"""The answer of one committed stream: what was asked for, and what servers have sent of it.

Outputs are numbered, so of what several attempts send the client sees each token once, and what is
missing is asked for. An answer ends by the word of its server, or here: at a stop string, or when
it is as long as it was to be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from router import timing
from router.accounts import WorkRecord
from router.answer import Answer
from router.cluster import Cluster
from router.events import EventQueue
from router.interface import DoneEvent, Payer, TokenEvent, Usage
from router.legs import GenerateLeg, Leg, PrefillLeg
from router.recovery.replay import LoggedToken
from router.route import Route
from streamfill.errors import ProtocolError
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import unpack_ids
from streamfill.messages.common import Finish, FinishReason, Sampling
from streamfill.observability.lifetime import Lifetime, LifetimeEvent
from streamfill.stream.state import StreamState, StreamStateMachine


class Answering:
    """Made by the session at the commit, owned by its `attempts` until the stream has ended."""

    __slots__ = (
        "_cluster",
        "_gap_asked_s",
        "_kv_codec",
        "_lifetime",
        "_machine",
        "_num_cached_tokens",
        "_put",
        "_work",
        "answer",
        "flush",
        "heard_s",
        "keep_s",
        "payer",
        "sampling",
    )

    def __init__(
        self,
        cluster: Cluster,
        machine: StreamStateMachine,
        lifetime: Lifetime,
        *,
        answer: Answer,
        sampling: Sampling,
        keep_s: float,
        payer: Payer | None,
        put: Callable[[TokenEvent], None],
        flush: Callable[[], None],
        began_s: float,
    ) -> None:
        """
        Args:
            machine: of the stream; the first token is told to it.
            answer: an empty one.
            sampling: what was asked for, as far as there is room for it.
            keep_s: how long servers are to keep the KV.
            payer: of the tokens. None: nobody counts them.
            put: gives a token to the client; `flush` is called behind those of one message.
            began_s: when this process began with the stream.
        """
        self.answer = answer
        self.sampling = sampling
        self.keep_s = keep_s
        self.payer = payer
        self.heard_s = time.monotonic()
        """When a token came last, or a server was asked for the next one."""
        self._cluster = cluster
        self._machine = machine
        self._lifetime = lifetime
        self._put = put
        self.flush = flush
        self._work = WorkRecord(lifetime, began_s)
        self._num_cached_tokens: int | None = None
        self._kv_codec = "none"
        self._gap_asked_s = float("-inf")

    def take_up(self, tokens: Sequence[LoggedToken], events: EventQueue) -> None:
        """An earlier router process had these tokens; its client may ask for them again."""
        if tokens:
            self._machine.advance(StreamState.DECODING)
        for token in tokens:
            event = self.answer.push(token.token_id, token.logprob, silent=token.is_silent)
            events.put_token(event)

    def hear(self, leg: Leg, output: s.Output, now_s: float) -> bool:
        """A sign of the server that makes the answer. False: there is a gap before these tokens;
        what is missing was asked for."""
        self.heard_s = now_s
        if isinstance(leg, GenerateLeg):
            leg.num_cached_tokens = output.num_cached_tokens
        elif self._num_cached_tokens is None:
            self._num_cached_tokens = output.num_cached_tokens
        if output.first_index > self.answer.num_tokens:
            self._ask_for_missing(leg, now_s)
            return False
        if output.kv_codec != "none":
            self._kv_codec = output.kv_codec
        return True

    def take(self, leg: Leg, output: s.Output, now_s: float) -> Finish | None:
        """Give the client what it does not have yet of these tokens; returns how they end.

        Raises:
            ProtocolError: these are no tokens, or none of the model's.
        """
        finish = output.finish
        if finish is not None and self._is_only_first(leg, finish):
            finish = None
        if output.account is not None:
            self._work.add(leg.server.server_id, leg.attempt, output.account, now_s)
        ids = unpack_ids(output.token_ids)
        vocab_size = self._cluster.limits().vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ProtocolError(f"{list(ids)} are not all in the vocabulary of {vocab_size}")
        answer = self.answer
        if finish is not None and not ids and not answer.num_tokens:
            raise ProtocolError("an end without a token")
        max_new_tokens = self.sampling.max_new_tokens
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
                self._machine.advance(StreamState.DECODING)
            self._record_token(event.index, is_last=ended_by is not None)
            self._put(event)
            if ended_by is not None:
                return ended_by
        return finish

    def done(
        self, finish: Finish, route: Route, *, num_prompt_tokens: int, num_invalidated_tokens: int
    ) -> DoneEvent:
        """What the client is told at the end."""
        answer, report = self.answer, route.handoff_report
        return DoneEvent(
            finish_reason=finish.reason.value,
            text_tail=answer.flush(),
            matched_stop=answer.matched_stop or finish.matched_token_id,
            usage=Usage(
                num_prompt_tokens=num_prompt_tokens,
                num_output_tokens=answer.num_tokens,
                num_cached_tokens=self._num_cached_tokens or 0,
                num_invalidated_tokens=num_invalidated_tokens,
                num_computed_tokens=self._work.num_computed_tokens,
                num_recomputed_tokens=self._work.num_recomputed_tokens,
                num_reused_tokens=self._work.num_reused_tokens,
            ),
            prefill_server=route.prefill_server,
            decode_server=route.decode_server,
            decoded_by_prefill=route.decoded_by_prefill,
            handoff=route.handoff,
            num_attempts=route.num_attempts,
            lifetime=self._lifetime,
            handoff_bytes=None if report is None else report.num_bytes,
            handoff_s=None if report is None else report.seconds,
            kv_codec=self._kv_codec,
        )

    @property
    def probe_due_s(self) -> float:
        """When `probe` has something to do."""
        return self.heard_s + timing.PROBE_AFTER_S

    def probe(self, producer: Leg | None, now_s: float) -> None:
        """The last message of an answer has no follower that would show its loss.

        Args:
            producer: who is expected to send the next token. None: a server is looked for.
        """
        if now_s >= self.probe_due_s:
            self.heard_s = now_s
            if producer is not None:
                self._ask_for_missing(producer, now_s)

    def _is_only_first(self, leg: Leg, finish: Finish) -> bool:
        """A prefill server that hands off has made the one token that it was to make."""
        return (
            finish.reason is FinishReason.LENGTH
            and isinstance(leg, PrefillLeg)
            and leg.hands_off
            and self.sampling.max_new_tokens > 1
        )

    def _record_token(self, index: int, *, is_last: bool) -> None:
        """As `Lifetime.record_token`, which counts, whereas the index is known here."""
        at_s = time.monotonic()
        self._cluster.metrics.tokens_out.inc()
        if self.payer is not None:
            self.payer.used(1)
        if index < 2:
            first = LifetimeEvent.FIRST_TOKEN if index == 0 else LifetimeEvent.SECOND_TOKEN
            self._lifetime.record(first, at_s=at_s)
        elif not is_last:
            self._lifetime.record(LifetimeEvent.TOKEN, at_s=at_s)
        if is_last:
            self._lifetime.record(LifetimeEvent.LAST_TOKEN, at_s=at_s)

    def _ask_for_missing(self, leg: Leg, now_s: float) -> None:
        if now_s - self._gap_asked_s < timing.GAP_REPEAT_S:
            return
        self._gap_asked_s = now_s
        message = r.ResendOutput(
            stream_id=self._machine.stream_id,
            attempt=leg.attempt,
            from_index=self.answer.num_tokens,
        )
        self._cluster.send(leg.server, message)
