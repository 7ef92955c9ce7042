"""Which KV heads go from which rank to which, where two servers differ in their tensor-parallel
size. Pure: no torch, no sockets.

A model's KV heads are dealt out as SGLang does it (``layers.linear.QKVParallelLinear``): with no
more ranks than heads each rank holds an equal run of them; with more ranks than heads, as many
neighbouring ranks hold the same one head. So what two ranks have in common is one run of heads, and
a receiving rank is filled by one part from each sending rank that feeds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class HeadRange(NamedTuple):
    """KV heads that follow each other."""

    first: int
    num: int

    @property
    def end(self) -> int:
        """The first one behind them."""
        return self.first + self.num

    def overlap(self, other: HeadRange) -> HeadRange | None:
        """What both have; None: nothing."""
        first, end = max(self.first, other.first), min(self.end, other.end)
        return HeadRange(first, end - first) if first < end else None

    def behind(self, first: int) -> HeadRange:
        """The same heads, counted from ``first`` on."""
        return HeadRange(self.first - first, self.num)


@dataclass(frozen=True)
class HeadShare:
    """The KV heads that one rank of a server holds.

    Raises:
        ValueError: so many ranks cannot share the heads, or there is no such rank.
    """

    num_heads: int
    """Of the whole model."""
    tp_size: int = 1
    """Ranks of the server."""
    rank: int = 0

    def __post_init__(self) -> None:
        _copies(self.num_heads, self.tp_size)
        if not 0 <= self.rank < self.tp_size:
            raise ValueError(f"there is no rank {self.rank} of {self.tp_size}")

    @property
    def heads(self) -> HeadRange:
        """Held by this rank, counted in the whole model."""
        num_copies = _copies(self.num_heads, self.tp_size)
        num = num_received(self.num_heads, self.tp_size) // self.tp_size
        return HeadRange(self.rank // num_copies * num, num)

    def heads_to(self, rank: int, tp_size: int) -> HeadRange | None:
        """What this rank sends to rank ``rank`` of a server of ``tp_size`` ranks, counted in the
        whole model; None: nothing.

        Of several ranks here that hold a head, each is the source of as many ranks there, give or
        take one; rank 0 always sends something to rank 0.

        Raises:
            ValueError: so many ranks cannot share the heads, or there is no such rank.
        """
        shared = self.heads.overlap(HeadShare(self.num_heads, tp_size, rank).heads)
        num_sources = _copies(self.num_heads, self.tp_size)
        place = rank % _copies(self.num_heads, tp_size)
        if self.rank % num_sources != place % num_sources:
            return None
        return shared

    def receivers(self, tp_size: int) -> list[int]:
        """Ranks of a server of ``tp_size`` ranks that get something from this one.

        Raises:
            ValueError: so many ranks cannot share the heads.
        """
        _copies(self.num_heads, tp_size)
        return [rank for rank in range(tp_size) if self.heads_to(rank, tp_size) is not None]

    def check_pool(self, num_kv_heads: int) -> None:
        """Check against a pool.

        Raises:
            ValueError: it holds another number of heads than this rank should.
        """
        if self.heads.num != num_kv_heads:
            raise ValueError(
                f"the pool holds {num_kv_heads} KV heads, but rank {self.rank} of {self.tp_size} "
                f"has {self.heads.num} of the model's {self.num_heads}"
            )


def num_received(num_heads: int, tp_size: int) -> int:
    """KV heads that all ranks of a server hold together, those that several hold counted as
    often.

    Raises:
        ValueError: so many ranks cannot share the heads.
    """
    return num_heads * _copies(num_heads, tp_size)


def is_covered(heads: HeadRange, parts: Sequence[HeadRange]) -> bool:
    """Whether parts of ``heads``, none of which overlap, are all of them."""
    return sum(part.num for part in parts) == heads.num


def _copies(num_heads: int, tp_size: int) -> int:
    """How many ranks hold the same heads."""
    larger, smaller = max(num_heads, tp_size), min(num_heads, tp_size)
    if smaller < 1 or larger % smaller:
        raise ValueError(f"{tp_size} ranks cannot share {num_heads} KV heads evenly")
    return max(1, tp_size // num_heads)
