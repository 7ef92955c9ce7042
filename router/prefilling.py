"""One stream's prompt on prefill servers: which one has it, and what it has of it.

`attempts` says when it goes to another server. Here is what follows from that: the leg there, the
old one of a move, the stream's place in the waiting room, what the placement policy is told, and
how far back the token log has to reach.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from router.cluster import Cluster
from router.interface import MoveReason, OpenOptions
from router.legs import Leg, PrefillLeg
from router.moves import Moves
from router.placement.placer import StreamPlacing
from router.servers import Server
from streamfill.messages import router_to_server as r
from streamfill.messages.common import HandoffTarget, Sampling
from streamfill.stream.ids import SeqNo, ServerId, StreamId
from streamfill.stream.token_log import LoggedSplice, TokenLog


class Prefilling:
    """Owned by the session, which tells it what changes; `attempts` tells it where to go."""

    __slots__ = (
        "_cluster",
        "_num_invalidated_before",
        "_options",
        "_placing",
        "_stream_id",
        "leg",
        "log",
        "moves",
        "server_id",
    )

    def __init__(
        self, cluster: Cluster, stream_id: StreamId, options: OpenOptions, log: TokenLog
    ) -> None:
        self.log = log
        """The prompt; an empty one when the stream has ended."""
        self.leg: PrefillLeg | None = None
        """On the newest server. None: no server has the prompt."""
        self.moves = Moves(self._cancel)
        self.server_id = ""
        """Of the newest server; stays when the prompt leaves it."""
        self._num_invalidated_before = 0
        """Tokens, of the attempts that were dropped."""
        self._cluster = cluster
        self._stream_id = stream_id
        self._options = options
        self._placing = StreamPlacing(cluster.placer, stream_id, options.namespace)

    @property
    def num_invalidated_tokens(self) -> int:
        """Of all attempts so far: what was computed, and is of no use any more."""
        leg, num_tokens = self.leg, self._num_invalidated_before + self.moves.num_invalidated_tokens
        return num_tokens if leg is None else num_tokens + leg.num_invalidated_tokens

    @property
    def may_be_placed(self) -> bool:
        """Whether so little was sent that another server may be chosen still."""
        is_here = self.leg is not None and not self.moves.is_under_way
        return is_here and self._placing.is_open(self.log.num_tokens)

    def choose(
        self,
        prompt: Sequence[int],
        need_tokens: int,
        avoid: Collection[ServerId],
        *,
        is_complete: bool,
    ) -> Server | None:
        """Ask the placement policy for a server. None: there is none.

        Args:
            prompt: as it is, or as it will be.
            need_tokens: that the server's pool must hold.
            avoid: taken only when there is no other.
            is_complete: the prompt is committed, or will be right behind.
        """
        return self._cluster.choose_prefill(
            self._placing, prompt, is_complete=is_complete, need_tokens=need_tokens, avoid=avoid
        )

    def begin(self, server: Server, attempt: int, now_s: float) -> PrefillLeg:
        """Send the prompt to this server, as a new attempt."""
        leg = PrefillLeg(self._cluster.send, server, self._stream_id, attempt, self.log)
        leg.begin(self._options, now_s)
        self.leg = leg
        self.server_id = server.server_id
        self._placing.sent(server.server_id, 0, self.log.ids, time.monotonic())
        return leg

    def changed(
        self,
        logged: Sequence[LoggedSplice],
        now_s: float,
        *,
        commit_follows: bool,
        next_in_s: float | None,
    ) -> None:
        """Send what was just recorded in the log. Called for each segment."""
        leg = self.leg
        if leg is None:
            return
        log, moves = self.log, self.moves
        for each in logged:
            leg.splice(each, now_s, commit_follows=commit_follows, next_in_s=next_in_s)
            moves.splice(each, now_s)
        if not commit_follows:
            self.count_uncommitted(leg)
        if logged:
            keep_tokens = min(each.splice.keep_tokens for each in logged)
            self._placing.sent(leg.server.server_id, keep_tokens, log.ids, now_s)

    def count_uncommitted(self, leg: PrefillLeg) -> None:
        """The prompt takes room on its server as long as it is not committed."""
        num_tokens = self.log.num_tokens
        self._cluster.room.put(self._stream_id, leg.server, num_tokens, self._options.share)

    def committed(self) -> None:
        """It is complete: it stays where it is, and takes no room that others wait for."""
        self.settle_move()
        self._cluster.room.leave(self._stream_id)

    def send_commit(
        self,
        leg: PrefillLeg,
        sampling: Sampling,
        handoff: HandoffTarget | None,
        keep_s: float,
        now_s: float,
    ) -> None:
        """Tell the server that the prompt is complete.

        Args:
            handoff: where the answer goes on behind its first token. None: there.
            keep_s: how long it is to keep the KV.
        """
        commit = r.Commit(
            stream_id=self._stream_id,
            attempt=leg.attempt,
            seq=leg.next_seq,
            num_prompt_tokens=self.log.num_tokens,
            sampling=sampling,
            handoff=handoff,
            keep_s=keep_s,
        )
        leg.send_commit(commit, now_s)

    def acknowledge(self, leg: Leg, seq: int, now_s: float) -> None:
        """The server of this leg has everything up to `seq`."""
        leg.acknowledge(seq, now_s)
        if leg is self.leg and not self.moves.is_under_way:
            # What the only server that takes the prompt in has, it will not ask for.
            self.log.forget(SeqNo(self.leg.acknowledged_log_seq))

    def handoff_reported(self) -> None:
        """Its server has done its part."""
        if self.leg is not None:
            self.leg.is_through = True
            self.leg.load.release()

    def kept(self) -> None:
        """The answer is complete, and its server is to keep the KV: whatever it still does ends
        with `Forget`, since `Cancel` would let the KV go."""
        if self.leg is not None:
            self.leg.is_through = True

    def begin_move(self, reason: MoveReason, now_s: float) -> Server:
        """The leg becomes the old one of a move; `begin` follows. Returns its server."""
        old = self.leg
        assert old is not None
        self.moves.begin(old, reason, now_s)
        return old.server

    def settle_move(self) -> None:
        """The new attempt stays. Without effect when no move is under way."""
        old = self.moves.settle()
        if old is not None:
            self._cancel(old)

    def go_back(self) -> bool:
        """The new attempt of a move was dropped: whether there was one, and the old one goes on."""
        old = self.moves.go_back()
        if old is None:
            return False
        self.leg = old
        self.server_id = old.server.server_id
        self.count_uncommitted(old)
        return True

    def drop(self, leg: PrefillLeg) -> None:
        """This newest attempt is over."""
        leg.load.release()
        self._cancel(leg)
        self._num_invalidated_before += leg.num_invalidated_tokens
        self.leg = None
        self._cluster.room.leave(self._stream_id)

    def end(self) -> None:
        """The stream has ended, and its servers know. Nothing of the prompt is kept."""
        self.leg = None
        self.log = TokenLog()
        self._cluster.room.forget(self._stream_id)

    def _cancel(self, leg: PrefillLeg) -> None:
        now_s = time.monotonic()
        self._cluster.cancels.add(leg.server, self._stream_id, leg.attempt, now_s)
