"""Bytes that are written, or change, after their transfer was given up reach nobody.

Each scenario fails once its fence is taken away, so it would notice if it were.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from streamfill.kv_transfer.group import Pair, make_pair
from streamfill.kv_transfer.head_copies import layout_of_heads
from streamfill.kv_transfer.interface import OutgoingTransfer, TransferStatus
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.reception_desk import ReceptionDesk
from streamfill.kv_transfer.sender import KvSender
from streamfill.kv_transfer.session_table import SessionTable
from streamfill.kv_transfer.shared_buffers import SharedBuffers
from streamfill.kv_transfer.shared_memory import SharedMemoryPair
from streamfill.kv_transfer.slices import HeadShare
from streamfill.kv_transfer.source import KvSource, paged_kv
from streamfill.kv_transfer.timeouts import TransportTimeouts
from tests.unit.kv_transfer.builders import (
    CALM,
    LAYOUT,
    PATIENCE_S,
    address_of,
    bytes_of,
    outcomes_of,
    transfer,
    wait_until,
)
from tests.unit.kv_transfer.conftest import MakeReceiver, MakeSender

NUM_TOKENS = 100
POISON = 0xEE
PATIENT = dataclasses.replace(CALM, chunk_s=15.0)
"""Lanes wait for a zombie as long as a test needs."""
ZOMBIE = dataclasses.replace(PATIENT, reply_s=2.0)
"""Who is not heard any more does not wait for long."""


class _Hook:
    """A place at which a thread says that it is there, and waits to go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def stop_here(self) -> None:
        self.reached.set()
        assert self.go_on.wait(PATIENCE_S)


class _ZombieKv:
    """KV of a process that hangs: when it goes on, its memory has been used for something else."""

    def __init__(self, content: Tensor, hook: _Hook) -> None:
        self._content = content
        self._hook = hook
        self.num_bytes = content.numel()
        self.cuts = ()

    def piece(self, begin: int, end: int) -> Tensor | None:
        self._use_again()
        return self._content[begin:end]

    def read(self, begin: int, out: Tensor) -> None:
        self._use_again()
        out.copy_(self._content[begin : begin + out.numel()])

    def _use_again(self) -> None:
        self._hook.stop_here()
        self._content.fill_(POISON)


class _HookedPair:
    """A receiver's pair that tells when a chunk is to be received."""

    def __init__(self, pair: Pair, before_recv: Callable[[], None]) -> None:
        self._pair = pair
        self._before_recv = before_recv

    def prepare(self, kv: KvSource, end: int) -> None:
        self._pair.prepare(kv, end)

    def send(self, kv: KvSource, begin: int, end: int) -> None:
        self._pair.send(kv, begin, end)

    def recv(self, into: Tensor, begin: int, end: int, cuts: Sequence[int] = ()) -> None:
        self._before_recv()
        self._pair.recv(into, begin, end, cuts)

    def flush(self, num_left: int = 0) -> None:
        self._pair.flush(num_left)

    def close(self) -> None:
        self._pair.close()


def _hook_pairs(monkeypatch: pytest.MonkeyPatch, before_recv: Callable[[], None]) -> None:
    """Of all receivers."""

    def make(**options: Any) -> Pair:
        return _HookedPair(make_pair(**options), before_recv)

    monkeypatch.setattr("streamfill.kv_transfer.inbound_control.make_pair", make)


def _assert_right(receiver: KvReceiver, contents: dict[int, Tensor]) -> set[int]:
    """Whatever is delivered is what was offered; returns the ids of what was."""
    arrived = receiver.poll()
    ids = [incoming.transfer_id for incoming in arrived]
    wrong = [
        incoming.transfer_id
        for incoming in arrived
        if not torch.equal(incoming.staging, contents[incoming.transfer_id])
    ]
    for incoming in arrived:
        receiver.release(incoming)
    assert not wrong, f"wrong data was delivered under {wrong}"
    assert len(ids) == len(set(ids))
    return set(ids)


def _write_after_being_replaced(
    make_receiver: MakeReceiver,
    make_sender: MakeSender,
    monkeypatch: pytest.MonkeyPatch,
    *,
    same_host: bool,
) -> None:
    """A sender hangs in mid-transfer, is started again, and wakes up when its successor is done."""
    receiving = threading.Event()
    _hook_pairs(monkeypatch, receiving.set)
    receiver = make_receiver(timeouts=PATIENT)
    old, new = (
        make_sender("p0", incarnation=number, timeouts=timeouts, same_host=same_host)
        for number, timeouts in ((1, ZOMBIE), (2, PATIENT))
    )
    zombie = _Hook()
    given, taken = transfer(1, NUM_TOKENS), transfer(2, NUM_TOKENS)
    contents = {1: bytes_of(given), 2: bytes_of(taken)}
    late = dataclasses.replace(given, kv=_ZombieKv(contents[1].clone(), zombie))
    try:
        old.submit(address_of(receiver), late)
        # The lane is beyond its last look at whether it should end.
        assert zombie.reached.wait(PATIENCE_S)
        assert receiving.wait(PATIENCE_S)
        new.submit(address_of(receiver), taken)
        assert outcomes_of(new)[2].ok
    finally:
        zombie.go_on.set()
    ended = outcomes_of(old)[1]
    wait_until(lambda: receiver.stats().num_active == 0)
    assert _assert_right(receiver, contents) == {2}
    assert ended.status is TransferStatus.FAILED
    assert receiver.stats().num_late_writes == 1
    assert receiver.stats().num_completed == 1
    assert receiver.stats().staging_used_bytes == 0


