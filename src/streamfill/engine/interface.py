"""What a server's logic needs of an inference engine. No sglang here, so the logic is tested
without one.

The real engine is ``engine.scheduler_engine.SchedulerEngine`` (SGLang's scheduler, called from its
own loop); the fake one in the tests is ``tests.support.fake_engine``. All methods are called in the
scheduler's thread and none waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from streamfill.messages.common import Finish, Sampling, TokenLogprob
from streamfill.stream.prefix_blocks import BlockKey

if TYPE_CHECKING:
    from array import array

    from torch import Tensor

    from streamfill.kv_transfer.interface import IncomingTransfer
    from streamfill.kv_transfer.source import KvSource


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """Fixed after the start."""

    vocab_size: int
    context_tokens: int
    """Longest prompt plus answer."""
    pool_tokens: int
    """Longest prompt that fits the KV pool with room for a first token."""
    page_size: int
    max_requests: int
    eos_token_ids: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """KV slots, in tokens. ``free + evictable + used == total``."""

    free_tokens: int
    evictable_tokens: int
    total_tokens: int

    @property
    def used_tokens(self) -> int:
        """Slots that running requests hold."""
        return self.total_tokens - self.free_tokens - self.evictable_tokens


@dataclass(frozen=True, kw_only=True)
class RequestUpdate:
    """What happened to one request since the last poll."""

    key: str
    token_ids: tuple[int, ...]
    """New output tokens."""
    logprobs: tuple[TokenLogprob, ...]
    finish: Finish | None
    """Set once, with the last update of the request."""
    num_cached_tokens: int
    """Prompt tokens found in the radix tree when the request started."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests inside the engine."""

    num_waiting: int
    num_running: int
    """Requests that hold a slot."""
    num_free_slots: int
    num_total_slots: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedKv:
    """KV of part of a token sequence, for the transport; to be given back to ``release_export``."""

    first_token: int
    num_tokens: int
    """Whole pages; the KV of tokens [first_token, num_tokens)."""
    kv: KvSource


@dataclass(frozen=True, kw_only=True)
class HostRoom:
    """Host memory for swapped-out KV, in tokens."""

    num_tokens: int = 0
    num_free_tokens: int = 0
    """Empty, or holding what nobody is expected to need."""
    bytes_per_token: int = 0


class CopyReport(NamedTuple):
    """A group of KV pages was copied."""

    out: bool
    """From the device to the host."""
    num_bytes: int
    seconds: float


class BlockChanges(NamedTuple):
    """Blocks of prompts that came into the radix tree or went (``stream.prefix_blocks``)."""

    cleared: bool
    """All that were there before are gone, and ``removed`` is empty."""
    stored: list[BlockKey]
    removed: list[BlockKey]


