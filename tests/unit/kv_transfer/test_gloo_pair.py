"""A pair that carries chunks over Gloo: what it copies, what it has under way, and its end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamfill.errors import TransportError
from streamfill.kv_transfer.group import MAX_SENT, RECEIVER_RANK, SENDER_RANK, PairGroup
from streamfill.kv_transfer.interface import OutgoingTransfer, TransferStatus
from streamfill.kv_transfer.reception_desk import Reception, ReceptionDesk
from streamfill.kv_transfer.rendezvous import RendezvousStore
from streamfill.kv_transfer.shared_buffers import SharedBuffers
from streamfill.kv_transfer.source import PagedKv, StagedKv, paged_kv
from tests.unit.kv_transfer.builders import (
    CALM,
    HOST,
    LAYOUT,
    PATIENCE_S,
    address_of,
    arrivals_of,
    bytes_of,
    outcomes_of,
    transfer,
)
from tests.unit.kv_transfer.conftest import MakeReceiver, MakeSender

NUM_SLOTS = 64


class _Ends(NamedTuple):
    sender: PairGroup
    receiver: PairGroup

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


def _connect() -> _Ends:
    stores: list[RendezvousStore] = []
    for other in (1, 0):

        def publish(key: str, value: bytes, other: int = other) -> None:
            stores[other].put(key, value)

        stores.append(RendezvousStore(publish=publish, timeout_s=PATIENCE_S))
    found: dict[int, PairGroup] = {}

    def meet(rank: int) -> None:
        found[rank] = PairGroup(
            rank=rank,
            store=stores[rank],
            local_host=HOST,
            device=torch.device("cpu"),
            timeouts=CALM,
        )

    thread = threading.Thread(target=meet, args=(RECEIVER_RANK,))
    thread.start()
    meet(SENDER_RANK)
    thread.join()
    return _Ends(found[SENDER_RANK], found[RECEIVER_RANK])


@pytest.fixture(scope="module")
def ends() -> Iterator[_Ends]:
    """Whose transfers all end well."""
    made = _connect()
    yield made
    made.close()


class _CutKv:
    """KV in one tensor, of which every second stretch between two cuts has to be copied."""

    def __init__(self, content: Tensor, cuts: list[int]) -> None:
        self.content = content
        self.cuts = cuts
        self.num_bytes = content.numel()
        self.num_read = 0

    def piece(self, begin: int, end: int) -> Tensor | None:
        is_even = sum(cut <= begin for cut in self.cuts) % 2 == 0
        return self.content[begin:end] if is_even else None

    def read(self, begin: int, out: Tensor) -> None:
        self.num_read += out.numel()
        out.copy_(self.content[begin : begin + out.numel()])


def _aside(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def _receive(pair: PairGroup, num_bytes: int, chunk_bytes: int, cuts: list[int]) -> Tensor:
    into = torch.zeros(num_bytes, dtype=torch.uint8)
    for begin in range(0, num_bytes, chunk_bytes):
        pair.recv(into, begin, min(begin + chunk_bytes, num_bytes), cuts)
    pair.flush()
    return into


@settings(deadline=None, max_examples=40)
@given(
    num_bytes=st.integers(1, 600),
    chunk_bytes=st.integers(40, 700),
    cuts=st.sets(st.integers(1, 599), max_size=20),
    is_prepared=st.booleans(),
)
def test_chunks_arrive_wherever_they_are_cut(
    ends: _Ends, num_bytes: int, chunk_bytes: int, cuts: set[int], *, is_prepared: bool
) -> None:
    """Cuts within chunks, at their ends, and none; pieces, and bytes that are gathered first."""
    content = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    kv = _CutKv(content, sorted(cut for cut in cuts if cut < num_bytes))

    def send() -> None:
        if is_prepared:
            ends.sender.prepare(kv, min(chunk_bytes, num_bytes))
        for begin in range(0, num_bytes, chunk_bytes):
            ends.sender.send(kv, begin, min(begin + chunk_bytes, num_bytes))
        ends.sender.flush()

    thread = _aside(send)
    assert torch.equal(_receive(ends.receiver, num_bytes, chunk_bytes, kv.cuts), content)
    thread.join()


def test_all_chunks_are_asked_for_before_the_first_comes(ends: _Ends) -> None:
    """So that the thread that receives is not in the way of the one that reads."""
    num_chunks = 5 * MAX_SENT
    content = torch.arange(100 * num_chunks).to(torch.uint8)
    into = torch.zeros_like(content)
    for begin in range(0, content.numel(), 100):
        ends.receiver.recv(into, begin, begin + 100)
    assert not into.any()

    def send() -> None:
        for begin in range(0, content.numel(), 100):
            ends.sender.send(StagedKv(content), begin, begin + 100)
        ends.sender.flush()

    thread = _aside(send)
    for num_left in reversed(range(num_chunks)):
        ends.receiver.flush(num_left)
        num_there = content.numel() - 100 * num_left
        assert torch.equal(into[:num_there], content[:num_there])
    thread.join()


def test_what_was_prepared_and_refused_is_not_sent(ends: _Ends) -> None:
    """The next transfer's first chunk takes its place, and is read once."""
    refused = _CutKv(torch.full((100,), 1, dtype=torch.uint8), [0])
    taken = _CutKv(torch.full((100,), 2, dtype=torch.uint8), [0])
    ends.sender.prepare(refused, 100)
    ends.sender.prepare(taken, 100)

    def send() -> None:
        ends.sender.send(taken, 0, 100)
        ends.sender.flush()

    thread = _aside(send)
    assert torch.equal(_receive(ends.receiver, 100, 100, []), taken.content)
    thread.join()
    assert taken.num_read == 100


