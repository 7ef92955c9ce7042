"""Two processes on one GPU: KV goes through a ring in its memory.

They need a GPU, torch, pyzmq and msgspec: ``pytest -m gpu tests/unit/kv_transfer``.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch

from streamfill.kv_transfer.interface import TransferStatus
from streamfill.kv_transfer.rings import CudaRuntime
from streamfill.kv_transfer.sender import KvSender
from tests.unit.kv_transfer.test_nccl import (
    PATIENCE_S,
    TIMEOUTS,
    WIDE,
    Peer,
    deliver,
    on_gpu,
    outcome_of,
    receiver_gpu,
    sender_gpu,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand"),
    pytest.mark.skipif(torch.cuda.device_count() > 1, reason="the peer has a GPU of its own"),
]
NUM_BYTES = 1 << 24


@pytest.fixture
def peers() -> Iterator[list[Peer]]:
    started: list[Peer] = []
    yield started
    for peer in started:
        peer.stop()


@pytest.fixture
def sender() -> Iterator[KvSender]:
    assert sender_gpu() == receiver_gpu()
    endpoint = KvSender("p0", WIDE, device=sender_gpu(), timeouts=TIMEOUTS)
    yield endpoint
    endpoint.close()


def test_bytes_arrive_as_they_were_sent(sender: KvSender, peers: list[Peer]) -> None:
    """Of any number, also of several times the ring."""
    peers.append(Peer())
    rand = random.Random(0)
    for number in range(20):
        deliver(sender, peers[0], on_gpu(number, rand.choice([1, 15, 16, 17, 500, 2_000])))
    assert sender.stats().num_sessions == sender.stats().num_shared == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_that_vanishes(sender: KvSender, peers: list[Peer], how: signal.Signals) -> None:
    """The next transfer fails in time, and a new process gets the one after it."""
    peers.append(Peer())
    deliver(sender, peers[0], on_gpu(1, 100))
    peers[0].signal(how)
    sender.submit(peers[0].address, on_gpu(2, 100))
    assert outcome_of(sender).status is TransferStatus.FAILED
    peers[0].signal(signal.SIGKILL)
    peers.append(Peer())
    deliver(sender, peers[1], on_gpu(3, 100))
    assert torch.ones(10, device=sender_gpu()).sum().item() == 10  # the device is not poisoned


def test_senders_come_and_go(peers: list[Peer]) -> None:
    """Each gives its ring back while the receiver may still have it mapped."""
    peers.append(Peer())
    used_bytes = []
    for incarnation in range(5):
        sender = KvSender(
            "p0", WIDE, device=sender_gpu(), timeouts=TIMEOUTS, incarnation=incarnation
        )
        deliver(sender, peers[0], on_gpu(incarnation, 2_000))
        assert sender.stats().num_shared == 1
        sender.close()
        free_bytes, all_bytes = torch.cuda.mem_get_info(sender_gpu())
        used_bytes.append(all_bytes - free_bytes)
    assert used_bytes[-1] <= used_bytes[1] + NUM_BYTES


def _lend(pipe: Connection) -> None:
    """The other process: lends memory, and waits for its end."""
    runtime = CudaRuntime(sender_gpu())
    address = runtime.allocate(NUM_BYTES)
    pipe.send(runtime.handle_of(address))
    if pipe.recv() == "free":
        runtime.free(address)
        pipe.send("freed")
    pipe.recv()


@pytest.mark.parametrize("end", ["free", "kill"])
def test_memory_that_its_owner_gave_up_can_be_read(end: str) -> None:
    """Whatever is in it; a receiver that reads a moment too long does not lose its GPU."""
    spawn = multiprocessing.get_context("spawn")
    pipe, theirs = spawn.Pipe()
    owner = spawn.Process(target=_lend, args=(theirs,), daemon=True)
    owner.start()
    try:
        assert pipe.poll(PATIENCE_S)
        runtime = CudaRuntime(receiver_gpu())
        address = runtime.open(pipe.recv())
        if end == "free":
            pipe.send("free")
            assert pipe.poll(PATIENCE_S)
            pipe.recv()
        else:
            owner.kill()
            owner.join(PATIENCE_S)
        memory = runtime.bytes_at(address, NUM_BYTES)
        copy = memory.clone()
        torch.cuda.synchronize(receiver_gpu())
        assert copy.numel() == NUM_BYTES
        del memory
        runtime.close(address)
        assert torch.ones(10, device=receiver_gpu()).sum().item() == 10
    finally:
        owner.kill()
        owner.join(PATIENCE_S)
