"""Policies that look at nothing but loads, and in turns."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from router.placement.interface import (
    Choice,
    PlacementContext,
    PlacementPolicy,
    PlacementReason,
    PlacementRequest,
)
from router.placement.loads import ServerLoad
from streamfill.stream.ids import ServerId


class LeastLoadedPolicy(PlacementPolicy):
    """the server with the least work ahead"""

    OPTIONS: ClassVar[dict[str, str]] = {}
    reason = PlacementReason.LOAD

    def __init__(self, context: PlacementContext) -> None:
        del context

    def choose(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> ServerId:
        del request
        return least_loaded(servers).server_id


class RoundRobinPolicy(PlacementPolicy):
    """one server after the other, by their ids"""

    OPTIONS: ClassVar[dict[str, str]] = {}

    def __init__(self, context: PlacementContext) -> None:
        del context
        self._last = ServerId("")

    def choose(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> ServerId:
        del request
        ids = sorted(server.server_id for server in servers)
        # By id and not by place, so that servers that come and go disturb nobody's turn.
        self._last = next((each for each in ids if each > self._last), ids[0])
        return self._last


class PowerOfTwoPolicy(PlacementPolicy):
    """the less loaded of two servers drawn at random"""

    OPTIONS: ClassVar[dict[str, str]] = {"seed": "of the random numbers; 0"}
    reason = PlacementReason.LOAD

    def __init__(self, context: PlacementContext) -> None:
        self._random = random.Random(context.number("seed", 0))

    def choose(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> ServerId:
        del request
        drawn = servers if len(servers) < 2 else self._random.sample(servers, 2)
        return least_loaded(drawn).server_id


class PullPolicy(PlacementPolicy):
    """the least loaded server first, the next one where that is full

    After P/D-Serve (arXiv 2408.08147), whose gateway asks one server after the other until one
    accepts. Here the router knows what they would say: a server is full when what comes would wait
    for room for uncommitted contexts, or for a free request slot.
    """

    OPTIONS: ClassVar[dict[str, str]] = {
        "max_asked": "servers that are asked before the stream waits at the first one; 4"
    }
    prefix_tokens = 1

    def __init__(self, context: PlacementContext) -> None:
        self._max_asked = context.number("max_asked", 4, least=1)

    def choose(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> ServerId:
        return self.decide(request, servers).server_id

    def decide(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> Choice:
        num_tokens = len(request.prompt)
        order = sorted(servers, key=load_rank)
        for server in order[: self._max_asked]:
            fits = server.spare_tokens is None or num_tokens <= server.spare_tokens
            if not server.is_full and (fits or request.is_complete):
                is_first = server is order[0]
                reason = PlacementReason.LOAD if is_first else PlacementReason.ROOM
                return Choice(server.server_id, reason)
        return Choice(order[0].server_id, PlacementReason.FULL)


def least_loaded(servers: Sequence[ServerLoad]) -> ServerLoad:
    """The one with the least work ahead."""
    return min(servers, key=load_rank)


def load_rank(load: ServerLoad) -> tuple[int, int, ServerId]:
    """Less is better; the id makes the choice the same in every run."""
    return load.waiting_tokens, load.num_streams, load.server_id
