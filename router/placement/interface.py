"""What every placement policy is.

A policy of your own is a function ``(PlacementContext) -> PlacementPolicy`` in an entry point of
the group ``streamfill.placement_policies``; see ``registry`` and docs/placement.md.

A policy chooses prefill servers. It keeps its state in itself, takes the time from its requests,
and draws random numbers from a generator with a seed: the same calls give the same choices.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from router.placement.loads import ServerLoad
from streamfill.errors import ConfigError
from streamfill.stream.ids import ServerId, StreamId
from streamfill.stream.prefix_blocks import BlockKey


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementRequest:
    """A stream that needs a prefill server."""

    stream_id: StreamId
    now_s: float
    """Monotonic."""
    namespace: str = ""
    """Prompts of different namespaces share no KV, whatever their tokens are."""
    prompt: Sequence[int] = ()
    """Token ids that are known so far; often none when the stream is opened. Not to be changed."""
    is_complete: bool = False
    """The prompt is committed: nothing follows."""
    keys: Sequence[BlockKey] = ()
    """Of the whole blocks of the prompt, ``PlacementPolicy.block_tokens`` each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockNews:
    """What a server says of the blocks in its cache."""

    is_complete: bool
    """``stored`` is all that it has; else what changed."""
    stored: Sequence[BlockKey]
    removed: Sequence[BlockKey] = ()


class PlacementReason(enum.Enum):
    """Why a policy chose a server, as far as it says. For the metrics only."""

    RULE = "rule"
    """Its rule says so, and it tells no more."""
    LOAD = "load"
    """The least loaded of those that it looked at."""
    AFFINITY = "affinity"
    """The beginning of the prompt is there, or probably."""
    RELIEF = "relief"
    """More of the prompt is on another server, or would belong there; but that one is too busy."""
    ROOM = "room"
    """Less loaded ones had no room."""
    FULL = "full"
    """All that it looked at had no room; the stream waits at the least loaded one."""


class Choice(NamedTuple):
    """The server that a policy chose, and what the metrics say about it."""

    server_id: ServerId
    reason: PlacementReason = PlacementReason.RULE
    found_tokens: int = 0
    """Of the prompt, expected in the server's cache."""


class PlacementPolicy(abc.ABC):
    """Chooses prefill servers. Owned by the router's loop; no method may wait.

    Attributes:
        prefix_tokens: while less of a stream's prompt was sent to its server, ``choose`` is asked
            again before each piece, and the stream moves if the answer is another server. 0: once,
            when the stream is opened.
        block_tokens: tokens of the blocks that servers are asked to report (``note_blocks``) and
            that requests carry the keys of. 0: none.
        reason: why it chooses a server, where that is always the same.
    """

    prefix_tokens: int = 0
    block_tokens: int = 0
    reason: PlacementReason = PlacementReason.RULE

    @abc.abstractmethod
    def choose(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> ServerId:
        """One of ``servers``, of which there is at least one.

        All of them are alive, large enough for what is known of the prompt and, if there are such,
        have room and did not fail this stream before. The router takes no other answer.
        """

    def decide(self, request: PlacementRequest, servers: Sequence[ServerLoad]) -> Choice:
        """`choose` as the router asks it: with why. For policies that can tell more than
        ``reason``."""
        return Choice(self.choose(request, servers), self.reason)

    def note_sent(  # noqa: B027  optional, as the next two
        self,
        server_id: ServerId,
        keys: Sequence[BlockKey],
        now_s: float,
        after: BlockKey | None = None,
    ) -> None:
        """These blocks of a prompt, without a gap, are on their way to the server, which will
        compute what it lacks. Called only where ``block_tokens`` is above 0.

        Args:
            after: the block before them. None: they begin the prompt.
        """

    def note_blocks(self, server_id: ServerId, news: BlockNews) -> None:  # noqa: B027
        """A server said what it has in its cache. Losses are made good before: what is told here,
        one after the other, is what happened there. Called only where ``block_tokens`` is above
        0."""

    def note_lost(self, server_id: ServerId) -> None:  # noqa: B027
        """The server process is gone, and its cache with it."""


@dataclass(frozen=True, kw_only=True)
class PlacementContext:
    """What a policy is made with."""

    options: Mapping[str, str] = field(default_factory=dict)
    """As given by the user, by name; the registry has checked the names."""

    def number(self, name: str, default: int, *, least: int = 0, most: int = 1 << 40) -> int:
        """The option ``name`` as a whole number within these bounds.

        Raises:
            ConfigError: it is not.
        """
        text = self.options.get(name)
        if text is None:
            return default
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise ConfigError(
                f"placement_options.{name}",
                text,
                f"must be a whole number between {least} and {most}",
            )
        return value
