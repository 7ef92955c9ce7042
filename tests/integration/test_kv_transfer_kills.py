"""Either side of a KV transfer is killed at every phase of it, at once or after it hung for long
enough to be given up. The other side is left with nothing, and serves whoever comes back."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import pytest
import torch

from streamfill.kv_transfer.interface import PeerAddress, TransferStatus
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.sender import KvSender
from tests.support.children import child
from tests.support.transfer_phases import Phase, stop_receiver_at, stop_sender_at
from tests.unit.kv_transfer.builders import (
    CALM,
    HOST,
    LAYOUT,
    PATIENCE_S,
    QUICK,
    arrivals_of,
    bytes_of,
    outcomes_of,
    transfer,
    wait_until,
)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.clusters,
    pytest.mark.slow,
    pytest.mark.timeout(120),
]

NUM_TOKENS = 300
CHUNK_BYTES = 4000
"""So that there are several."""
MEMORY_BYTES = 1 << 24
MOST_S = 20.0
"""From the death, or the beginning of a hang, to the survivor's having let go: two of its time-outs
in a row, on a busy machine."""

# Children of a process that has torch already start in no time.
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.support.transfer_phases", "tests.unit.kv_transfer.builders"])

CASES = [
    pytest.param(phase, same_host, id=f"{phase.value}-{'shared memory' if same_host else 'gloo'}")
    for phase in Phase
    for same_host in (True, False)
    if same_host or phase.has_data_path
]
HANGS = pytest.mark.parametrize("hangs", [False, True], ids=["killed", "stopped, then killed"])


class _Told:
    """The child's end of the pipe, written to by several of its threads."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def say(self, *what: Any) -> None:
        with self._lock:
            self._pipe.send(what)

    def phase_is_reached(self) -> None:
        self.say("phase")


def _send(pipe: Connection, port: int, phase: Phase | None, same_host: bool) -> None:
    """Child: sends one transfer after the other, by id, and tells how each ended."""
    torch.set_num_threads(1)
    told = _Told(pipe)
    if phase is not None:
        stop_sender_at(phase, told.phase_is_reached)
    sender = KvSender("p0", LAYOUT, timeouts=CALM, chunk_bytes=CHUNK_BYTES, same_host=same_host)
    address = PeerAddress(server_id="d0", host=HOST, control_port=port)
    while True:
        transfer_id = pipe.recv()
        sender.submit(address, transfer(transfer_id, NUM_TOKENS))
        told.say("ended", outcomes_of(sender)[transfer_id].status.value)


def _receive(pipe: Connection, phase: Phase | None, same_host: bool) -> None:
    """Child: says where it listens, then tells of each arrival."""
    torch.set_num_threads(1)
    told = _Told(pipe)
    if phase is not None:
        stop_receiver_at(phase, told.phase_is_reached)
    receiver = KvReceiver(
        "d0",
        LAYOUT,
        HOST,
        memory_limit_bytes=MEMORY_BYTES,
        timeouts=CALM,
        same_host=same_host,
    )
    told.say("port", receiver.port)
    while True:
        for incoming in arrivals_of(receiver).values():
            told.say("arrived", incoming.transfer_id, bytes(incoming.staging.numpy()))
            receiver.release(incoming)


def _hear(pipe: Connection, what: str) -> Any:
    """The child's next message of this kind; others are passed over."""
    while True:
        assert pipe.poll(PATIENCE_S), f"the child did not say {what!r}"
        kind, *values = pipe.recv()
        if kind == what:
            return values


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    assert process.pid is not None
    os.kill(process.pid, number)


@pytest.mark.parametrize(("phase", "same_host"), CASES)
@HANGS
def test_a_sender_is_killed(phase: Phase, *, same_host: bool, hangs: bool) -> None:
    """The receiver frees its staging and delivers nothing, or all of it; the restarted sender is
    served in a new epoch."""
    receiver = KvReceiver(
        "d0", LAYOUT, HOST, memory_limit_bytes=MEMORY_BYTES, timeouts=QUICK, same_host=same_host
    )
    epochs = []
    try:
        with child(_server, _send, receiver.port, phase, same_host) as (process, pipe):
            pipe.send(1)
            _hear(pipe, "phase")
            _signal(process, signal.SIGSTOP if hangs else signal.SIGKILL)
            begun_s = time.monotonic()
            wait_until(lambda: receiver.stats().num_active == 0)
            arrived = receiver.poll()
            assert len(arrived) == (phase is Phase.COMPLETE)
            for incoming in arrived:
                assert torch.equal(incoming.staging, bytes_of(transfer(1, NUM_TOKENS)))
                epochs.append(incoming.epoch)
                receiver.release(incoming)
            wait_until(lambda: receiver.stats().num_peers == 0)
            assert receiver.stats().staging_used_bytes == 0
            assert time.monotonic() - begun_s < MOST_S
        with child(_server, _send, receiver.port, None, same_host) as (_, pipe):
            pipe.send(2)
            assert _hear(pipe, "ended") == ["delivered"]
        again = arrivals_of(receiver)[2]
        assert torch.equal(again.staging, bytes_of(transfer(2, NUM_TOKENS)))
        assert all(epoch < again.epoch for epoch in epochs)
        receiver.release(again)
        assert receiver.poll() == []
    finally:
        begun_s = time.monotonic()
        receiver.close()
        assert time.monotonic() - begun_s < MOST_S


@pytest.mark.parametrize(("phase", "same_host"), CASES)
@HANGS
def test_a_receiver_is_killed(phase: Phase, *, same_host: bool, hangs: bool) -> None:
    """The transfer fails, once, while a hanging receiver still hangs; the restarted receiver gets
    the next one."""
    sender = KvSender("p0", LAYOUT, timeouts=QUICK, chunk_bytes=CHUNK_BYTES, same_host=same_host)
    try:
        with child(_server, _receive, phase, same_host) as (process, pipe):
            (port,) = _hear(pipe, "port")
            sender.submit(_address(port), transfer(1, NUM_TOKENS))
            _hear(pipe, "phase")
            _signal(process, signal.SIGSTOP if hangs else signal.SIGKILL)
            begun_s = time.monotonic()
            assert outcomes_of(sender)[1].status is TransferStatus.FAILED
            assert time.monotonic() - begun_s < MOST_S
        with child(_server, _receive, None, same_host) as (_, pipe):
            (port,) = _hear(pipe, "port")
            sender.submit(_address(port), transfer(2, NUM_TOKENS))
            assert outcomes_of(sender)[2].ok
            transfer_id, content = _hear(pipe, "arrived")
            assert transfer_id == 2
            assert content == bytes(bytes_of(transfer(2, NUM_TOKENS)).numpy())
        assert sender.poll() == []
        assert sender.stats().num_pending == 0
    finally:
        begun_s = time.monotonic()
        sender.close()
        assert time.monotonic() - begun_s < MOST_S


def _address(port: int) -> PeerAddress:
    return PeerAddress(server_id="d0", host=HOST, control_port=port)
