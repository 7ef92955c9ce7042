"""Operations that wait for room on a server, in the order in which tenants take turns. No clock.

Of one tenant the oldest operation goes first. Among tenants it is the turn of the one that was
given the fewest tokens for its weight (`streamfill.scheduling.shares`). So somebody who has
hundreds of streams waiting puts nobody else to the end of the queue, nor out of it: where it is
full, the newest operation goes of the tenant that has the most there.
"""

from __future__ import annotations

from streamfill.messages.common import Share
from streamfill.scheduling.shares import FairShares
from streamfill.stream.ids import StreamId


class FairWaiting:
    """The queue of one server."""

    def __init__(self) -> None:
        self._tokens: dict[StreamId, int] = {}
        self._share_of: dict[StreamId, Share] = {}
        self._queues: dict[str, dict[StreamId, None]] = {}
        """By tenant, the oldest operation first; none is empty."""
        self._given = FairShares()
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def put(self, stream_id: StreamId, num_tokens: int, share: Share) -> None:
        """An operation waits that wants the stream to have so many tokens; in its old place if the
        stream waits already."""
        self._tokens[stream_id] = num_tokens
        self._share_of[stream_id] = share
        self._queues.setdefault(share.tenant, {})[stream_id] = None

    def tokens_of(self, stream_id: StreamId) -> int:
        """What it wants the stream to have. Raises KeyError: none waits."""
        return self._tokens[stream_id]

    def discard(self, stream_id: StreamId) -> bool:
        """It waits no more. Returns whether it did."""
        if self._tokens.pop(stream_id, None) is None:
            return False
        tenant = self._share_of.pop(stream_id).tenant
        queue = self._queues[tenant]
        del queue[stream_id]
        if not queue:
            del self._queues[tenant]
        return True

    def has(self, tenant: str) -> bool:
        """Whether something of the tenant waits."""
        return tenant in self._queues

    def heads(self) -> list[StreamId]:
        """The oldest operation of each tenant, in the order of their turns."""
        queues = self._queues
        if len(queues) > 1:
            served = self._given.served()
            starts = {each: served.start_of(self._number(each)) for each in queues}
            return [next(iter(queues[each])) for each in sorted(queues, key=starts.__getitem__)]
        return [next(iter(queue)) for queue in queues.values()]

    def give(self, stream_id: StreamId, num_tokens: int, share: Share) -> None:
        """So many tokens more were given to the stream."""
        self._given.started(
            stream_id,
            self._number(share.tenant),
            num_tokens / share.weight,
            is_committed=False,
            is_last=True,
        )

    def most_dispensable(self) -> StreamId:
        """The newest operation of the tenant that has the most waiting for its weight, the later
        comer of two. Raises ValueError: nothing waits."""

        def load(tenant: str) -> float:
            queue = self._queues[tenant]
            return len(queue) / self._share_of[next(reversed(queue))].weight

        return next(reversed(self._queues[max(reversed(self._queues), key=load)]))

    def _number(self, tenant: str) -> int:
        return self._numbers.setdefault(tenant, len(self._numbers))
