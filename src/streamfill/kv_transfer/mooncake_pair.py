"""Two processes that hand KV over by Mooncake's transfer engine as SGLang 0.5.16 drives it.

``python -m streamfill.kv_transfer.mooncake_pair`` is run by `bench_mooncake` in an environment that
has ``mooncake``. It reads a `PairRequest` as JSON from its standard input and prints ``RESULT`` and
a `PairResult`, or ``error:`` and a reason.

What SGLang's ``MooncakeKVManager`` does, and this does:

1. Each side registers the tensors of all layers with its engine once, keys first, then values.
2. A chunk of a prompt goes to one worker thread, always the same for a destination.
3. The worker joins pages that follow each other on both sides, writes one operation for each such
   run and tensor, and hands all of them over in one ``batch_transfer_sync_write``. It has an
   executor for one call per layer, and uses it only with a memory pool of its own.

One thing differs. The engine's default queue takes some 2,050 operations and refuses the batch that
has more; SGLang's request then fails. To have a figure for such prompts they go in several calls.
"""

from __future__ import annotations

import importlib
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from streamfill.errors import StreamfillError, TransportError
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.page_runs import pages_of, runs_in_both

RESULT_PREFIX: Final = "RESULT "
ERROR_PREFIX: Final = "error: "
QUEUE_OPERATIONS: Final = 2048
"""What the engine takes at once: by default 1,024 queued and 1,024 pending, plus one per lane."""

_HOST: Final = "127.0.0.1"
_WAIT_S: Final = 120.0
"""Of either process for the other, which imports torch, fills a pool or compares it."""


class PairRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One table of pages, transferred several times."""

    layout: KvLayout
    num_slots: int
    """Of the pool on either side."""
    source_slots: list[int]
    destination_slots: list[int]
    repeats: int
    """Timed transfers, after one that is not."""
    operations_per_call: int | None = QUEUE_OPERATIONS
    """None: all in one call, as SGLang does it, whether the engine takes them or not."""


class PairResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured. The bytes that arrived were compared."""

    seconds: list[float]
    """Of each timed transfer, from the chunk's hand-over to the worker to its end."""
    engine_seconds: list[float]
    """The engine's part; the rest is making the list of operations."""
    num_runs: int
    """Runs of pages that follow each other on both sides."""
    num_operations: int
    num_calls: int
    """More than 1: SGLang's one call would be refused."""


def block_operations(
    layout: KvLayout,
    source_slots: Sequence[int],
    destination_slots: Sequence[int],
    source_addresses: Sequence[int],
    destination_addresses: Sequence[int],
) -> tuple[list[int], list[int], list[int]]:
    """The engine's operations: addresses to read, addresses to write, lengths in bytes.

    Addresses are those of the pools' tensors, keys of all layers first.
    """
    size = layout.page_size
    runs = runs_in_both(pages_of(source_slots, size), pages_of(destination_slots, size))
    sources: list[int] = []
    destinations: list[int] = []
    lengths: list[int] = []
    for source, destination, row_bytes in zip(
        source_addresses, destination_addresses, _row_bytes(layout), strict=True
    ):
        page_bytes = size * row_bytes
        for run in runs:
            sources.append(source + run.source * page_bytes)
            destinations.append(destination + run.destination * page_bytes)
            lengths.append(run.num_pages * page_bytes)
    return sources, destinations, lengths


def main() -> int:
    """The exit code: 2 when it could not be measured."""
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=PairRequest)
    try:
        result = _measure(request)
    except (StreamfillError, ValueError) as error:
        print(f"{ERROR_PREFIX}{error}")
        return 2
    print(RESULT_PREFIX + msgspec.json.encode(result).decode())
    return 0


