"""Bandwidth of the transport between two processes of one machine, beside a bare send and a copy.

``python -m streamfill.kv_transfer.bench`` prints one line ``RESULT {…}``. Bandwidths are in GB/s;
``first`` is the first transfer of a size, into memory that was never used, with the set-up of the
group in the very first; ``median`` is of the later ones. On a CPU the KV lies in pages of a pool,
adjacent or scattered, and gathering them counts; what is delivered is in the receiver's staging.
``transport`` and ``bare``, a send of one contiguous tensor, go over loopback, by Gloo on a CPU,
with ``--device cuda`` by NCCL: two ranks on the GPUs of ``--gpus``, which may be one and the same.
``same_host`` is the transport where it shares memory, ``scatter`` the copy from the staging into
pages, which the scheduler's thread makes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import select
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch

from streamfill.errors import TransportError
from streamfill.kv_transfer.group import RECEIVER_RANK, SENDER_RANK, PairGroup, backend_name
from streamfill.kv_transfer.interface import OutgoingTransfer, PeerAddress
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.page_runs import PageOrder, page_table, slots_of
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.rendezvous import RendezvousStore
from streamfill.kv_transfer.sender import DEFAULT_CHUNK_BYTES, KvSender
from streamfill.kv_transfer.shared_buffers import SharedBuffers
from streamfill.kv_transfer.source import KvSource, StagedKv, paged_kv
from streamfill.kv_transfer.staging import scatter
from streamfill.kv_transfer.timeouts import TransportTimeouts

_HOST = "127.0.0.1"
_MEMORY_BYTES = 4 << 30

SMOLLM2_135M = KvLayout(
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    v_head_dim=64,
    dtype="float32",
    item_bytes=4,
    page_size=1,
)
"""46 kB per token."""

LLAMA_8B = KvLayout(
    num_layers=32,
    num_kv_heads=8,
    head_dim=128,
    v_head_dim=128,
    dtype="bfloat16",
    item_bytes=2,
    page_size=1,
)
"""131 kB per token."""

PAGES = tuple(order.value for order in PageOrder)
POOL_SHARE = 2
"""Pages of the pool for each one that is sent."""

LAYOUTS = {"smollm2-135m": SMOLLM2_135M, "llama-8b": LLAMA_8B}

WAIT_S = 60.0
"""Of the measurement for the other process, whose start imports torch."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        prog="streamfill.kv_transfer.bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048, 8192])
    parser.add_argument("--page-size", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--pages", choices=PAGES, nargs="+", default=list(PAGES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--chunk-bytes", type=int, default=DEFAULT_CHUNK_BYTES)
    parser.add_argument("--checksum", action="store_true")
    parser.add_argument("--layout", choices=LAYOUTS, default="smollm2-135m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--gpus", type=int, nargs=2, default=(0, 0), metavar="N", help="sender's and receiver's"
    )
    options = parser.parse_args()
    num_gpus = torch.cuda.device_count()
    if options.device == "cuda" and max(options.gpus) >= num_gpus:
        parser.error(f"--gpus = {options.gpus}: torch finds {num_gpus} GPUs here")
    if min(*options.tokens, *options.page_size) < 1 or options.repeats < 2:
        parser.error("--tokens and --page-size must be at least 1, --repeats at least 2")
    if options.device == "cuda":
        options.page_size, options.pages = [1], ["adjacent"]  # staged before, by another kernel
    torch.set_num_threads(1)
    sender = _device(options.device, options.gpus[0])
    rows = measure(options)
    facts = {
        "backend": backend_name(sender),
        "same_gpu": options.device == "cuda" and options.gpus[0] == options.gpus[1],
        "layout": options.layout,
        "chunk_bytes": options.chunk_bytes,
    }
    print("RESULT", json.dumps({**facts, "sizes": rows}))


