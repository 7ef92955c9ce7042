"""The servers that one stream is on, and where it goes next.

1. `try_place`: a prefill server is chosen and gets the prompt (`prefilling`), and a decode server
   to which KV may go ahead of the commit (`handoff`).
2. `commit`: the prefill server is told what to make of it. Without one, a server is looked for.
3. `first_token_out`: the decode server goes on with the answer (`decoding`).
4. `leave`: the stream has ended; `Forget` goes to servers that are through with it or are to keep
   its KV, `Cancel` to the others.

An attempt that fails in between is followed by another one, elsewhere if possible: before the first
token by giving the prompt to a prefill server, afterwards by giving prompt and answer so far to any
server. How often and how soon, `retries` says. Where nothing follows any more, a method returns how
the stream ends.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from router import timing
from router.answering import Answering
from router.cluster import Cluster
from router.decoding import Decoding
from router.ended_streams import Ending
from router.interface import MoveReason
from router.legs import Leg, PrefillLeg
from router.prefilling import Prefilling
from router.retries import Retries
from router.route import Route
from router.servers import Assignment, Server
from streamfill.errors import UnavailableError
from streamfill.messages import server_to_router as s
from streamfill.observability.lifetime import Lifetime, LifetimeEvent
from streamfill.observability.logging import log_event
from streamfill.stream.ids import StreamId
from streamfill.stream.state import StreamState

logger = logging.getLogger(__name__)


class Attempts:
    """Owned by the session, which asks it on behalf of clients, servers and the clock."""

    __slots__ = (
        "_attempt",
        "_cluster",
        "_decoding",
        "_lifetime",
        "_num_placed_anew",
        "_prefilling",
        "_retries",
        "_stream_id",
        "answering",
    )

    def __init__(
        self,
        cluster: Cluster,
        stream_id: StreamId,
        lifetime: Lifetime,
        prefilling: Prefilling,
        decoding: Decoding,
    ) -> None:
        self.answering: Answering | None = None
        """From the commit to the end of the stream."""
        self._cluster = cluster
        self._stream_id = stream_id
        self._lifetime = lifetime
        self._prefilling = prefilling
        self._decoding = decoding
        self._retries = Retries()
        self._attempt = 0
        self._num_placed_anew = 0
        """Attempts that did not fail, but were begun elsewhere before much was sent."""

    def take_up(self, answering: Answering | None) -> None:
        """An earlier router process began the stream. Called once, first."""
        self._attempt = 1
        self.answering = answering

    # Where it is.

    def producer(self) -> Leg | None:
        """Who takes the prompt in, or is expected to send the next token."""
        if self._decoding.leg is not None:
            return self._decoding.leg
        leg = self._prefilling.leg
        if leg is None or self.answering is None:
            return leg
        is_through = leg.hands_off and self.answering.answer.num_tokens > 0
        return None if is_through else leg

    def leg_of(self, server: Server, attempt: int) -> Leg | None:
        """The one that a message is about; None: it is about none of now."""
        for leg in (self._decoding.leg, self._prefilling.leg):
            if leg is not None and leg.server is server and leg.attempt == attempt:
                return leg
        return None

    @property
    def is_kept_by_server(self) -> bool:
        """Whether a server has the prompt and will answer it, if only because it had it before it
        began to drain. One that is silent but connected may well go on in a moment; if it does not,
        the stream goes elsewhere, committed or not."""
        leg = self.producer()
        return leg is not None and not leg.server.is_dead and leg.server.reachable

    def movable_leg(self) -> PrefillLeg | None:
        """Its attempt, while another server could take it over: before the commit, and when it is
        not on its way already."""
        if self.answering is not None or self._prefilling.moves.is_under_way:
            return None
        return self._prefilling.leg

    def route(self) -> Route:
        """Where it was so far."""
        decoding = self._decoding
        return Route(
            prefill_server=self._prefilling.server_id,
            decode_server="" if decoding.is_by_prefill else decoding.server_id,
            decoded_by_prefill=decoding.is_by_prefill,
            handoff=decoding.handoff.outcome,
            handoff_report=decoding.handoff.report,
            num_attempts=self._attempt - self._num_placed_anew,
        )

    # What its client does.

    def commit(self, answering: Answering, now_s: float) -> None:
        """The prompt is complete."""
        self._prefilling.committed()
        self.answering = answering
        if self._prefilling.leg is not None:
            self._send_commit(self._prefilling.leg, answering, now_s)
        else:
            self.try_place(now_s)

    def place_by(self, prompt: Sequence[int], *, is_complete: bool) -> None:
        """Ask the placement policy again, as long as little or nothing was sent: what the prompt
        begins with is known only now.

        Args:
            prompt: as it will be.
            is_complete: its commit is right behind.
        """
        leg = self._prefilling.leg
        if leg is None:
            return
        avoid = self._retries.failed_on
        with leg.load.left_out():
            server = self._prefilling.choose(
                prompt, len(prompt) + 1, avoid, is_complete=is_complete
            )
        if server is not None and server is not leg.server:
            self._prefilling.drop(leg)
            self._num_placed_anew += 1
            self._cluster.metrics.placed_anew.inc()
            self._begin_prefill(server, time.monotonic())

    # Placement.

    def try_place(self, now_s: float) -> None:
        """Find a server for what comes next, if none has it."""
        if self.producer() is not None:
            if self.answering is None and self._prefilling.leg is not None:
                self._assign_decode(self._prefilling.leg)
            return
        self._retries.wait(now_s)
        if self._retries.begin_try(now_s):
            if self.answering is not None and self.answering.answer.num_tokens:
                self._place_generate(self.answering, now_s)
            else:
                self._place_prefill(now_s)
            if self.producer() is not None:
                self._retries.placed()

    def _place_prefill(self, now_s: float) -> None:
        server = self._choose_prefill(self._prefilling.log.num_tokens + 1)
        if server is not None:
            self._begin_prefill(server, now_s)

    def _choose_prefill(self, need_tokens: int) -> Server | None:
        prompt, avoid = self._prefilling.log.ids, self._retries.failed_on
        is_complete = self.answering is not None
        return self._prefilling.choose(prompt, need_tokens, avoid, is_complete=is_complete)

    def _begin_prefill(self, server: Server, now_s: float) -> None:
        # A server that is come back to takes no attempt that it cancelled.
        self._attempt += 1
        leg = self._prefilling.begin(server, self._attempt, now_s)
        if self.answering is not None:
            self.answering.heard_s = now_s
            self._send_commit(leg, self.answering, now_s)
        else:
            self._prefilling.count_uncommitted(leg)
            self._assign_decode(leg)

    def _assign_decode(self, leg: PrefillLeg) -> None:
        """Choose the decode server ahead of the commit, so that KV can go there."""
        if leg.has_peer and self._decoding.handoff.target is not None:
            return
        num_tokens = self._prefilling.log.num_tokens
        peer = self._decoding.handoff.aim_ahead(num_tokens, self._retries.failed_on)
        if peer is not None:
            leg.push_to(peer)

    def _send_commit(self, leg: PrefillLeg, answering: Answering, now_s: float) -> None:
        num_tokens, avoid = self._prefilling.log.num_tokens, self._retries.failed_on
        target = self._decoding.handoff.aim(num_tokens, answering.sampling.max_new_tokens, avoid)
        self._prefilling.send_commit(leg, answering.sampling, target, answering.keep_s, now_s)
        self._lifetime.record(LifetimeEvent.COMMIT_SENT)

    # The answer's second part.

    def first_token_out(self, leg: PrefillLeg, now_s: float) -> None:
        """Tokens came from this prefill server. If it makes only one, the decode server goes on."""
        if self.answering is None or self.producer() is not None:
            return
        self._lifetime.record(LifetimeEvent.HANDOFF_STARTED)
        target = self._decoding.handoff.take_target()
        if target is None:
            self._decoding.note_handoff("failed: the decode server is gone")
            self.try_place(now_s)
            return
        transfer_id = None if target.transfer_failed else target.transfer_id
        self._decoding.begin(
            *(self.answering, self._prefilling.log, target.load),
            attempt=leg.attempt,
            transfer_id=transfer_id,
            now_s=now_s,
        )

    def _place_generate(self, answering: Answering, now_s: float) -> None:
        log = self._prefilling.log
        need_tokens = log.num_tokens + answering.sampling.max_new_tokens
        decode = self._cluster.choose_decode(need_tokens=need_tokens, avoid=self._retries.failed_on)
        server = self._choose_prefill(need_tokens) if decode is None else decode
        if server is None:
            return
        self._attempt += 1
        transfer_id = None
        if decode is not None:
            transfer_id = self._decoding.hand_off_again(self._prefilling.leg, decode)
        self._decoding.begin(
            *(answering, log, Assignment(server)),
            attempt=self._attempt,
            transfer_id=transfer_id,
            now_s=now_s,
        )

    def handoff_reported(self, report: s.HandoffReport) -> None:
        """A prefill server says how a hand-off went."""
        if self._decoding.is_reported(report):
            self._prefilling.handoff_reported()
            self._decoding.note_handoff("done" if report.ok else f"failed: {report.reason}")

    def finished(self, through: Leg | None) -> None:
        """The answer is complete; `through` is the leg whose server knows it."""
        if through is not None:
            through.is_through = True
        if self.answering is not None:
            if self.answering.keep_s:
                self._prefilling.kept()
            self._decoding.finished(self.answering, self._prefilling.log.num_tokens)

    # Moves.

    def move_from(self, server: Server, *, answers: bool) -> None:
        """See `session.Session`."""
        leg = self.movable_leg()
        if leg is not None and leg.server is server:
            to = self._choose_prefill(self._prefilling.log.num_tokens + 1)
            if to is not None:
                self.move_to(to, MoveReason.DRAIN, f"{server.server_id} drains")
        elif answers and self.answering is not None:
            self._move_answer(server, self.answering)

    def move_to(self, server: Server, reason: MoveReason, why: str) -> None:
        """See `session.Session`."""
        now_s = time.monotonic()
        old = self._prefilling.begin_move(reason, now_s)
        self._note_move(old, server.server_id, reason, why)
        self._begin_prefill(server, now_s)

    def leave_target(self, server: Server) -> None:
        """A decode server that dies or drains will not be handed this stream."""
        target, leg = self._decoding.handoff.target, self._prefilling.leg
        if self.answering is None and target is not None and target.load.server is server:
            self._decoding.handoff.release_target()
            if leg is not None:
                self._assign_decode(leg)

    def _move_answer(self, server: Server, answering: Answering) -> None:
        target = self._decoding.handoff.target
        if target is not None and target.load.server is server:
            self._decoding.handoff.release_target()  # the hand-off finds another one
        leg = self.producer()
        if leg is None or leg.server is not server:
            sender = self._prefilling.leg  # of a hand-off under way
            if sender is not None and sender.server is server and not sender.is_through:
                self._lose_sender(sender, f"{server.server_id} drains")
            return
        need_tokens = self._prefilling.log.num_tokens + answering.sampling.max_new_tokens
        elsewhere = self._choose_prefill(need_tokens)
        if elsewhere is None and answering.answer.num_tokens:
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
            stream_id=self._stream_id,
            from_server=server.server_id,
            to_server=to,
            reason=reason,
            why=why,
        )

    # Failure and time.

    def server_lost(self, server: Server, reason: str) -> Ending | None:
        """Nothing that was on this server is there any more."""
        for leg in (self._decoding.leg, self._prefilling.leg):
            if leg is not None and leg.server is server:
                ending = self.lose(leg, reason)
                if ending is not None:
                    return ending
        self._prefilling.moves.lost(server)
        self.leave_target(server)
        return None

    def lose(self, leg: Leg, reason: str) -> Ending | None:
        """The server of this leg will do no more for the stream."""
        if leg is self.producer():
            return self._recover(leg, reason)
        if leg is self._prefilling.leg:
            self._lose_sender(self._prefilling.leg, reason)
        return None

    def _lose_sender(self, leg: PrefillLeg, reason: str) -> None:
        """The answer goes on elsewhere already, perhaps without the KV that was to come."""
        self._prefilling.drop(leg)
        self._decoding.sender_lost(reason)

    def _recover(self, leg: Leg, reason: str) -> Ending | None:
        """What was to come next will not come: try again, elsewhere if possible."""
        now_s = time.monotonic()
        may_retry = self._retries.failed(leg.began_s, leg.server, now_s)
        num_failures = self._retries.num_failures
        self._cluster.metrics.attempts_failed.inc()
        self._cluster.metrics.retries.inc(may_retry)
        log_event(
            logger,
            "attempt_failed",
            level=logging.WARNING,
            stream_id=self._stream_id,
            attempt=leg.attempt,
            num_failures=num_failures,
            reason=reason,
        )
        self._drop(leg)
        if self._prefilling.go_back():
            return None
        if may_retry:
            self.try_place(now_s)
            return None
        message = f"{num_failures} attempts failed in a row; the last one: {reason}"
        return Ending(StreamState.FAILED, UnavailableError(message))

    def restart(self, leg: PrefillLeg, now_s: float) -> None:
        """The log does not reach back far enough: the whole prompt, as a new attempt."""
        self._prefilling.settle_move()
        self._prefilling.drop(leg)
        self.try_place(now_s)

    def _drop(self, leg: Leg) -> None:
        if isinstance(leg, PrefillLeg):
            self._prefilling.drop(leg)
        else:
            self._decoding.drop(leg)

    def tick(self, now_s: float) -> Ending | None:
        """Repetitions, and what waits for a server. Called when `due_s` has come."""
        if self._retries.gave_up(now_s):
            message = f"no server to go on with for {timing.REPLACE_WAIT_S} s"
            return Ending(StreamState.FAILED, UnavailableError(message))
        self.try_place(now_s)
        leg = self._prefilling.leg
        if leg is not None and not leg.tick(now_s):
            self.restart(leg, now_s)
        if self._decoding.leg is not None:
            self._decoding.leg.tick(now_s)
        if self.answering is not None:
            self.answering.probe(self.producer(), now_s)
        return None

    def due_s(self) -> float:
        """When `tick` has something to do."""
        due_s = self._retries.due_s
        if self.answering is not None:
            due_s = min(due_s, self.answering.probe_due_s)
        for leg in (self._prefilling.leg, self._decoding.leg):
            if leg is not None:
                due_s = min(due_s, leg.due_s)
        return due_s

    def leave(self) -> None:
        """The stream has ended. Nothing of it stays on servers; what is kept here is small."""
        self._prefilling.settle_move()
        legs = [leg for leg in (self._prefilling.leg, self._decoding.leg) if leg is not None]
        for server in {leg.server for leg in legs}:
            here = [leg for leg in legs if leg.server is server]
            attempt = max(leg.attempt for leg in here)
            if all(leg.is_through for leg in here):
                self._cluster.cancels.forget(server, self._stream_id, attempt, time.monotonic())
            else:
                self._cluster.cancels.add(server, self._stream_id, attempt, time.monotonic())
        for leg in legs:
            leg.load.release()
        self._decoding.end()
        self._prefilling.end()
        self.answering = None
