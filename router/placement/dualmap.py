"""Two candidates by two hashes of the prompt's beginning, after DualMap (arXiv 2602.06502).

Hashing alone brings equal beginnings together, without any word from the servers; two candidates
instead of one leave room for load. Servers are hashed together with the key ("highest random
weight"), so one that comes or goes moves only the keys that it has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from typing import ClassVar

from router.placement.interface import (
    Choice,
    PlacementContext,
    PlacementPolicy,
    PlacementReason,
    PlacementRequest,
)
from router.placement.loads import STREAM_WEIGHT_TOKENS, ServerLoad
from router.placement.simple import least_loaded
from streamfill.messages.codec import pack_ids
from streamfill.stream.ids import ServerId

PREFIX_TOKENS = 64
"""What streams with the same beginning are known by. Longer ones tell more documents apart that
begin with the same instructions; streams wait for nothing, but may move until so much is there."""
SLACK_TOKENS = 4 * STREAM_WEIGHT_TOKENS
"""What computing a beginning anew is worth, and how much busier than the average a server may be
before it is a hot spot."""
MAX_KEYS = 1 << 16
"""Beginnings whose server is remembered, the least recently used forgotten first."""


class DualMapPolicy(PlacementPolicy):
    """one of two servers by hashes of the prompt's beginning, a third one where both are hot

    1. *Affinity*: the server that had this beginning last, unless the less loaded candidate is
       ahead of it by more than ``slack_tokens``, or it is a hot spot.
    2. *Load*: else the less loaded candidate.
    3. *Relief*: if that one is a hot spot too, busier than the average of all servers by more than
       ``slack_tokens``, the least loaded server of all, which has the beginning from then on.
    """

    OPTIONS: ClassVar[dict[str, str]] = {
        "prefix_tokens": f"length of the beginning that is hashed; {PREFIX_TOKENS}",
        "slack_tokens": f"load that affinity is worth; {SLACK_TOKENS}",
    }

    def __init__(self, context: PlacementContext) -> None:
        self.prefix_tokens = context.number("prefix_tokens", PREFIX_TOKENS, least=1, most=1 << 20)
        self._slack_tokens = context.number("slack_tokens", SLACK_TOKENS)
        self._homes: OrderedDict[bytes, ServerId] = OrderedDict()

    def choose(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> ServerId:
        return self.decide(request, servers).server_id

    def decide(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> Choice:
        if len(request.prompt) < self.prefix_tokens and not request.is_complete:
            return Choice(least_loaded(servers).server_id, PlacementReason.LOAD)
        key = self._key(request)
        chosen, reason = self._among(key, servers)
        self._homes[key] = chosen.server_id
        self._homes.move_to_end(key)
        if len(self._homes) > MAX_KEYS:
            self._homes.popitem(last=False)
        is_home = reason is PlacementReason.AFFINITY
        return Choice(chosen.server_id, reason, self.prefix_tokens if is_home else 0)

    def _among(
        self, key: bytes, servers: Sequence[ServerLoad]
    ) -> tuple[ServerLoad, PlacementReason]:
        # Of equal ones the first, so that the beginnings are spread evenly over idle servers.
        best = min(_candidates(key, servers), key=lambda load: load.waiting_tokens)
        mean_tokens = sum(load.waiting_tokens for load in servers) / len(servers)
        hot_tokens = mean_tokens + self._slack_tokens
        home_id = self._homes.get(key)
        home = next((load for load in servers if load.server_id == home_id), None)
        if home is not None:
            near_tokens = best.waiting_tokens + self._slack_tokens
            if home.waiting_tokens <= min(near_tokens, hot_tokens):
                return home, PlacementReason.AFFINITY
        if best.waiting_tokens <= hot_tokens:
            return best, PlacementReason.LOAD
        return least_loaded(servers), PlacementReason.RELIEF

    def _key(self, request: PlacementRequest) -> bytes:
        beginning = pack_ids(request.prompt[: self.prefix_tokens])
        namespace = blake2b(request.namespace.encode(), digest_size=16).digest()
        return blake2b(beginning, key=namespace, digest_size=16).digest()


def _candidates(key: bytes, servers: Sequence[ServerLoad]) -> tuple[ServerLoad, ServerLoad]:
    """The server that each of the two hashes puts first; another one than the first hash's for the
    second, where there is one."""
    weights = {
        load.server_id: blake2b(load.server_id.encode(), key=key, digest_size=16).digest()
        for load in servers
    }
    first = max(servers, key=lambda load: weights[load.server_id][:8])
    others = [load for load in servers if load is not first] or [first]
    return first, max(others, key=lambda load: weights[load.server_id][8:])