class BlockSwap(Protocol):
    """Host memory for KV, in blocks of whole pages: what ``prefill_server.swap.SwapEngine`` offers
    a radix tree."""

    block_tokens: int
    """Tokens of a block."""

    def keys(self, token_ids: array[int], namespace: str) -> list[bytes]:
        """Key of each whole block of a prompt. Those of two namespaces have nothing in common."""
        ...

    def num_present(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys`` host memory holds without a gap."""
        ...

    @property
    def num_held(self) -> int:
        """Blocks in host memory."""
        ...

    def save(
        self, keys: Sequence[bytes], device_pages: Tensor, *, is_resident: bool = False
    ) -> int:
        """Copy blocks out, which may stay where they are too (``is_resident``); returns how many of
        them host memory holds now."""
        ...

    def restore(self, keys: Sequence[bytes], device_pages: Tensor, skip_pages: int = 0) -> None:
        """Copy blocks in, the first one without its first ``skip_pages`` pages."""
        ...

    def touch(self, keys: Sequence[bytes]) -> None:
        """They will be used: they are not given up for others."""
        ...

    def demote(self, keys: Sequence[bytes] | None) -> None:
        """Nobody is expected to need them (None: any): they are given up before others."""
        ...

    def room(self) -> tuple[int, int]:
        """Blocks in all, and of them those that new ones may have."""
        ...

    def poll(self) -> Sequence[CopyReport]:
        """Copies that are over."""
        ...

    def clear(self) -> None:
        """Forget everything."""
        ...


class Engine(Protocol):
    """Requests, radix tree and KV pool of one server rank.

    Whatever is looked for or left in the tree, or in host memory, is looked for and left in a
    ``namespace``: nothing is ever found in another one, however alike the tokens are.
    """

    @property
    def facts(self) -> EngineFacts: ...

    def start_segment(
        self, key: str, stream_id: int, token_ids: array[int], *, namespace: str
    ) -> None:
        """Compute the KV of ``token_ids`` (what the tree lacks of it) and leave it in the tree. No
        output."""
        ...

    def start_answer(
        self,
        key: str,
        stream_id: int,
        prompt_ids: array[int],
        output_ids: Sequence[int],
        sampling: Sampling,
        *,
        namespace: str,
    ) -> None:
        """Sample what follows ``prompt_ids + output_ids``. ``sampling.max_new_tokens`` counts
        ``output_ids`` too."""
        ...

    def allow_interrupts(self, allowed: bool) -> None:
        """Whether the step that is computed next may be interrupted; of no effect where none
        can."""
        ...

    def abort(self, key: str) -> None:
        """Stop a request. Its last update follows in a later poll, unless it is unknown or over."""
        ...

    def poll(self) -> list[RequestUpdate]:
        """News of all requests, in the order in which they were started."""
        ...

    def cached_tokens(self, token_ids: array[int], *, namespace: str) -> int:
        """Length of the prefix that is in the tree; changes nothing in it."""
        ...

    def tag(self, stream_id: int, token_ids: array[int], *, namespace: str) -> int:
        """Note that the nodes of this prefix belong to the stream. Returns how many of its tokens
        other open streams use too."""
        ...

    def untag(self, stream_id: int, token_ids: array[int], *, namespace: str) -> None:
        """The nodes of this sequence no longer belong to the stream."""
        ...

    def set_victim_order(
        self, ranks: Mapping[int, int], to_save: frozenset[int] = frozenset()
    ) -> None:
        """Rank of each open stream: low ranks lose their KV first. Nodes of no open stream go
        before all. What is taken from the streams ``to_save`` is copied to host memory."""
        ...

    def host_tokens(self, token_ids: array[int], num_resident: int, *, namespace: str) -> int:
        """How many tokens right behind the first ``num_resident`` host memory holds; whole
        pages."""
        ...

    def copy_ahead(self, token_ids: array[int], *, namespace: str) -> int:
        """Copy the cached prefix of ``token_ids`` to host memory and leave it where it is, so that
        taking it later costs nothing. Returns how many of its tokens host memory holds now,
        without a gap from the first one on."""
        ...

    def restore(self, token_ids: array[int], *, namespace: str) -> int:
        """Bring back what host memory holds right behind the cached prefix of ``token_ids``, as far
        as device memory can be had. Returns the length of the cached prefix afterwards."""
        ...

    @property
    def restore_s(self) -> float:
        """What the newest ``restore`` took, without making room for it."""
        ...

    def release_host(
        self, token_ids: array[int] | None, first_token: int, *, namespace: str
    ) -> None:
        """A stream is over: nobody is expected to need the host copies of its tokens from
        ``first_token`` on. None: it was the last one, and nobody needs any, in any namespace."""
        ...

    def host_room(self) -> HostRoom: ...

    def poll_copies(self) -> Sequence[CopyReport]:
        """Copies to and from host memory that are over, since the last call."""
        ...

    def take_losers(self) -> frozenset[int]:
        """Streams that lost KV since the last call."""
        ...

    def watch_blocks(self, block_tokens: int) -> None:
        """From now on record which blocks of so many tokens come and go; what is there already is
        found. 0: record nothing."""
        ...

    def take_blocks(self) -> BlockChanges:
        """What came and went since the last call or since ``watch_blocks``, less what was undone
        meanwhile."""
        ...

    def held_blocks(self) -> list[BlockKey]:
        """All blocks that are there now."""
        ...

    @property
    def num_held_blocks(self) -> int:
        """About as many as ``held_blocks`` returns, at no cost."""
        ...

    def memory(self) -> Memory: ...

    def load(self) -> Load: ...

    def waiting_keys(self) -> frozenset[str]:
        """Requests that could not start yet."""
        ...

    @property
    def num_evicted_tokens(self) -> int:
        """Since the start."""
        ...

    def export_kv(
        self, token_ids: array[int], first_token: int = 0, *, namespace: str
    ) -> ExportedKv | None:
        """KV of the longest cached prefix from ``first_token`` on, whole pages, as something that
        stays as it is until it is given back. None: nothing is cached there, or staging memory is
        full."""
        ...

    def release_export(self, exported: ExportedKv) -> None:
        """Give an export back."""
        ...

    @property
    def num_lent(self) -> int:
        """Exports that are read from the pool itself, which has their memory back with them. The
        same on all ranks."""
        ...

    def import_kv(self, incoming: IncomingTransfer) -> int:
        """Put received KV into the tree, in the transfer's namespace; returns how many tokens of
        the sequence are cached there now.
        The caller releases ``incoming``."""
        ...

    def flush(self) -> bool:
        """Empty the radix tree. False while requests are running or KV is lent."""
        ...