def test_nothing_is_sent_from_pages_once_the_pair_is_closed() -> None:
    """They may hold something else by then: who waits for them gets an error, not that."""
    sender, receiver = _connect()
    content = torch.full((1000,), 1, dtype=torch.uint8)
    sender.send(StagedKv(content), 0, 1000)
    sender.close()
    content.fill_(2)
    with pytest.raises(TransportError):
        _receive(receiver, 1000, 1000, [])
    receiver.close()


@pytest.mark.parametrize("same_host", [False], ids=["gloo"])
def test_long_runs_of_pages_are_sent_without_gathering(
    make_receiver: MakeReceiver, make_sender: MakeSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt in two runs and some pages between them only those are copied."""
    monkeypatch.setattr("streamfill.kv_transfer.source.LONG_RUN_BYTES", 10 * 32)
    copied: list[int] = []
    read = PagedKv.read

    def note(kv: PagedKv, begin: int, out: Tensor) -> None:
        copied.append(out.numel())
        read(kv, begin, out)

    pool = SharedBuffers(LAYOUT, NUM_SLOTS)
    for buffer in (*pool.k_buffers, *pool.v_buffers):
        buffer.copy_(torch.randn(buffer.shape))
    slots = torch.tensor([*range(20, 40), 3, 7, 5, *range(41, 60)])
    kv = paged_kv(LAYOUT, pool.k_buffers, pool.v_buffers, slots, buffers=pool)
    pool.close()
    sent = OutgoingTransfer(
        transfer_id=1, stream_id=7, token_ids=range(len(slots)), first_token=0, kv=kv
    )
    content = bytes_of(sent)
    receiver, sender = make_receiver(), make_sender()
    monkeypatch.setattr(PagedKv, "read", note)
    sender.submit(address_of(receiver), sent)
    assert outcomes_of(sender)[1].ok
    incoming = arrivals_of(receiver)[1]
    assert torch.equal(incoming.staging, content)
    receiver.release(incoming)
    assert sum(copied) == 3 * LAYOUT.bytes_per_token


@pytest.mark.parametrize("same_host", [False], ids=["gloo"])
def test_the_first_chunk_is_made_ready_while_the_offer_is_answered(
    make_receiver: MakeReceiver, make_sender: MakeSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that answers only once the KV was read gets it, from the second transfer on; the
    first one sets the pair up."""
    receiver, sender = make_receiver(), make_sender()
    sender.submit(address_of(receiver), transfer(1, 4))
    assert outcomes_of(sender)[1].ok
    was_read = threading.Event()
    accept = ReceptionDesk.accept

    class Watched(_CutKv):
        def read(self, begin: int, out: Tensor) -> None:
            super().read(begin, out)
            was_read.set()

    def answer(*args: object) -> Reception | str:
        assert was_read.wait(PATIENCE_S)
        return accept(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ReceptionDesk, "accept", answer)
    given = transfer(2, 4)
    content = bytes_of(given)
    kv = Watched(content, [8])
    sender.submit(
        address_of(receiver),
        OutgoingTransfer(
            transfer_id=2, stream_id=7, token_ids=given.token_ids, first_token=0, kv=kv
        ),
    )
    outcome = outcomes_of(sender)[2]
    assert outcome.status is TransferStatus.DELIVERED, outcome.reason
    arrived = arrivals_of(receiver, 2)
    assert torch.equal(arrived[2].staging, content)
    for incoming in arrived.values():
        receiver.release(incoming)
