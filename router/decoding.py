"""One stream's answer on the server that goes on with it, and the hand-off of its KV to there.

That is a decode server, or a prefill server where there is none. As in `prefilling`, here is what
follows when `attempts` says where it goes; `handoff` knows the decode server before it has begun.
"""

from __future__ import annotations

import time

from router.answering import Answering
from router.cluster import Cluster
from router.handoff import Handoff
from router.interface import OpenOptions
from router.legs import GenerateLeg, PrefillLeg
from router.servers import Assignment, Server
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import pack_ids
from streamfill.messages.common import Role
from streamfill.observability.lifetime import Lifetime
from streamfill.stream.ids import StreamId, TransferId
from streamfill.stream.token_log import TokenLog


class Decoding:
    """Owned by the session, used by its `attempts`. Owns the leg, and the hand-off to it."""

    __slots__ = (
        "_cluster",
        "_options",
        "_stream_id",
        "handoff",
        "is_by_prefill",
        "leg",
        "server_id",
    )

    def __init__(
        self, cluster: Cluster, stream_id: StreamId, options: OpenOptions, lifetime: Lifetime
    ) -> None:
        self.handoff = Handoff(cluster, stream_id, lifetime)
        self.leg: GenerateLeg | None = None
        """None: it has not begun, or its server was lost."""
        self.server_id = ""
        """Of the newest decode server; stays when the answer leaves it."""
        self.is_by_prefill = False
        """A prefill server makes more than the first token."""
        self._cluster = cluster
        self._stream_id = stream_id
        self._options = options

    def begin(
        self,
        answering: Answering,
        log: TokenLog,
        load: Assignment,
        *,
        attempt: int,
        transfer_id: TransferId | None,
        now_s: float,
    ) -> None:
        """Go on with the answer on the server of this load.

        Args:
            answering: the answer so far.
            log: the prompt.
            transfer_id: of KV that is on its way there. None: it computes the prompt, or finds it.
        """
        answer = answering.answer
        message = r.Generate(
            stream_id=self._stream_id,
            attempt=attempt,
            prompt_ids=pack_ids(log.ids),
            output_ids=pack_ids(answer.token_ids),
            sampling=answering.sampling,
            transfer_id=transfer_id,
            namespace=self._options.namespace,
            share=self._options.share,
        )
        load.set(pending_tokens=0, held_tokens=log.num_tokens + answer.num_tokens)
        self.leg = GenerateLeg(self._cluster.send, load, message)
        self.leg.begin(now_s)
        answering.heard_s = now_s
        if load.server.role is Role.DECODE:
            self.server_id = load.server.server_id
        self.is_by_prefill = load.server.role is Role.PREFILL

    def hand_off_again(self, sender: PrefillLeg | None, server: Server) -> TransferId | None:
        """Have the prompt's KV sent to this decode server as well, if it may still be anywhere."""
        if sender is None or sender.server.is_dead or not sender.hands_off:
            return None
        target = self.handoff.aim_again(server)
        message = r.HandOff(stream_id=self._stream_id, attempt=sender.attempt, target=target)
        self._cluster.send(sender.server, message)
        return TransferId(target.transfer_id)

    def is_reported(self, report: s.HandoffReport) -> bool:
        """Take a report in. Whether it is of the newest hand-off; then `note_handoff` follows."""
        return self.handoff.reported(report, None if self.leg is None else self.leg.transfer_id)

    def note_handoff(self, outcome: str) -> None:
        """See `Handoff.note`. A server that waits for KV which will not come is told so."""
        self.handoff.note(outcome)
        if outcome != "done" and self.leg is not None:
            self.leg.transfer_failed()

    def sender_lost(self, reason: str) -> None:
        """No KV comes any more. Also a server that has got it may wait: for what it goes on behind,
        which was evicted and was to be sent again."""
        if self.leg is None:
            return
        if self.handoff.outcome == "none":
            self.note_handoff(f"failed: {reason}")
        else:
            self.leg.transfer_failed()

    def finished(self, answering: Answering, num_prompt_tokens: int) -> None:
        """The answer is complete."""
        leg, handoff = self.leg, self.handoff
        if leg is None:
            self.is_by_prefill = handoff.target is None and answering.sampling.max_new_tokens > 1
        elif handoff.outcome == "none" and leg.transfer_id is not None:
            handoff.overtaken(found_prompt=leg.found_prompt(num_prompt_tokens))

    def drop(self, leg: GenerateLeg) -> None:
        """This attempt is over."""
        leg.load.release()
        self._cluster.cancels.add(leg.server, self._stream_id, leg.attempt, time.monotonic())
        self.leg = None

    def end(self) -> None:
        """The stream has ended, and its servers know."""
        self.handoff.end()
        self.leg = None