def measure(options: argparse.Namespace) -> list[dict[str, float | str]]:
    """One row per number of tokens, page size and kind of pages; the options are those of
    `main`."""
    sender, receiver = (_device(options.device, gpu) for gpu in options.gpus)
    shares_gpu = sender == receiver and sender.type == "cuda"
    if shares_gpu:
        share_one_gpu("sender")
    rows: list[dict[str, float | str]] = []
    spawn = multiprocessing.get_context("spawn")
    for page_size in options.page_size:
        pipe, theirs = spawn.Pipe()
        layout = msgspec.structs.replace(LAYOUTS[options.layout], page_size=page_size)
        child = spawn.Process(target=_receive, args=(theirs, layout, receiver, shares_gpu, options))
        child.start()
        try:
            address = PeerAddress(server_id="d0", host=_HOST, control_port=_word(pipe))
            rows += _measure(pipe, address, layout, sender, options)
        finally:
            pipe.close()
            child.join(WAIT_S)
    return rows


def share_one_gpu(name: str) -> None:
    """Let this process be one of several ranks on one GPU, by a name of its own: NCCL refuses two
    ranks of one host on one device. What tells hosts apart is read at its first use. They then talk
    over TCP, since hosts have no other way."""
    os.environ["NCCL_HOSTID"] = name


def _shares_memory(options: argparse.Namespace) -> bool:
    """Whether both processes can use the same memory."""
    first, second = options.gpus
    return bool(options.device == "cpu" or first == second)


def _device(kind: str, gpu: int) -> torch.device:
    return torch.device(kind, gpu) if kind == "cuda" else torch.device(kind)


