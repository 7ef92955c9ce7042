"""How much of a server each tenant had: virtual time, as of start-time fair queueing.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996) over tokens, as the virtual token
counters of "Fairness in Serving Large Language Models" (Sheng et al., OSDI 2024) count them: what
is computed for a tenant costs its tokens divided by its weight, and the tenant goes first whose
next tokens start at the earliest virtual time.

Virtual time is that at which the newest stream was started. A tenant that comes, or comes back,
starts there: it owes nothing of the time before, and has saved nothing up. Two tenants that both
want more than there is are apart by a few of their longest prompts at most, however long that
lasts.

Here is no clock, and nothing that differs between tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from streamfill.stream.ids import StreamId

OUTPUT_COST: Final = 2.0
"""A token of an answer costs as much as so many of a prompt, as in the paper by Sheng et al."""
_MAX_TENANTS: Final = 64
"""More are looked through for those whose virtual time is in the past."""


class Served(NamedTuple):
    """What tenants had so far."""

    ends: Mapping[int, float]
    """Virtual time at which what was started for a tenant ends; of one that is not in, the past."""
    now: float
    """Virtual time."""
    unfinished: tuple[StreamId, ...] = ()
    """Streams of which a part was computed, and of which more is to come: the newest committed one
    and the newest other one, the newer one first."""

    def start_of(self, tenant: int) -> float:
        """When the tenant's next tokens start, in virtual time."""
        return max(self.ends.get(tenant, 0.0), self.now)


NOTHING_SERVED: Final = Served({}, 0.0)


class FairShares:
    """The account of one server. ``served`` is as it is now, and changes with it."""

    def __init__(self) -> None:
        self._ends: dict[int, float] = {}
        self._now = 0.0
        self._most = _MAX_TENANTS
        self._unfinished: dict[bool, StreamId] = {}
        """By whether it is committed."""

    def served(self) -> Served:
        """For the next decision."""
        unfinished = self._unfinished
        return Served(
            self._ends, self._now, tuple(reversed(unfinished.values())) if unfinished else ()
        )

    def started(
        self,
        stream_id: StreamId,
        tenant: int,
        cost: float,
        *,
        is_committed: bool,
        is_last: bool,
    ) -> None:
        """A stream is computed.

        Args:
            tenant: whose it is.
            cost: tokens divided by the weight.
            is_committed: its prompt is complete.
            is_last: nothing of what is known of it is left with this; of a prompt that is not
                complete, no whole page.
        """
        unfinished = self._unfinished
        start = max(self._now, self._ends.get(tenant, 0.0))
        if stream_id not in unfinished.values():
            self._now = start  # going on is no turn: others may wait whose next start is earlier
        self._ends[tenant] = start + cost
        if unfinished:
            self._unfinished = unfinished = {
                each: other for each, other in unfinished.items() if other != stream_id
            }
        if not is_last:
            unfinished[is_committed] = stream_id
        if len(self._ends) > self._most:
            self._forget_idle()

    def generated(self, tenant: int, cost: float) -> None:
        """Tokens came out; ``cost`` is theirs divided by the weight, without ``OUTPUT_COST``."""
        self._ends[tenant] = max(self._now, self._ends.get(tenant, 0.0)) + OUTPUT_COST * cost

    def _forget_idle(self) -> None:
        # In place: the newest `Served` shows these.
        for tenant in [each for each, end in self._ends.items() if end <= self._now]:
            del self._ends[tenant]
        self._most = max(_MAX_TENANTS, 2 * len(self._ends))
