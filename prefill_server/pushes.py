"""What goes to a decode server ahead of the commit. Plain bookkeeping: no engine, no transport.

The life of a push:

1. ``PushTo`` names the decode server. It is asked what it holds of the prompt (a shared system
   prompt, an earlier turn), and says so whenever that changes.
2. KV that was computed and is not there is sent, one transfer at a time, as far as it is stable:
   all of it while a stream only grows; of a stream whose context is replaced as many leading tokens
   as will more likely than not still be there after the next update (see ``num_stable``).
3. At the commit only the rest is sent, behind what is there or on its way.

What the decode server is believed to hold may be wrong by the time a transfer arrives. It then says
what it missed.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from streamfill.messages.common import KvPeer, StreamMode

MIN_PUSH_TOKENS = 32
"""Less waits for more: a transfer has a fixed cost of about a millisecond."""
REFUSED_PAUSE_S = 1.0
"""A decode server without room for early KV is left alone for so long."""
ANSWER_S = 0.2
"""A decode server answers between two of its steps. Then KV is sent, needed or not."""
NUM_UPDATES_KEPT = 16
"""Of a stream; enough to see which prefix survives."""


class EarlyPush(enum.Enum):
    """When KV is sent ahead of the commit."""

    OFF = "off"
    ON = "on"
    """All that was computed, whatever may become of it."""
    AUTO = "auto"
    """What is worth it."""


@dataclass
class StreamPush:
    """One stream, and the decode server that it will go to."""

    peer: KvPeer
    version: int = 0
    """Of the prompt: counts how often tokens were replaced."""
    num_held: int = 0
    """Leading tokens that the decode server is believed to hold."""
    num_asked: int = 0
    """Leading tokens that it was asked about."""
    may_hold_more: bool = True
    """It held all that it was asked about, or was not asked yet."""
    answer_due_s: float | None = None
    """Until then its answer is waited for; it may hold what would be sent."""
    transfer_id: int | None = None
    """Of the push under way."""
    num_sending: int = 0
    """What will be held once that has arrived."""
    num_bytes: int = 0
    """Arrived so far, from all ranks."""
    not_before_s: float = 0.0
    kept: list[int] = field(default_factory=list)
    """Leading tokens that each update kept, the newest last."""

    @property
    def num_expected(self) -> int:
        """Leading tokens that are there once all that is under way has arrived."""
        return max(self.num_held, self.num_sending)

    def wants_to_ask(self, num_known: int) -> bool:
        """Whether the decode server may hold more of the prompt than is known."""
        return (
            self.may_hold_more
            and self.num_held >= self.num_asked
            and num_known >= self.num_asked + MIN_PUSH_TOKENS
        )

    def ask(self, num_known: int, now_s: float) -> None:
        """It was asked about the first ``num_known`` tokens."""
        self.num_asked = num_known
        self.answer_due_s = now_s + ANSWER_S

    def may_push(self, now_s: float) -> bool:
        """Whether another push may begin now."""
        return self.transfer_id is None and not self.is_paused(now_s)

    def is_paused(self, now_s: float) -> bool:
        """Whether another push has to wait until time has passed, which nobody tells."""
        is_waiting = self.answer_due_s is not None and now_s < self.answer_due_s
        return is_waiting or now_s < self.not_before_s

    def push(self, transfer_id: int, num_tokens: int) -> None:
        """KV up to ``num_tokens`` is on its way."""
        self.transfer_id = transfer_id
        self.num_sending = num_tokens
        self.may_hold_more = False

    def splice(self, keep_tokens: int, num_before: int) -> None:
        """The prompt changed: of ``num_before`` tokens ``keep_tokens`` stayed."""
        if num_before:
            self.kept.append(keep_tokens)
            del self.kept[:-NUM_UPDATES_KEPT]
        if keep_tokens < num_before:
            self.version += 1
            self.num_held = min(self.num_held, keep_tokens)
            self.num_sending = min(self.num_sending, keep_tokens)
            self.num_asked = min(self.num_asked, keep_tokens)

    def hear(self, version: int, num_tokens: int, *, is_loss: bool = False) -> None:
        """The decode server said what it holds. Losses count in any case; what it holds beyond that
        only if it knew this version of the prompt. What was under way when it spoke may be there by
        now, so a small number alone says nothing."""
        if is_loss:
            self.num_held = min(self.num_held, num_tokens)
            self.num_sending = min(self.num_sending, num_tokens)
        elif version == self.version:
            self.num_held = max(self.num_held, num_tokens)
        if version == self.version:
            self.answer_due_s = None

    def ended(self, *, ok: bool, now_s: float) -> None:
        """The push under way is over. What is held now the decode server will say."""
        if ok:
            self.num_held = self.num_expected
        else:
            self.not_before_s = now_s + REFUSED_PAUSE_S
        self.transfer_id = None
        self.num_sending = 0

    def lose(self) -> None:
        """Nothing is known any more of what the decode server holds."""
        self.num_held = self.num_asked = 0
        self.may_hold_more = True
        self.answer_due_s = None


def num_stable(mode: StreamMode, kept: Sequence[int], num_computed: int, num_busy: int) -> int:
    """How many leading tokens are worth sending ahead of the commit.

    A token at place ``i`` survives the next update with a probability that the updates so far tell:
    ``p = (number of updates that kept it + 1/2) / (number of updates + 1)`` (the mean of a
    binomial's posterior under the Jeffreys prior, Bernardo and Smith, Bayesian Theory, section
    5.1). Sending it early saves its transfer after the commit with probability ``p``, and is wasted
    work with ``1 - p``, which costs all who wait for this server: it is worth it where
    ``p > (1 - p) * (1 + num_busy)``.

    Args:
        mode: an append-only prompt keeps all.
        kept: leading tokens that each of the updates so far kept.
        num_computed: tokens that have KV.
        num_busy: other requests that this server works on.
    """
    if mode is StreamMode.APPEND:
        return num_computed
    num_updates = len(kept)
    worth = (1 + num_busy) / (2 + num_busy)
    for num_surviving, keep_tokens in enumerate(sorted(kept, reverse=True), start=1):
        if (num_surviving + 0.5) / (num_updates + 1) > worth:
            return min(keep_tokens, num_computed)
    return 0
