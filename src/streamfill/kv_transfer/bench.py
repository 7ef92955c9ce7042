"""Bandwidth of the transport between two processes over loopback, beside a bare Gloo send.

``python -m streamfill.kv_transfer.bench`` prints one line ``RESULT {…}``. Bandwidths are in GB/s;
``first`` is the first transfer of a size, into memory that was never used, with the set-up of the
group in the very first; ``median`` is of the later ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import select
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch

from streamfill.errors import TransportError
from streamfill.kv_transfer.group import RECEIVER_RANK, SENDER_RANK, PairGroup
from streamfill.kv_transfer.interface import OutgoingTransfer, PeerAddress
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.rendezvous import RendezvousStore
from streamfill.kv_transfer.sender import DEFAULT_CHUNK_BYTES, KvSender
from streamfill.kv_transfer.timeouts import TransportTimeouts

_HOST = "127.0.0.1"
_CPU = torch.device("cpu")
_MEMORY_BYTES = 1 << 30

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

WAIT_S = 60.0
"""Of the measurement for the other process, whose start imports torch."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, prog="streamfill.kv_transfer.bench")
    parser.add_argument("--tokens", type=int, nargs="+", default=[805, 1520])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--chunk-bytes", type=int, default=DEFAULT_CHUNK_BYTES)
    parser.add_argument("--checksum", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    child = spawn.Process(target=_receive, args=(theirs, options.tokens, options.repeats))
    child.start()
    try:
        address = PeerAddress(server_id="d0", host=_HOST, control_port=_word(pipe))
        rows = _measure(pipe, address, options)
        print("RESULT", json.dumps({"chunk_bytes": options.chunk_bytes, "sizes": rows}))
    finally:
        pipe.close()
        child.join(WAIT_S)


def _measure(
    pipe: Connection, address: PeerAddress, options: argparse.Namespace
) -> list[dict[str, float]]:
    sender = KvSender(
        "p0",
        SMOLLM2_135M,
        chunk_bytes=options.chunk_bytes,
        with_checksum=options.checksum,
    )
    bare = _bare_group(pipe, SENDER_RANK)
    rows = []
    for index, num_tokens in enumerate(options.tokens):
        staging = torch.ones(num_tokens * SMOLLM2_135M.bytes_per_token, dtype=torch.uint8)
        transport_s, bare_s = [], []
        for repeat in range(options.repeats):
            begun_s = time.monotonic()
            bare.send(staging)
            _word(pipe)
            bare_s.append(time.monotonic() - begun_s)
            transfer = OutgoingTransfer(
                transfer_id=1000 * index + repeat,
                stream_id=0,
                token_ids=range(num_tokens),
                first_token=0,
                staging=staging,
            )
            begun_s = time.monotonic()
            sender.submit(address, transfer)
            select.select([sender.fileno()], [], [], WAIT_S)
            (outcome,) = sender.poll()
            if not outcome.ok:
                raise TransportError(outcome.reason)
            transport_s.append(time.monotonic() - begun_s)
            _word(pipe)
        giga = staging.numel() / 1e9
        rows.append(
            {
                "megabytes": round(giga * 1000, 1),
                "transport_first": round(giga / transport_s[0], 2),
                "transport_median": round(giga / statistics.median(transport_s[1:]), 2),
                "bare_gloo_first": round(giga / bare_s[0], 2),
                "bare_gloo_median": round(giga / statistics.median(bare_s[1:]), 2),
            }
        )
    bare.close()
    sender.close()
    return rows


def _receive(pipe: Connection, tokens: list[int], repeats: int) -> None:
    """The other process."""
    torch.set_num_threads(1)
    receiver = KvReceiver("d0", SMOLLM2_135M, _HOST, memory_limit_bytes=_MEMORY_BYTES)
    pipe.send(receiver.port)
    bare = _bare_group(pipe, RECEIVER_RANK)
    for num_tokens in tokens:
        into = torch.empty(num_tokens * SMOLLM2_135M.bytes_per_token, dtype=torch.uint8)
        for _ in range(repeats):
            bare.recv(into)
            pipe.send("received")
            while not (arrived := receiver.poll()):
                select.select([receiver.fileno()], [], [], WAIT_S)
            receiver.release(arrived[0])
            pipe.send("released")
    bare.close()
    receiver.close()


def _bare_group(pipe: Connection, rank: int) -> PairGroup:
    """A group between the two processes without a transport around it."""
    store = RendezvousStore(
        publish=lambda key, value: pipe.send((key, value)),
        timeout_s=WAIT_S,
        pump=lambda _: store.put(*_word(pipe)),
    )
    return PairGroup(
        rank=rank, store=store, local_host=_HOST, device=_CPU, timeouts=TransportTimeouts()
    )


def _word(pipe: Connection) -> Any:
    """The next thing that the other process says."""
    if not pipe.poll(WAIT_S):
        raise TransportError(f"the other process said nothing for {WAIT_S} s")
    return pipe.recv()


if __name__ == "__main__":
    main()