def _measure(request: PairRequest) -> PairResult:
    torch.set_num_threads(1)
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    child = spawn.Process(target=_receive, args=(theirs, request), daemon=True)
    child.start()
    theirs.close()
    layout = request.layout
    pool = [source_tensor(request, index) for index in range(2 * layout.num_layers)]
    engine, _ = _engine(pool)
    session_id, addresses = _word(pipe)
    own_addresses = [tensor.data_ptr() for tensor in pool]
    seconds: list[float] = []
    engine_seconds: list[float] = []

    def send_chunk() -> int:
        operations = block_operations(
            layout,
            request.source_slots,
            request.destination_slots,
            own_addresses,
            addresses,
        )
        begun_s = time.perf_counter()
        at_once = request.operations_per_call or len(operations[0])
        for first in range(0, len(operations[0]), at_once):
            part = [column[first : first + at_once] for column in operations]
            if code := engine.batch_transfer_sync_write(session_id, *part):
                raise TransportError(
                    f"Mooncake refused {len(part[0])} operations in one call (code {code})"
                )
        engine_seconds.append(time.perf_counter() - begun_s)
        return len(operations[0])

    with ThreadPoolExecutor(1) as worker:
        for repeat in range(request.repeats + 1):
            begun_s = time.perf_counter()
            num_operations = worker.submit(send_chunk).result()
            seconds.append(time.perf_counter() - begun_s)
            if repeat in (0, request.repeats):
                pipe.send("compare")
                if problem := _word(pipe):
                    raise TransportError(f"Mooncake: {problem}")
    pipe.close()
    child.join(_WAIT_S)
    return PairResult(
        seconds=seconds[1:],
        engine_seconds=engine_seconds[1:],
        num_runs=num_operations // len(pool),
        num_operations=num_operations,
        num_calls=-(-num_operations // (request.operations_per_call or num_operations)),
    )


def _receive(pipe: Connection, request: PairRequest) -> None:
    """The other process; ends when the first one closes the pipe or ends."""
    torch.set_num_threads(1)
    pool = [
        torch.zeros(request.num_slots, row_bytes, dtype=torch.uint8)
        for row_bytes in _row_bytes(request.layout)
    ]
    _engine_kept, session_id = _engine(pool)
    pipe.send((session_id, [tensor.data_ptr() for tensor in pool]))
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        pipe.send(arrival_problem(request, pool))


def arrival_problem(request: PairRequest, pool: list[Tensor]) -> str | None:
    """What is wrong with the bytes that arrived; clears them."""
    source, destination = map(torch.tensor, (request.source_slots, request.destination_slots))
    for index, tensor in enumerate(pool):
        if not torch.equal(tensor[destination], source_tensor(request, index)[source]):
            return f"tensor {index} of {len(pool)} did not arrive as it was sent"
        tensor[destination] = 0
        if tensor.any():
            return f"tensor {index} of {len(pool)} was written to where nothing was sent"
    return None


def source_tensor(request: PairRequest, index: int) -> Tensor:
    """Tensor ``index`` of the source's pool, the same in both processes: uint8 [num_slots, bytes of
    a row], which is the memory of SGLang's [num_slots, num_kv_heads, dim]."""
    row_bytes = _row_bytes(request.layout)[index]
    num_bytes = request.num_slots * row_bytes
    words = torch.empty(-(-num_bytes // 8), dtype=torch.int64)
    words.random_(generator=torch.Generator().manual_seed(index))
    return words.view(torch.uint8)[:num_bytes].view(request.num_slots, row_bytes)


def _row_bytes(layout: KvLayout) -> list[int]:
    """Of each tensor of a pool, keys of all layers first."""
    k_bytes, v_bytes = (
        layout.num_kv_heads * dim * layout.item_bytes
        for dim in (layout.head_dim, layout.v_head_dim)
    )
    return [k_bytes] * layout.num_layers + [v_bytes] * layout.num_layers


def _engine(pool: list[Tensor]) -> tuple[Any, str]:
    """An engine that knows the pool, and the name under which others reach it."""
    try:
        engine = importlib.import_module("mooncake.engine").TransferEngine()
    except ImportError as error:
        raise TransportError(f"mooncake.engine cannot be imported: {error}") from error
    if code := engine.initialize(_HOST, "P2PHANDSHAKE", "tcp", ""):
        raise TransportError(f"Mooncake's engine does not start over TCP (code {code})")
    addresses = [tensor.data_ptr() for tensor in pool]
    if code := engine.batch_register_memory(addresses, [tensor.nbytes for tensor in pool]):
        raise TransportError(f"Mooncake does not register {len(pool)} tensors (code {code})")
    return engine, f"{_HOST}:{engine.get_rpc_port()}"


def _word(pipe: Connection) -> Any:
    """What the other process says next."""
    try:
        if pipe.poll(_WAIT_S):
            return pipe.recv()
    except EOFError as error:
        raise TransportError("the receiving process ended") from error
    raise TransportError(f"the receiving process said nothing for {_WAIT_S:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