def test_a_late_write_of_a_replaced_session_is_refused(
    make_receiver: MakeReceiver,
    make_sender: MakeSender,
    monkeypatch: pytest.MonkeyPatch,
    *,
    same_host: bool,
) -> None:
    """It goes into memory that nobody else has, is counted, and thrown away."""
    _write_after_being_replaced(make_receiver, make_sender, monkeypatch, same_host=same_host)


def test_without_the_epoch_a_late_write_would_be_delivered(
    make_receiver: MakeReceiver,
    make_sender: MakeSender,
    monkeypatch: pytest.MonkeyPatch,
    *,
    same_host: bool,
) -> None:
    """The same, were it not asked whether the session is the current one."""
    monkeypatch.setattr(SessionTable, "is_current", lambda table, session: True)
    with pytest.raises(AssertionError, match=r"wrong data was delivered under \[1\]"):
        _write_after_being_replaced(make_receiver, make_sender, monkeypatch, same_host=same_host)


def test_a_late_write_of_a_part_ends_all_parts(
    make_receiver: MakeReceiver,
    make_sender: MakeSender,
    monkeypatch: pytest.MonkeyPatch,
    *,
    same_host: bool,
) -> None:
    """One of two sender ranks is started again in mid-transfer: what it writes later is counted,
    and the part of the other, which came, is of no use."""
    receiver = make_receiver(timeouts=PATIENT)
    half = layout_of_heads(LAYOUT, 1)

    def make_rank(rank: int, incarnation: int, timeouts: TransportTimeouts = PATIENT) -> KvSender:
        share = HeadShare(2, 2, rank)
        return make_sender(
            layout=half,
            share=share,
            incarnation=incarnation,
            timeouts=timeouts,
            same_host=same_host,
        )

    old, new, other = make_rank(0, 1, ZOMBIE), make_rank(0, 2), make_rank(1, 1)
    given = transfer(1, NUM_TOKENS, layout=half)
    other.submit(address_of(receiver), given)
    assert outcomes_of(other)[1].ok
    receiving, zombie = threading.Event(), _Hook()
    _hook_pairs(monkeypatch, receiving.set)
    try:
        late = dataclasses.replace(given, kv=_ZombieKv(bytes_of(given), zombie))
        old.submit(address_of(receiver), late)
        assert zombie.reached.wait(PATIENCE_S)
        assert receiving.wait(PATIENCE_S)
        new.submit(address_of(receiver), transfer(2, NUM_TOKENS, layout=half))
        assert outcomes_of(new)[2].ok
    finally:
        zombie.go_on.set()
    assert outcomes_of(old)[1].status is TransferStatus.FAILED
    wait_until(lambda: receiver.stats().num_late_writes == 1)
    other.submit(address_of(receiver), transfer(2, NUM_TOKENS, layout=half))
    assert outcomes_of(other)[2].ok
    (incoming,) = receiver.poll()
    assert incoming.transfer_id == 2
    receiver.release(incoming)
    assert receiver.stats().num_completed == 1
    assert receiver.stats().staging_used_bytes == 0


def _pages_change_after_giving_up(
    make_receiver: MakeReceiver, make_sender: MakeSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbour is slow to read a sender's pages; the sender gives up, and uses them again."""
    slow = _Hook()
    _hook_pairs(monkeypatch, slow.stop_here)
    # The sender's word that it gave up comes later than the bytes, as it well may.
    monkeypatch.setattr(ReceptionDesk, "give_up", lambda desk, session, transfer_id: False)
    receiver = make_receiver(timeouts=PATIENT)
    sender = make_sender(timeouts=dataclasses.replace(CALM, chunk_s=1.0))
    pool = SharedBuffers(LAYOUT, NUM_TOKENS)
    buffers = (*pool.k_buffers, *pool.v_buffers)
    for number, buffer in enumerate(buffers):
        buffer.fill_(number + 1)
    slots = torch.randperm(NUM_TOKENS)
    kv = paged_kv(LAYOUT, pool.k_buffers, pool.v_buffers, slots, buffers=pool)
    sent = OutgoingTransfer(
        transfer_id=1, stream_id=7, token_ids=range(NUM_TOKENS), first_token=0, kv=kv
    )
    contents = {1: bytes_of(sent)}
    try:
        sender.submit(address_of(receiver), sent)
        assert slow.reached.wait(PATIENCE_S)
        outcome = outcomes_of(sender)[1]
        assert outcome.status is TransferStatus.FAILED
        for buffer in buffers:
            buffer.fill_(POISON)
    finally:
        slow.go_on.set()
    wait_until(lambda: receiver.stats().num_active == 0)
    pool.close()
    assert _assert_right(receiver, contents) == set()
    assert receiver.stats().num_failed == 1
    assert receiver.stats().staging_used_bytes == 0


@pytest.mark.parametrize("same_host", [True], ids=["shared memory"])
def test_pages_that_were_taken_back_are_not_delivered(
    make_receiver: MakeReceiver, make_sender: MakeSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender takes its pages back only when its end of the pair is closed, and whoever read them
    later cannot say so any more."""
    _pages_change_after_giving_up(make_receiver, make_sender, monkeypatch)


@pytest.mark.parametrize("same_host", [True], ids=["shared memory"])
def test_without_that_word_pages_taken_back_would_be_delivered(
    make_receiver: MakeReceiver, make_sender: MakeSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, were the sender not told of each chunk that was read."""
    monkeypatch.setattr(SharedMemoryPair, "_say_read", lambda pair: None)
    with pytest.raises(AssertionError, match=r"wrong data was delivered under \[1\]"):
        _pages_change_after_giving_up(make_receiver, make_sender, monkeypatch)
