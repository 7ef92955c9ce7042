"""``Engine`` on top of SGLang's scheduler, called from inside the scheduler's own loop.

Depends on ``managers.scheduler.Scheduler`` (``handle_generate_request``, ``abort_request``,
``waiting_queue``, ``running_batch``, ``flush_cache``, ``max_total_num_tokens``),
``managers.io_struct`` (``TokenizedGenerateReqInput``, ``AbortReq``), ``managers.schedule_batch``
(``Req`` with its ``to_finish``, the ``FINISH_*`` reasons) and
``sampling.sampling_params.SamplingParams``.

Life of a request: ``start_*`` builds SGLang's request and puts it into the waiting queue → SGLang
runs it → ``poll`` reads its outputs off the ``Req`` object → the poll after its end reports
``finish`` and forgets it. A request that SGLang drops without finishing it (an abort while it
waits, a retraction that found no room) is reported by ``on_abort``.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.io_struct import AbortReq, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH, FINISH_MATCHED_TOKEN
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams

from streamfill.engine.exports import KvExports
from streamfill.engine.interface import (
    BlockChanges,
    BlockSwap,
    CopyReport,
    EngineFacts,
    ExportedKv,
    HostRoom,
    Load,
    Memory,
    RequestUpdate,
)
from streamfill.engine.interrupts import layer_breaks
from streamfill.engine.radix import KvPool, StreamRadixCache, extra_key
from streamfill.engine.tree_blocks import TreeBlocks
from streamfill.kv_transfer.interface import IncomingTransfer
from streamfill.messages.common import Finish, FinishReason, Sampling, TokenLogprob
from streamfill.stream.prefix_blocks import BlockKey


class _EosOnly:
    """Stands for the tokenizer where SGLang's min-new-tokens penalizer asks for the ids that end an
    answer. It asks every request of a batch, those without a minimum too."""

    def __init__(self, eos_token_ids: frozenset[int], vocab_size: int) -> None:
        self.additional_stop_token_ids = set(eos_token_ids)
        # SGLang wants one in any case; the id behind the vocabulary is its own padding there.
        self.eos_token_id = min(eos_token_ids, default=vocab_size)


@dataclass
class _Running:
    """A request that SGLang has and that is not over."""

    request: Any
    is_segment: bool
    num_seen: int
    """Output tokens reported, those it brought along included."""
    num_brought: int
    aborted: str | None = field(default=None)


class SchedulerEngine:
    """SGLang's scheduler as an ``Engine``."""

    def __init__(self, scheduler: Any, staging_limit_bytes: int) -> None:
        self._scheduler = scheduler
        self._tree: StreamRadixCache = scheduler.tree_cache
        self._allocator = scheduler.token_to_kv_pool_allocator
        self._running: dict[str, _Running] = {}
        self.kv_pool = KvPool(self._tree, self._allocator)
        self._exports = KvExports(
            self.kv_pool, self._tree, staging_limit_bytes, may_lock=scheduler.ps.tp_size == 1
        )
        self.num_model_kv_heads: int = scheduler.model_config.get_total_num_kv_heads()
        """Of all tensor-parallel ranks together, copies not counted."""
        self.breaks = layer_breaks(scheduler)
        """Where a step can be interrupted. None: nowhere."""
        page_size = scheduler.page_size
        eos_token_ids = frozenset(scheduler.model_config.hf_eos_token_id or ())
        self._eos_only = _EosOnly(eos_token_ids, scheduler.model_config.vocab_size)
        # validate_input_length would refuse prompts within 6 tokens of the context or the pool,
        # which init_req_max_new_tokens finds room for; the router has promised what the facts below
        # say.
        scheduler.max_req_input_len = scheduler.max_req_len - 1
        self._facts = EngineFacts(
            vocab_size=scheduler.model_config.vocab_size,
            # init_req_max_new_tokens: the last token and the one before it are never given out.
            context_tokens=scheduler.model_config.context_len - 2,
            # The same: it keeps a page and a token free behind the prompt.
            pool_tokens=scheduler.max_total_num_tokens - 3 * page_size - 2,
            page_size=page_size,
            max_requests=scheduler.max_running_requests,
            eos_token_ids=eos_token_ids,
        )

    @property
    def facts(self) -> EngineFacts:
        return self._facts

    @property
    def num_evicted_tokens(self) -> int:
        return self._tree.num_evicted_tokens

    def start_segment(
        self, key: str, stream_id: int, token_ids: array[int], *, namespace: str
    ) -> None:
        del stream_id
        self._start(
            key,
            token_ids,
            (),
            SamplingParams(max_new_tokens=0, temperature=0.0),
            None,
            namespace=namespace,
            is_segment=True,
        )

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
        del stream_id
        params = SamplingParams(
            max_new_tokens=sampling.max_new_tokens,
            min_new_tokens=sampling.min_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            repetition_penalty=sampling.repetition_penalty,
            stop_token_ids=list(sampling.stop_token_ids) or None,
            ignore_eos=sampling.ignore_eos,
            sampling_seed=sampling.seed,
        )
        self._start(
            key,
            prompt_ids,
            output_ids,
            params,
            sampling.num_logprobs,
            namespace=namespace,
            is_segment=False,
        )

    def allow_interrupts(self, allowed: bool) -> None:
        if self.breaks is not None:
            self.breaks.allowed = allowed

    def abort(self, key: str) -> None:
        running = self._running.get(key)
        if running is None:
            return
        self._scheduler.abort_request(AbortReq(rid=key))
        if running.aborted is None and not running.request.finished():
            # In the middle of a step SGLang overlooks the batch that is being computed.
            running.request.to_finish = FINISH_ABORT()

    def on_abort(self, message: AbortReq) -> None:
        """SGLang gave a request up; called from its output channel."""
        running = self._running.get(message.rid)
        if running is not None and running.aborted is None:
            reason: Any = message.finished_reason or {}
            running.aborted = str(reason.get("message") or message.abort_message or "aborted")

    def poll(self) -> list[RequestUpdate]:
        updates: list[RequestUpdate] = []
        for key, running in list(self._running.items()):
            request = running.request
            finish = self._finish_of(running)
            num_total = (
                len(request.output_ids) if request.finished_len is None else request.finished_len
            )
            new_ids: tuple[int, ...] = ()
            logprobs: tuple[TokenLogprob, ...] = ()
            if not running.is_segment and num_total > running.num_seen:
                new_ids = tuple(request.output_ids[running.num_seen : num_total])
                logprobs = self._logprobs(running, running.num_seen, num_total)
                running.num_seen = num_total
            if finish is None and not new_ids:
                continue
            if finish is not None:
                del self._running[key]
            updates.append(
                RequestUpdate(
                    key=key,
                    token_ids=new_ids,
                    logprobs=logprobs,
                    finish=finish,
                    num_cached_tokens=request.cached_tokens,
                )
            )
        return updates

    def cached_tokens(self, token_ids: array[int], *, namespace: str) -> int:
        return self._tree.peek(token_ids, namespace)

    def tag(self, stream_id: int, token_ids: array[int], *, namespace: str) -> int:
        return self._tree.tag(stream_id, token_ids, namespace)

    def untag(self, stream_id: int, token_ids: array[int], *, namespace: str) -> None:
        self._tree.untag(stream_id, token_ids, namespace)

    def attach_swap(self, swap: BlockSwap) -> None:
        """Use host memory for KV that is taken from streams."""
        self._tree.swap = swap

    def set_victim_order(
        self, ranks: Mapping[int, int], to_save: frozenset[int] = frozenset()
    ) -> None:
        self._tree.set_ranks(ranks, to_save)

    def host_tokens(self, token_ids: array[int], num_resident: int, *, namespace: str) -> int:
        return self.kv_pool.host_tokens(token_ids, num_resident, namespace)

    def copy_ahead(self, token_ids: array[int], *, namespace: str) -> int:
        return self.kv_pool.copy_ahead(token_ids, namespace)

    def restore(self, token_ids: array[int], *, namespace: str) -> int:
        return self.kv_pool.restore(token_ids, namespace)

    @property
    def restore_s(self) -> float:
        return self.kv_pool.restore_s

    def release_host(
        self, token_ids: array[int] | None, first_token: int, *, namespace: str
    ) -> None:
        self.kv_pool.release_host(token_ids, first_token, namespace)

    def host_room(self) -> HostRoom:
        swap = self._tree.swap
        bytes_per_token = self.kv_pool.layout.bytes_per_token
        if swap is None:
            return HostRoom(bytes_per_token=bytes_per_token)
        num_blocks, num_free = swap.room()
        return HostRoom(
            num_tokens=num_blocks * swap.block_tokens,
            num_free_tokens=num_free * swap.block_tokens,
            bytes_per_token=bytes_per_token,
        )

    def poll_copies(self) -> Sequence[CopyReport]:
        swap = self._tree.swap
        if swap is None:
            return ()
        restores, copies = self.kv_pool.take_restores(), swap.poll()
        if self.kv_pool.device.type == "cuda":
            return copies  # they went on when the caller no longer waited
        return [*(copy for copy in copies if copy.out), *restores]

    def take_losers(self) -> frozenset[int]:
        return self._tree.take_losers()

    def watch_blocks(self, block_tokens: int) -> None:
        tree = self._tree
        tree.blocks = TreeBlocks(block_tokens, tree.root_node) if block_tokens else None

    def take_blocks(self) -> BlockChanges:
        blocks = self._tree.blocks
        return BlockChanges(False, [], []) if blocks is None else blocks.take()

    def held_blocks(self) -> list[BlockKey]:
        blocks = self._tree.blocks
        return [] if blocks is None else blocks.all(self._tree.root_node)

    @property
    def num_held_blocks(self) -> int:
        blocks, tree = self._tree.blocks, self._tree
        if blocks is None:
            return 0
        return int(tree.evictable_size() + tree.protected_size()) // blocks.block_tokens

    def memory(self) -> Memory:
        return Memory(
            free_tokens=self._allocator.available_size(),
            evictable_tokens=self._tree.evictable_size(),
            total_tokens=self._scheduler.max_total_num_tokens,
        )

    def load(self) -> Load:
        pool = self._scheduler.req_to_token_pool
        num_free = len(pool.free_slots)
        return Load(
            num_waiting=len(self._scheduler.waiting_queue),
            num_running=pool.size - num_free,
            num_free_slots=num_free,
            num_total_slots=pool.size,
        )

    def waiting_keys(self) -> frozenset[str]:
        return frozenset(request.rid for request in self._scheduler.waiting_queue)

    def export_kv(
        self, token_ids: array[int], first_token: int = 0, *, namespace: str
    ) -> ExportedKv | None:
        return self._exports.lend(token_ids, first_token, namespace)

    def release_export(self, exported: ExportedKv) -> None:
        self._exports.take_back(exported)
        # Set when a prompt found no memory, and otherwise reset only when a request ends: with none
        # running it would stay for ever.
        self._scheduler.running_batch.batch_is_full = False

    @property
    def num_lent(self) -> int:
        return len(self._exports)

    def import_kv(self, incoming: IncomingTransfer) -> int:
        return self.kv_pool.import_kv(incoming)

    def flush(self) -> bool:
        if self.num_lent:
            return False  # the transport would read what comes after
        # Not the device allocator's cache: the pool stays, and on a CPU it costs a third of a
        # second.
        is_empty = bool(self._scheduler.flush_cache(empty_cache=False))
        if is_empty and self._tree.swap is not None:
            self._tree.swap.clear()
        return is_empty

    def _start(
        self,
        key: str,
        prompt_ids: array[int],
        output_ids: Sequence[int],
        params: SamplingParams,
        num_logprobs: int | None,
        *,
        namespace: str,
        is_segment: bool,
    ) -> None:
        params.normalize(self._eos_only)  # refuses a minimum of tokens to those without a tokenizer
        scheduler = self._scheduler
        num_waiting = len(scheduler.waiting_queue)
        scheduler.handle_generate_request(
            TokenizedGenerateReqInput(
                rid=key,
                input_text=None,
                input_ids=array("q", prompt_ids),
                input_embeds=None,
                mm_inputs=None,
                token_type_ids=None,
                sampling_params=params,
                return_logprob=num_logprobs is not None,
                logprob_start_len=-1,
                top_logprobs_num=num_logprobs or 0,
                token_ids_logprob=None,
                stream=False,
                extra_key=extra_key(namespace),
                time_stats=APIServerReqTimeStats(),
            )
        )
        if len(scheduler.waiting_queue) != num_waiting + 1:
            raise RuntimeError(f"SGLang did not queue request {key}")
        request = scheduler.waiting_queue[-1]
        request.tokenizer = self._eos_only
        if output_ids and request.to_finish is None:
            request.output_ids = array("q", output_ids)
            if num_logprobs is not None:
                request.logprob_start_len = len(prompt_ids) + len(output_ids)
        if not is_segment:
            self._move_before_segments(request)
        self._running[key] = _Running(
            request, is_segment, len(request.output_ids), len(request.output_ids)
        )

    def _move_before_segments(self, request: Any) -> None:
        """An answer does not wait behind context that nobody asked about yet."""
        queue = self._scheduler.waiting_queue
        queue.pop()
        position = len(queue)
        while position and queue[position - 1].sampling_params.max_new_tokens == 0:
            position -= 1
        queue.insert(position, request)

    def _finish_of(self, running: _Running) -> Finish | None:
        if running.aborted is not None:
            return Finish(reason=FinishReason.ABORT, message=running.aborted)
        match running.request.finished_reason:
            case None:
                return None
            case FINISH_LENGTH():
                return Finish(reason=FinishReason.LENGTH)
            case FINISH_MATCHED_TOKEN(matched=matched):
                token_id = matched[0] if isinstance(matched, list) else matched
                return Finish(reason=FinishReason.STOP, matched_token_id=int(token_id))
            case FINISH_ABORT(message=message):
                return Finish(reason=FinishReason.ABORT, message=str(message or "aborted"))
            case other:
                return Finish(reason=FinishReason.STOP, message=str(other.to_json()))

    @staticmethod
    def _logprobs(running: _Running, start: int, end: int) -> tuple[TokenLogprob, ...]:
        """Of output tokens [start, end), which count those the request brought along; SGLang's
        lists do not."""
        request = running.request
        values = request.logprob.output_token_logprobs_val
        if not request.return_logprob or values is None:
            return ()
        result: list[TokenLogprob] = []
        for index in range(start - running.num_brought, end - running.num_brought):
            top: tuple[tuple[int, float], ...] = ()
            if request.logprob.top_logprobs_num > 0:
                ids = request.logprob.output_top_logprobs_idx[index]
                top = tuple(zip(ids, request.logprob.output_top_logprobs_val[index], strict=True))
            token_id = request.logprob.output_token_logprobs_idx[index]
            result.append(TokenLogprob(token_id=token_id, logprob=values[index], top=top))
        return tuple(result)