def _measure(
    pipe: Connection,
    address: PeerAddress,
    layout: KvLayout,
    device: torch.device,
    options: argparse.Namespace,
) -> list[dict[str, float | str]]:
    sender = KvSender(
        "p0",
        layout,
        device=device,
        chunk_bytes=options.chunk_bytes,
        with_checksum=options.checksum,
        same_host=False,
    )
    bare = _bare_group(pipe, SENDER_RANK, device)
    neighbour = KvSender(
        "p1",
        layout,
        device=device,
        chunk_bytes=options.chunk_bytes,
        with_checksum=options.checksum,
    )
    most_pages = max(-(-num_tokens // layout.page_size) for num_tokens in options.tokens)
    pool = None
    if device.type == "cpu":
        pool = SharedBuffers(layout, (POOL_SHARE * most_pages + 1) * layout.page_size)
        for buffer in (*pool.k_buffers, *pool.v_buffers):
            buffer.fill_(1)
    rows: list[dict[str, float | str]] = []
    transfer_ids = count()

    def deliver(by: KvSender, kv: KvSource) -> None:
        transfer = OutgoingTransfer(
            transfer_id=next(transfer_ids),
            stream_id=0,
            token_ids=range(num_pages * layout.page_size),
            first_token=0,
            kv=kv,
        )
        by.submit(address, transfer)
        select.select([by.fileno()], [], [], WAIT_S)
        (outcome,) = by.poll()
        if not outcome.ok:
            raise TransportError(outcome.reason)

    for num_tokens in options.tokens:
        num_pages = -(-num_tokens // layout.page_size)
        num_bytes = num_pages * layout.page_size * layout.bytes_per_token
        staging = torch.ones(num_bytes, dtype=torch.uint8, device=device)
        copy = torch.zeros_like(staging)
        for kind in options.pages:
            seconds: dict[str, list[float]] = defaultdict(list)
            kv: KvSource = StagedKv(staging)
            if pool is not None:
                slots = torch.tensor(bench_slots(kind, num_pages, layout.page_size, pool.num_slots))
                kv = paged_kv(layout, pool.k_buffers, pool.v_buffers, slots, buffers=pool)
            for _ in range(options.repeats):
                with _timed(seconds["bare"]):
                    bare.send(StagedKv(staging), 0, num_bytes)
                    bare.flush()
                    _expect(pipe, "received")
                with _timed(seconds["transport"]):
                    deliver(sender, kv)
                _expect(pipe, "released")
                if not _shares_memory(options):
                    continue
                with _timed(seconds["same_host"]):
                    deliver(neighbour, kv)
                _expect(pipe, "released")
                with _timed(seconds["memcpy"]):
                    copy.copy_(staging)
                    if staging.is_cuda:
                        torch.cuda.synchronize(device)
                if pool is None:
                    continue
                with _timed(seconds["gather"]):
                    kv.read(0, copy)
                with _timed(seconds["scatter"]):
                    scatter(layout, copy, pool.k_buffers, pool.v_buffers, slots)
            rows.append(
                {
                    "tokens": num_tokens,
                    "page_size": layout.page_size,
                    "pages": kind,
                    **_row(num_bytes, seconds),
                }
            )
    bare.close()
    sender.close()
    neighbour.close()
    return rows


def bench_slots(kind: str, num_pages: int, page_size: int, num_slots: int) -> list[int]:
    """Slots of a prompt's tokens in a pool; the same in every run."""
    table = page_table(
        PageOrder(kind), num_pages, pool_pages=num_slots // page_size, seed=num_pages
    )
    return slots_of(table, page_size)


def _row(num_bytes: int, seconds: dict[str, list[float]]) -> dict[str, float]:
    giga = num_bytes / 1e9
    row = {"megabytes": round(giga * 1000, 1)}
    medians = {what: statistics.median(each_s[1:]) for what, each_s in seconds.items()}
    for what, each_s in seconds.items():
        row[f"{what}_first"] = round(giga / each_s[0], 2)
        row[f"{what}_median"] = round(giga / medians[what], 2)
    row["ratio_to_bare_send"] = round(medians["bare"] / medians["transport"], 2)
    if "same_host" in medians:
        row["ratio_to_memcpy"] = round(medians["memcpy"] / medians["same_host"], 2)
    if "gather" in medians:
        row["gather_ratio_to_memcpy"] = round(medians["memcpy"] / medians["gather"], 2)
        row["scatter_ratio_to_memcpy"] = round(medians["memcpy"] / medians["scatter"], 2)
    return row


@contextlib.contextmanager
def _timed(into: list[float]) -> Iterator[None]:
    begun_s = time.monotonic()
    yield
    into.append(time.monotonic() - begun_s)


def _receive(
    pipe: Connection,
    layout: KvLayout,
    device: torch.device,
    shares_gpu: bool,
    options: argparse.Namespace,
) -> None:
    """The other process."""
    torch.set_num_threads(1)
    if shares_gpu:
        share_one_gpu("receiver")
    receiver = KvReceiver("d0", layout, _HOST, memory_limit_bytes=_MEMORY_BYTES, device=device)
    pipe.send(receiver.port)
    bare = _bare_group(pipe, RECEIVER_RANK, device)
    for num_tokens in options.tokens:
        num_pages = -(-num_tokens // layout.page_size)
        num_bytes = num_pages * layout.page_size * layout.bytes_per_token
        into = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        for _ in range(options.repeats * len(options.pages)):
            bare.recv(into, 0, num_bytes)
            bare.flush()
            pipe.send("received")
            for _ in range(2 if _shares_memory(options) else 1):
                while not (arrived := receiver.poll()):
                    select.select([receiver.fileno()], [], [], WAIT_S)
                receiver.release(arrived[0])
                pipe.send("released")
    bare.close()
    receiver.close()


def _bare_group(pipe: Connection, rank: int, device: torch.device) -> PairGroup:
    """A group between the two processes without a transport around it."""
    store = RendezvousStore(
        publish=lambda key, value: pipe.send((key, value)),
        timeout_s=WAIT_S,
        pump=lambda _: store.put(*_word(pipe)),
    )
    return PairGroup(
        rank=rank, store=store, local_host=_HOST, device=device, timeouts=TransportTimeouts()
    )


def _expect(pipe: Connection, word: str) -> None:
    """Wait for it; what a group's set-up still says is of no use any more."""
    while _word(pipe) != word:
        pass


def _word(pipe: Connection) -> Any:
    """The next thing that the other process says."""
    if not pipe.poll(WAIT_S):
        raise TransportError(f"the other process said nothing for {WAIT_S} s")
    return pipe.recv()


if __name__ == "__main__":
    main()
