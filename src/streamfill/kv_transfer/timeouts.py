"""Every wait of the transport, with its reason and its consequence."""

from __future__ import annotations

from dataclasses import dataclass

SESSION_S = 10.0
"""A peer that just started may not listen yet (small models load faster than their peers): saying
``Hello`` goes on this long. Then the transfer fails, with all that wait behind it."""

HELLO_RETRY_FIRST_S = 0.1
HELLO_RETRY_LAST_S = 1.0
"""Back-off between two ``Hello``: doubled from the first to the last."""

REPLY_S = 5.0
"""A control thread answers in well under a millisecond, unless its machine swaps. Then the transfer
fails and the session ends."""

GROUP_SETUP_S = 5.0
"""Both sides set the group up at the same moment, right after ``Accept``: 5 ms with Gloo. Then the
transfer fails and the session ends."""

CHUNK_S = 5.0
"""One chunk takes 10 to 30 ms. A wait on a torch.distributed operation cannot be interrupted
(`abort` of a Gloo group leaves a waiting thread waiting), so this also bounds how long staging
memory stays with a silent peer, and how long `close` may take. Then the transfer fails and the
session ends. Transfers that waited for half as long behind one that failed so late fail with it."""

PING_S = 2.0
"""Of an idle session, so that a restarted receiver is noticed before the next transfer needs it."""

SILENCE_S = 10.0
"""Five lost pings. Then the session ends where it was noticed, and its group and thread go."""

PARTS_S = 15.0
"""Between two parts of a transfer that comes from several sender ranks: they submit them at the
same moment, and one of them may have to find its peer first (``SESSION_S``). Then the transfer is
given up, and the staging of its other parts is free."""

JOIN_SLACK_S = 2.0
"""What a thread needs to end after its last wait."""


@dataclass(frozen=True)
class TransportTimeouts:
    """The time-outs of one endpoint, in seconds; see the constants for reasons and consequences."""

    session_s: float = SESSION_S
    hello_retry_first_s: float = HELLO_RETRY_FIRST_S
    hello_retry_last_s: float = HELLO_RETRY_LAST_S
    reply_s: float = REPLY_S
    group_setup_s: float = GROUP_SETUP_S
    chunk_s: float = CHUNK_S
    ping_s: float = PING_S
    silence_s: float = SILENCE_S
    parts_s: float = PARTS_S

    @property
    def join_s(self) -> float:
        """The longest that a thread of the transport can take to end when told to."""
        return max(self.group_setup_s, self.chunk_s) + JOIN_SLACK_S
