"""One stream on one server: what was sent, what is acknowledged, what must be sent again.

A leg belongs to one attempt. Nothing here decides where a stream goes; `attempts` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from router import timing
from router.interface import OpenOptions
from router.servers import Assignment, Server
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import pack_ids
from streamfill.messages.common import KvPeer
from streamfill.stream.ids import SeqNo
from streamfill.stream.token_log import LoggedSplice, TokenLog

Send = Callable[[Server, r.RouterToServer], None]
"""Sends, or drops when the server is dead. Never raises, never waits."""


@dataclass(slots=True)
class _Repetition:
    """When to send again; the pause doubles, since what is repeated may be a whole prompt."""

    due_s: float = float("inf")
    _pause_s: float = field(default_factory=lambda: timing.RETRANSMIT_AFTER_S)

    def sent(self, now_s: float) -> None:
        self.due_s = now_s + self._pause_s

    def repeated(self, now_s: float) -> None:
        self._pause_s = min(2 * self._pause_s, timing.RETRANSMIT_AT_MOST_EVERY_S)
        self.sent(now_s)

    def acknowledged(self, now_s: float, *, all_of_it: bool) -> None:
        self._pause_s = timing.RETRANSMIT_AFTER_S
        self.due_s = float("inf") if all_of_it else now_s + self._pause_s


class PrefillLeg:
    """A stream's prompt on a prefill server.

    Sequence numbers of the wire count within the attempt: number 1 is the whole prompt as it was
    when the attempt began, unless it was empty then; later splices follow the token log.
    """

    def __init__(
        self, send: Send, server: Server, stream_id: int, attempt: int, log: TokenLog
    ) -> None:
        self.server = server
        self.attempt = attempt
        self.load = Assignment(server)
        self.num_computed_tokens = 0
        self.num_invalidated_tokens = 0
        self.commit: r.Commit | None = None
        self.is_through = False
        """Its server has nothing left to do for the stream."""
        self.began_s = 0.0
        self._send = send
        self._stream_id = stream_id
        self._log = log
        self._first: r.Splice | None = None
        self._seq_offset = 0
        self._open: r.OpenStream | None = None
        self._opened = False
        self._has_peer = False
        self._acknowledged_seq = 0
        self._sent_seq = 0
        self._cuts: deque[tuple[int, int]] = deque()
        """Splices that are not applied yet, as far as is known: their number, and how many tokens
        they and all behind them keep. Both ascend."""
        self._repetition = _Repetition()
        self._resent_s = float("-inf")

    @property
    def due_s(self) -> float:
        """When `tick` has something to do."""
        return self._repetition.due_s

    def begin(self, options: OpenOptions, now_s: float) -> None:
        """Open the stream on the server and send what is there. Called once, first."""
        self.began_s = now_s
        self._open = r.OpenStream(
            stream_id=self._stream_id,
            attempt=self.attempt,
            mode=options.mode,
            priority=options.priority,
            ttft_slo_s=options.ttft_slo_s,
            namespace=options.namespace,
            share=options.share,
        )
        self._seq_offset = self._log.last_seq
        if self._log.num_tokens:
            self._seq_offset -= 1
            self._first = self._message(self._log.whole())
        self._send(self.server, self._open)
        if self._first is not None:
            self._send(self.server, self._first)
            self._sent_seq = 1
        self._repetition.sent(now_s)
        self._count()

    def splice(
        self,
        logged: LoggedSplice,
        now_s: float,
        *,
        commit_follows: bool,
        next_in_s: float | None = None,
    ) -> None:
        """Send a change that was just recorded. A hint is of no use later, so it is not sent
        again."""
        message = self._message(logged, commit_follows=commit_follows, next_in_s=next_in_s)
        keep_tokens, cuts = message.keep_tokens, self._cuts
        while cuts and cuts[-1][1] >= keep_tokens:
            cuts.pop()
        cuts.append((message.seq, keep_tokens))
        self.num_computed_tokens = min(self.num_computed_tokens, keep_tokens)
        self._sent_seq = message.seq
        self._send(self.server, message)
        self._repetition.sent(now_s)
        self._count()

    @property
    def has_peer(self) -> bool:
        """Whether the server knows where its KV may go."""
        return self._has_peer

    def push_to(self, peer: KvPeer) -> None:
        """KV may go to this decode server ahead of the commit."""
        self._has_peer = True
        message = r.PushTo(stream_id=self._stream_id, attempt=self.attempt, peer=peer)
        self._send(self.server, message)

    def send_commit(self, commit: r.Commit, now_s: float) -> None:
        """Send the commit, whose number is `next_seq`. Nothing follows it."""
        self.commit = commit
        self._sent_seq = commit.seq
        self._send(self.server, commit)
        self._repetition.sent(now_s)

    @property
    def is_accepted(self) -> bool:
        """Whether the server has said that it has the prompt with which the attempt began."""
        return self._opened and self._first is None

    @property
    def hands_off(self) -> bool:
        """Whether only the first token is made here."""
        return self.commit is not None and self.commit.handoff is not None

    @property
    def last_seq(self) -> int:
        """Of the newest message; 0 before the first."""
        return self._sent_seq

    @property
    def next_seq(self) -> int:
        """Of the next message."""
        return self._sent_seq + 1

    @property
    def acknowledged_log_seq(self) -> int:
        """The number in the token log of the newest change that the server has."""
        return self.log_seq(self._acknowledged_seq)

    def log_seq(self, seq: int) -> int:
        """The number in the token log of what is `seq` on the wire."""
        return seq + self._seq_offset

    def acknowledge(self, seq: int, now_s: float) -> None:
        """The server has everything up to `seq`."""
        self._opened = True
        self._acknowledged_seq = max(self._acknowledged_seq, min(seq, self._sent_seq))
        if self._acknowledged_seq >= 1:
            self._first = None
        self._repetition.acknowledged(now_s, all_of_it=self._acknowledged_seq == self._sent_seq)

    def progress(self, report: s.Progress) -> None:
        """What the server reports. Of what it has computed, what the splices keep counts that it
        has not applied yet."""
        cuts, num_tokens = self._cuts, report.num_computed_tokens
        while cuts and cuts[0][0] <= report.seq:
            cuts.popleft()
        self.num_computed_tokens = min(num_tokens, cuts[0][1]) if cuts else num_tokens
        self.num_invalidated_tokens = report.num_invalidated_tokens
        self._count()

    def resync(self, have_seq: int, now_s: float) -> bool:
        """Send everything behind `have_seq` again; False when that is not known any more."""
        if have_seq < self._acknowledged_seq:
            return True  # late: more was acknowledged since
        if have_seq == self._acknowledged_seq and now_s - self._resent_s < timing.GAP_REPEAT_S:
            return True  # every message behind one gap asks for it
        self._resent_s = now_s
        self.acknowledge(have_seq, now_s)
        return self._resend(now_s)

    def tick(self, now_s: float) -> bool:
        """Repeat what was not acknowledged in time; False when it is not known any more."""
        if now_s < self._repetition.due_s:
            return True
        if not self._opened and self._open is not None:
            self._send(self.server, self._open)
        known = self._resend(now_s)
        self._repetition.repeated(now_s)
        return known

    def _resend(self, now_s: float) -> bool:
        last_splice_seq = self._sent_seq - (self.commit is not None)
        messages: list[r.Splice] = []
        if self._acknowledged_seq < last_splice_seq:
            behind = self._acknowledged_seq
            if self._first is not None:
                messages.append(self._first)
                behind = 1
            logged = self._log.since(SeqNo(behind + self._seq_offset))
            if len(logged) != last_splice_seq - behind:
                return False
            messages.extend(self._message(each) for each in logged)
        for message in messages:
            self._send(self.server, message)
        if self.commit is not None and self._acknowledged_seq < self._sent_seq:
            self._send(self.server, self.commit)
        self._repetition.sent(now_s)
        return True

    def _message(
        self,
        logged: LoggedSplice,
        *,
        commit_follows: bool = False,
        next_in_s: float | None = None,
    ) -> r.Splice:
        return r.Splice(
            stream_id=self._stream_id,
            attempt=self.attempt,
            seq=logged.seq - self._seq_offset,
            keep_tokens=logged.splice.keep_tokens,
            token_ids=pack_ids(logged.splice.new_token_ids),
            commit_follows=commit_follows,
            next_in_s=next_in_s,
        )

    def _count(self) -> None:
        num_tokens = self._log.num_tokens
        pending = max(0, num_tokens - self.num_computed_tokens)
        self.load.set(pending_tokens=pending, held_tokens=num_tokens)


class GenerateLeg:
    """A stream's answer on a server, from the tokens that the client has already."""

    last_seq = 0
    """There is one message only, and it has no number."""

    def __init__(self, send: Send, load: Assignment, message: r.Generate) -> None:
        self.server = load.server
        self.attempt = message.attempt
        self.load = load
        self.is_through = False
        """Its server has nothing left to do for the stream."""
        self.began_s = 0.0
        self.transfer_id = message.transfer_id
        self.num_cached_tokens = 0
        """Prompt tokens that the server found in its cache when it started."""
        self._stream_id = message.stream_id
        self._message: r.Generate | None = message
        self._send = send
        self._repetition = _Repetition()

    @property
    def due_s(self) -> float:
        """When `tick` has something to do."""
        return self._repetition.due_s

    def begin(self, now_s: float) -> None:
        """Send it. Called once, first."""
        assert self._message is not None
        self.began_s = now_s
        self._send(self.server, self._message)
        self._repetition.sent(now_s)

    def acknowledge(self, _seq: int, now_s: float) -> None:
        """A sign that the server has it."""
        if self._message is not None:
            self._message = None
            self._repetition.acknowledged(now_s, all_of_it=True)

    def found_prompt(self, num_prompt_tokens: int) -> bool:
        """Whether the server had all whole pages of the prompt in its cache."""
        page_size = self.server.facts.page_size
        return self.num_cached_tokens >= num_prompt_tokens - num_prompt_tokens % page_size

    def transfer_failed(self) -> None:
        """The KV that it may be waiting for will not come."""
        if self.transfer_id is not None:
            message = r.HandoffFailed(
                stream_id=self._stream_id, attempt=self.attempt, transfer_id=self.transfer_id
            )
            self._send(self.server, message)

    def tick(self, now_s: float) -> None:
        """Repeat it when there was no sign in time."""
        if self._message is not None and now_s >= self._repetition.due_s:
            self._send(self.server, self._message)
            self._repetition.repeated(now_s)


Leg = PrefillLeg | GenerateLeg
"""Either part of a stream on a server."""
