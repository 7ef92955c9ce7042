"""An engine without a model: ``FakeEngine`` implements ``streamfill.engine.interface.Engine``.

Time passes only in ``advance``, which is one forward pass:

1. Waiting requests start in their order while slots and memory suffice; the first that does not fit
   stops the rest. A request takes the pages of its whole prompt and answer when it starts.
2. Every running request computes: a segment is over at once, an answer gets one token. Computed
   prompts go into the cache, where others find them from then on.

The next token is a function of all tokens before it (`next_token`), so answers can be predicted.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from prefill_server.host_index import HostIndex, block_keys
from streamfill.engine.interface import (
    BlockChanges,
    CopyReport,
    EngineFacts,
    ExportedKv,
    HostRoom,
    Load,
    Memory,
    RequestUpdate,
)
from streamfill.kv_transfer.interface import IncomingTransfer
from streamfill.kv_transfer.source import StagedKv
from streamfill.messages.common import Finish, FinishReason, Sampling, TokenLogprob
from streamfill.stream.prefix_blocks import BlockKey
from streamfill.stream.prefix_blocks import block_keys as prefix_block_keys
from tests.support.fake_cache import CachedPage, FakeCache

VOCAB_SIZE = 1000
KV_BYTES_PER_TOKEN = 4


def next_token(token_ids: Sequence[int]) -> int:
    """What the fake model says behind ``token_ids``."""
    return zlib.crc32(array("q", token_ids).tobytes()) % VOCAB_SIZE


def predict(prompt_ids: Sequence[int], sampling: Sampling, eos: frozenset[int]) -> list[int]:
    """The whole answer to a prompt."""
    answer: list[int] = []
    while len(answer) < sampling.max_new_tokens:
        answer.append(next_token([*prompt_ids, *answer]))
        if _is_stop(answer[-1], sampling, eos):
            break
    return answer


def kv_bytes(token_ids: Sequence[int]) -> bytes:
    """KV of a prefix: four bytes per token that depend on all tokens up to it."""
    digest = 0
    out = bytearray()
    for token_id in token_ids:
        digest = zlib.crc32(token_id.to_bytes(8, "little"), digest)
        out += digest.to_bytes(4, "little")
    return bytes(out)


@dataclass(eq=False)
class _Request:
    key: str
    stream_id: int
    prompt_ids: array[int]
    output_ids: array[int]
    sampling: Sampling | None
    """None: a segment."""
    namespace: str
    num_seen: int = 0
    """Output tokens that were polled or brought along."""
    is_running: bool = False
    is_computed: bool = False
    """Its prompt is in the cache."""
    to_abort: bool = False
    finish: Finish | None = None
    num_cached_tokens: int = 0
    locked: list[CachedPage] = field(default_factory=list)
    num_own_pages: int = 0
    """Taken from the pool and not in the cache."""

    @property
    def all_ids(self) -> array[int]:
        return self.prompt_ids + self.output_ids

    @property
    def num_tokens_left(self) -> int:
        if self.sampling is None:
            return 0
        return max(0, self.sampling.max_new_tokens - len(self.output_ids))


class FakeEngine:
    """Fake of ``engine.interface.Engine``."""

    def __init__(
        self,
        *,
        pool_tokens: int = 4096,
        page_size: int = 1,
        max_requests: int = 16,
        eos_token_ids: frozenset[int] = frozenset(),
        staging_limit_bytes: int = 1 << 20,
        host_tokens: int = 0,
    ) -> None:
        self._facts = EngineFacts(
            vocab_size=VOCAB_SIZE,
            context_tokens=pool_tokens,
            pool_tokens=pool_tokens - 2 * page_size,
            page_size=page_size,
            max_requests=max_requests,
            eos_token_ids=eos_token_ids,
        )
        self.cache = FakeCache(page_size)
        self.num_pool_pages = pool_tokens // page_size
        self.num_forward_passes = 0
        self.largest_batch = 0
        self.may_interrupt = False
        self._interrupted: frozenset[str] = frozenset()
        self.started: list[tuple[str, int, int]] = []
        """(kind, stream id, tokens) of every request, in order."""
        self._requests: dict[str, _Request] = {}
        self._queue: list[_Request] = []
        self._staging_limit_bytes = staging_limit_bytes
        self._staged: dict[int, int] = {}
        self.host = HostIndex(host_tokens // page_size)
        self.num_restored_tokens = 0
        self.restore_s = 1e-4
        self._to_save: frozenset[int] = frozenset()
        self._losers: set[int] = set()
        self._copies: list[CopyReport] = []
        self.cache.on_evict = self._on_evict
        self._block_tokens = 0
        self._told: set[BlockKey] = set()
        self._was_flushed = False

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    @property
    def num_evicted_tokens(self) -> int:
        return self.cache.num_evicted_tokens

    @property
    def staging_bytes(self) -> int:
        """Exported and not released."""
        return sum(self._staged.values())

    # Requests

    def start_segment(
        self, key: str, stream_id: int, token_ids: array[int], *, namespace: str
    ) -> None:
        request = _Request(key, stream_id, token_ids[:], array("q"), None, namespace)
        self._start(request, "segment")

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
        assert len(prompt_ids), "an answer to nothing"
        brought = array("q", output_ids)
        request = _Request(
            key, stream_id, prompt_ids[:], brought, sampling, namespace, len(brought)
        )
        self._start(request, "answer")

    def allow_interrupts(self, allowed: bool) -> None:
        self.may_interrupt = allowed

    def abort(self, key: str) -> None:
        request = self._requests.get(key)
        if request is None or request.finish is not None:
            return
        if request.is_running:
            request.to_abort = True
            return
        self._queue.remove(request)
        request.finish = Finish(reason=FinishReason.ABORT, message="aborted")

    def fail(self, key: str, message: str) -> None:
        """For tests: the engine gives a waiting request up by itself."""
        self.abort(key)
        self._requests[key].finish = Finish(reason=FinishReason.ABORT, message=message)

    def waiting_keys_in_order(self) -> list[str]:
        """For tests."""
        return [request.key for request in self._queue]

    def poll(self) -> list[RequestUpdate]:
        updates: list[RequestUpdate] = []
        for request in list(self._requests.values()):
            new_ids = tuple(request.output_ids[request.num_seen :])
            if not new_ids and request.finish is None:
                continue
            request.num_seen += len(new_ids)
            if request.finish is not None:
                del self._requests[request.key]
            wants_logprobs = (
                request.sampling is not None and request.sampling.num_logprobs is not None
            )
            updates.append(
                RequestUpdate(
                    key=request.key,
                    token_ids=new_ids,
                    logprobs=tuple(
                        TokenLogprob(token_id=token_id, logprob=-0.5) for token_id in new_ids
                    )
                    if wants_logprobs
                    else (),
                    finish=request.finish,
                    num_cached_tokens=request.num_cached_tokens,
                )
            )
        return updates

    def begin(self) -> None:
        """What waits starts to compute, and is interrupted between two layers until ``go_on``:
        other forward passes come first."""
        self._admit()
        self._interrupted = frozenset(
            request.key for request in self._requests.values() if request.is_running
        )

    def go_on(self) -> None:
        """What was interrupted ends with the next forward pass."""
        self._interrupted = frozenset()

    def advance(self) -> None:
        """One forward pass over everything that fits."""
        self._admit()
        batch = [
            request
            for request in self._requests.values()
            if request.is_running and request.key not in self._interrupted
        ]
        self.num_forward_passes += bool(batch)
        self.largest_batch = max(self.largest_batch, len(batch))
        for request in batch:
            self._compute(request)
        self.check()

    # Cache

    def cached_tokens(self, token_ids: array[int], *, namespace: str) -> int:
        return len(self.cache.match(token_ids, namespace)) * self.facts.page_size

    def tag(self, stream_id: int, token_ids: array[int], *, namespace: str) -> int:
        num_shared = 0
        for page in self.cache.match(token_ids, namespace):
            page.streams.add(stream_id)
            num_shared += self.facts.page_size if len(page.streams) > 1 else 0
        return num_shared

    def untag(self, stream_id: int, token_ids: array[int], *, namespace: str) -> None:
        for page in self.cache.match(token_ids, namespace):
            page.streams.discard(stream_id)

    def set_victim_order(
        self, ranks: Mapping[int, int], to_save: frozenset[int] = frozenset()
    ) -> None:
        self.cache.ranks = dict(ranks)
        self._to_save = to_save

    # Host memory

    def host_tokens(self, token_ids: array[int], num_resident: int, *, namespace: str) -> int:
        page_size = self.facts.page_size
        keys = block_keys(token_ids, page_size, namespace)[num_resident // page_size :]
        return self.host.num_present(keys) * page_size

    def copy_ahead(self, token_ids: array[int], *, namespace: str) -> int:
        page_size = self.facts.page_size
        num_cached = self.cached_tokens(token_ids, namespace=namespace)
        keys = block_keys(token_ids[:num_cached], page_size, namespace)
        self._copied(True, len(self.host.put(keys, is_resident=True)))
        return self.host.num_present(keys) * page_size

    def restore(self, token_ids: array[int], *, namespace: str) -> int:
        page_size = self.facts.page_size
        cached = self.cache.match(token_ids, namespace)
        keys = block_keys(token_ids, page_size, namespace)[len(cached) :]
        keys = keys[: self.host.num_present(keys)]
        self.host.touch(keys)
        self.cache.lock(cached)
        fits = self._take(len(keys))
        self.cache.unlock(cached)
        num_pages = len(cached)
        if fits:
            keys = keys[: self.host.num_present(keys)]
            num_pages += len(self.host.find(keys))
            self._copied(False, num_pages - len(cached))
            self.num_restored_tokens += (num_pages - len(cached)) * page_size
            self.cache.insert(token_ids[: num_pages * page_size], namespace)
        self.check()
        return num_pages * page_size

    def release_host(
        self, token_ids: array[int] | None, first_token: int, *, namespace: str
    ) -> None:
        page_size = self.facts.page_size
        if token_ids is None:
            self.host.demote(None)
            return
        keys = block_keys(token_ids, page_size, namespace)
        self.host.demote(keys[-(-first_token // page_size) :])

    def host_room(self) -> HostRoom:
        page_size = self.facts.page_size
        return HostRoom(
            num_tokens=self.host.num_blocks * page_size,
            num_free_tokens=self.host.num_spare * page_size,
            bytes_per_token=KV_BYTES_PER_TOKEN,
        )

    def poll_copies(self) -> list[CopyReport]:
        copies, self._copies = self._copies, []
        return copies

    def take_losers(self) -> frozenset[int]:
        losers, self._losers = frozenset(self._losers), set()
        return losers

    def _on_evict(self, page: CachedPage) -> None:
        self._losers |= page.streams
        if not page.streams.isdisjoint(self._to_save):
            path: list[int] = []
            node = page
            while node.parent is not None:
                path[:0] = node.tokens
                node = node.parent
            keys = block_keys(array("q", path), self.facts.page_size, node.namespace)
            self._copied(True, len(self.host.put(keys[-1:])))

    def _copied(self, out: bool, num_pages: int) -> None:
        if num_pages:
            num_bytes = num_pages * self.facts.page_size * KV_BYTES_PER_TOKEN
            self._copies.append(CopyReport(out, num_bytes, 1e-4))

    # Blocks

    def watch_blocks(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._told = set(self.held_blocks())

    def take_blocks(self) -> BlockChanges:
        held = set(self.held_blocks())
        told, self._told = self._told, held
        cleared, self._was_flushed = self._was_flushed, False
        if cleared:
            return BlockChanges(True, sorted(held), [])
        return BlockChanges(False, sorted(held - told), sorted(told - held))

    def held_blocks(self) -> list[BlockKey]:
        if not self._block_tokens:
            return []
        return list(
            dict.fromkeys(
                key
                for path in self.cache.all_paths()
                for key in prefix_block_keys(path, self._block_tokens)
            )
        )

    @property
    def num_held_blocks(self) -> int:
        return len(self.held_blocks())

    def memory(self) -> Memory:
        page_size = self.facts.page_size
        return Memory(
            free_tokens=self._num_free_pages * page_size,
            evictable_tokens=(self.cache.num_pages - self.cache.num_locked_pages) * page_size,
            total_tokens=self.num_pool_pages * page_size,
        )

    def load(self) -> Load:
        num_running = sum(request.is_running for request in self._requests.values())
        return Load(
            num_waiting=len(self._queue),
            num_running=num_running,
            num_free_slots=self.facts.max_requests - num_running,
            num_total_slots=self.facts.max_requests,
        )

    def waiting_keys(self) -> frozenset[str]:
        return frozenset(request.key for request in self._queue)

    def flush(self) -> bool:
        if any(request.is_running for request in self._requests.values()) or self._queue:
            return False
        self.cache.clear()
        self.host.clear()
        self._was_flushed = True
        return True

    def evict(self, num_tokens: int) -> None:
        """For tests: take this much KV away, in the victim order."""
        self.cache.evict(num_tokens // self.facts.page_size)

    # KV

    def export_kv(
        self, token_ids: array[int], first_token: int = 0, *, namespace: str
    ) -> ExportedKv | None:
        num_tokens = self.cached_tokens(token_ids, namespace=namespace)
        num_bytes = (num_tokens - first_token) * KV_BYTES_PER_TOKEN
        if num_bytes <= 0 or self.staging_bytes + num_bytes > self._staging_limit_bytes:
            return None
        content = bytearray(kv_bytes(token_ids[:num_tokens])[first_token * KV_BYTES_PER_TOKEN :])
        exported = ExportedKv(
            first_token=first_token,
            num_tokens=num_tokens,
            kv=StagedKv(torch.frombuffer(content, dtype=torch.uint8)),
        )
        self._staged[id(exported)] = num_bytes
        return exported

    def release_export(self, exported: ExportedKv) -> None:
        del self._staged[id(exported)]  # KeyError: given back twice

    @property
    def num_lent(self) -> int:
        return 0  # what is exported is a copy

    def import_kv(self, incoming: IncomingTransfer) -> int:
        expected = kv_bytes(incoming.token_ids)[incoming.first_token * KV_BYTES_PER_TOKEN :]
        assert bytes(incoming.staging.numpy()) == expected, "KV of other tokens"
        cached = self.cache.match(incoming.token_ids, incoming.namespace)
        num_cached = len(cached) * self.facts.page_size
        if num_cached < incoming.first_token:
            return num_cached
        self.cache.lock(cached)
        num_pages = len(incoming.token_ids) // self.facts.page_size - len(cached)
        fits = self._take(num_pages)
        self.cache.unlock(cached)
        if not fits:
            return num_cached
        self.cache.insert(incoming.token_ids, incoming.namespace)
        self.check()
        return len(incoming.token_ids)

    def check(self) -> None:
        """Memory is never given out twice, and no count is lost."""
        assert self._num_free_pages >= 0
        assert self.cache.num_pages == sum(1 for _ in self.cache.all_pages())
        assert self.cache.num_locked_pages == sum(
            page.num_locks > 0 for page in self.cache.all_pages()
        )
        assert sum(r.is_running for r in self._requests.values()) <= self.facts.max_requests

    # Inside

    @property
    def _num_free_pages(self) -> int:
        own = sum(request.num_own_pages for request in self._requests.values())
        return self.num_pool_pages - own - self.cache.num_pages

    def _start(self, request: _Request, kind: str) -> None:
        assert request.key not in self._requests, "a key is used twice"
        assert len(request.all_ids) <= self.facts.context_tokens
        self.started.append((kind, request.stream_id, len(request.all_ids)))
        self._requests[request.key] = request
        self._queue.append(request)

    def _take(self, num_pages: int) -> bool:
        """Make room for pages, by eviction if need be; takes nothing yet."""
        missing = num_pages - self._num_free_pages
        if missing > self.cache.num_pages - self.cache.num_locked_pages:
            return False
        if missing > 0:
            self.cache.evict(missing)
        return True

    def _admit(self) -> None:
        num_running = sum(request.is_running for request in self._requests.values())
        while self._queue and num_running < self.facts.max_requests:
            request = self._queue[0]
            ids, page_size = request.all_ids, self.facts.page_size
            # An answer needs the logits of the last token, so that is computed in any case.
            end = len(ids) - (request.sampling is not None)
            cached = self.cache.match(ids[:end], request.namespace)
            self.cache.lock(cached)
            num_pages = -(-(len(ids) + request.num_tokens_left) // page_size) - len(cached)
            if not self._take(num_pages):
                self.cache.unlock(cached)
                return
            self._queue.pop(0)
            num_running += 1
            request.is_running = True
            request.locked = cached
            request.num_own_pages = num_pages
            request.num_cached_tokens = len(cached) * page_size

    def _compute(self, request: _Request) -> None:
        if not request.is_computed:
            request.is_computed = True
            self._absorb(request, request.all_ids)
        if request.to_abort:
            request.finish = Finish(reason=FinishReason.ABORT, message="aborted")
        elif request.sampling is None:
            request.finish = Finish(reason=FinishReason.LENGTH)
        else:
            request.output_ids.append(next_token(request.all_ids))
            request.finish = self._finish_of(request, request.sampling)
        if request.finish is not None:
            self._absorb(request, request.all_ids[:-1] if request.sampling else request.all_ids)
            self.cache.unlock(request.locked)
            request.locked = []
            request.num_own_pages = 0
            request.is_running = False

    def _absorb(self, request: _Request, token_ids: array[int]) -> None:
        """What the request computed goes into the cache; what is there already is given back."""
        num_covered = len(request.locked)
        pages = self.cache.insert(token_ids, request.namespace)
        self.cache.lock(pages)
        self.cache.unlock(request.locked)
        request.locked = pages
        request.num_own_pages -= len(pages) - num_covered
        assert request.num_own_pages >= 0

    def _finish_of(self, request: _Request, sampling: Sampling) -> Finish | None:
        if len(request.output_ids) >= sampling.max_new_tokens:
            return Finish(reason=FinishReason.LENGTH)
        token_id = request.output_ids[-1]
        if _is_stop(token_id, sampling, self.facts.eos_token_ids):
            return Finish(reason=FinishReason.STOP, matched_token_id=token_id)
        return None


def _is_stop(token_id: int, sampling: Sampling, eos: frozenset[int]) -> bool:
    return not sampling.ignore_eos and (token_id in eos or token_id in sampling.stop_token_ids)
