"""What stands between the router's core and its placement policy.

The policy is asked only about servers that can take the stream, and its answer is checked: what a
policy decides badly costs time, never a stream.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, ParamSpec, TypeVar

from router.placement.interface import (
    BlockNews,
    Choice,
    PlacementPolicy,
    PlacementReason,
    PlacementRequest,
)
from router.placement.loads import ServerLoad, able_servers
from router.placement.simple import least_loaded
from streamfill.messages.common import Role
from streamfill.observability.logging import RateLimited, log_event
from streamfill.stream.ids import ServerId, StreamId
from streamfill.stream.prefix_blocks import BlockKey, PrefixChain, block_keys

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


class PlacementOutcome(enum.Enum):
    """What became of a question where a stream should go."""

    CHOSEN = "chosen"
    """The policy's answer was taken."""
    REPLACED = "replaced"
    """It had none that could be taken, and the least loaded server was."""
    NOWHERE = "nowhere"
    """No living server could take the stream; it waits."""


class Placement(NamedTuple):
    """A question and what became of it, for those who count."""

    outcome: PlacementOutcome
    choice: Choice | None = None
    """The policy's. None: another outcome than ``CHOSEN``."""
    num_known_tokens: int = 0
    """Of the prompt, at that time."""


class Placer:
    """Owned by the cluster. No sockets, no clock."""

    def __init__(
        self,
        policy: PlacementPolicy,
        spec: str,
        on_placement: Callable[[Placement], None] = lambda placement: None,
    ) -> None:
        """
        Args:
            spec: name and options of the policy, as people are shown it.
            on_placement: told of each question.
        """
        self.policy = policy
        self.spec = spec
        self._on_placement = on_placement
        self._log_refused = RateLimited()

    def choose(
        self,
        request: PlacementRequest,
        loads: Sequence[ServerLoad],
        *,
        need_tokens: int,
        avoid: Collection[ServerId],
    ) -> ServerId | None:
        """A living prefill server whose pool holds ``need_tokens``. None: there is none.

        Args:
            avoid: servers that failed this stream or are full; taken only when there is no other.
        """
        able = able_servers(loads, Role.PREFILL, need_tokens)
        if not able:
            self._on_placement(Placement(PlacementOutcome.NOWHERE))
            return None
        servers = [load for load in able if load.server_id not in avoid] or able
        choice = self._ask(decide, self.policy, request, servers)
        if choice is not None and any(load.server_id == choice.server_id for load in servers):
            num_known_tokens = len(request.prompt)
            self._on_placement(Placement(PlacementOutcome.CHOSEN, choice, num_known_tokens))
            return choice.server_id
        self._on_placement(Placement(PlacementOutcome.REPLACED))
        if choice is not None:
            self._complain(f"chose {choice.server_id!r}, which it was not offered")
        return least_loaded(servers).server_id

    def note_sent(
        self,
        server_id: ServerId,
        keys: Sequence[BlockKey],
        now_s: float,
        after: BlockKey | None = None,
    ) -> None:
        """See `PlacementPolicy`."""
        self._ask(self.policy.note_sent, server_id, keys, now_s, after)

    def note_blocks(self, server_id: ServerId, news: BlockNews) -> None:
        """See `PlacementPolicy`."""
        self._ask(self.policy.note_blocks, server_id, news)

    def note_lost(self, server_id: ServerId) -> None:
        """See `PlacementPolicy`."""
        self._ask(self.policy.note_lost, server_id)

    def _ask(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What a method of the policy returns; None when it fails."""
        try:
            return method(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  a plug-in's bug must not lose streams
            self._complain(f"{method.__name__} failed with {type(error).__name__}: {error}")
            return None

    def _complain(self, reason: str) -> None:
        if self._log_refused.allow():
            log_event(
                logger, "placement_failed", level=logging.ERROR, policy=self.spec, reason=reason
            )


def decide(
    policy: PlacementPolicy, request: PlacementRequest, servers: Sequence[ServerLoad]
) -> Choice:
    """What a policy says, such that it can be counted. Raises what a plug-in's bug raises."""
    server_id, reason, found_tokens = policy.decide(request, servers)
    found_tokens = min(max(found_tokens, 0), len(request.prompt))
    return Choice(server_id, PlacementReason(reason), found_tokens)


class StreamPlacing:
    """What placement knows of one stream. Owned by its session."""

    __slots__ = ("_chain", "_namespace", "_placer", "_policy", "_stream_id")

    def __init__(self, placer: Placer, stream_id: StreamId, namespace: str = "") -> None:
        self._placer = placer
        self._policy = policy = placer.policy
        self._stream_id = stream_id
        self._namespace = namespace
        self._chain = PrefixChain(policy.block_tokens, namespace) if policy.block_tokens else None

    def is_open(self, num_sent_tokens: int) -> bool:
        """Whether the stream may still be placed elsewhere: so little of it was sent."""
        return num_sent_tokens < self._policy.prefix_tokens

    def request(
        self, prompt: Sequence[int], now_s: float, *, is_complete: bool
    ) -> PlacementRequest:
        """The question where it should go, with this prompt."""
        block_tokens = self._policy.block_tokens
        return PlacementRequest(
            stream_id=self._stream_id,
            now_s=now_s,
            namespace=self._namespace,
            prompt=prompt,
            is_complete=is_complete,
            keys=block_keys(prompt, block_tokens, self._namespace) if block_tokens else (),
        )

    def sent(
        self, server_id: ServerId, keep_tokens: int, prompt: Sequence[int], now_s: float
    ) -> None:
        """The server was sent what the prompt has behind its first ``keep_tokens``."""
        if self._chain is None:
            return
        fresh = self._chain.splice(keep_tokens, prompt)
        if fresh:
            num_before = len(self._chain.keys) - len(fresh)
            after = self._chain.keys[num_before - 1] if num_before else None
            self._placer.note_sent(server_id, fresh, now_s, after)
