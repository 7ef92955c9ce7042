"""The ring that two ranks of one machine share."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamfill.errors import TransportError
from streamfill.kv_transfer.rendezvous import RendezvousStore
from streamfill.kv_transfer.rings import HostRing
from streamfill.kv_transfer.shared_memory import (
    SharedMemoryPair,
    offer_shared_memory,
    take_shared_memory,
)
from streamfill.kv_transfer.timeouts import TransportTimeouts
from tests.unit.kv_transfer.builders import (
    CALM,
    LAYOUT,
    PATIENCE_S,
    QUICK,
    RawSender,
    address_of,
    arrivals_of,
    bytes_of,
    hello,
    offer,
    outcomes_of,
    recv_all,
    send_all,
    transfer,
)
from tests.unit.kv_transfer.conftest import MakeReceiver, MakeSender

CPU = torch.device("cpu")
PART_BYTES, NUM_PARTS = HostRing.PART_BYTES, HostRing.NUM_PARTS


def _stores() -> tuple[RendezvousStore, RendezvousStore]:
    """Of a receiver and a sender."""

    def publish(key: str, value: bytes) -> None:
        senders.put(key, value)

    receivers = RendezvousStore(publish=publish, timeout_s=PATIENCE_S)
    senders = RendezvousStore(publish=receivers.put, timeout_s=PATIENCE_S)
    return receivers, senders


def _meet(
    *, offered: bool = True, taken: bool = True, timeouts: TransportTimeouts = CALM
) -> list[SharedMemoryPair | None]:
    """The receiver's pair and the sender's."""
    receivers, senders = _stores()
    found: list[SharedMemoryPair | None] = [None, None]

    def receive() -> None:
        receivers.adopt()
        found[0] = offer_shared_memory(receivers, timeouts, LAYOUT, CPU, wanted=offered)

    thread = threading.Thread(target=receive)
    thread.start()
    found[1] = take_shared_memory(senders, timeouts, LAYOUT, CPU, wanted=taken)
    thread.join()
    return found


@pytest.fixture(scope="module")
def pairs() -> Iterator[tuple[SharedMemoryPair, SharedMemoryPair]]:
    receiver, sender = _meet()
    assert receiver is not None
    assert sender is not None
    yield receiver, sender
    receiver.close()
    sender.close()


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.sampled_from([1, 1000, PART_BYTES - 1, PART_BYTES, 3 * PART_BYTES + 5, 9 * PART_BYTES]),
        min_size=1,
        max_size=5,
    )
)
def test_chunks_of_any_size_arrive(
    pairs: tuple[SharedMemoryPair, SharedMemoryPair], sizes: list[int]
) -> None:
    """Also those that are larger than the ring; the ring goes on where the last chunk ended."""
    receiver, sender = pairs
    chunks = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]

    def send() -> None:
        for chunk in chunks:
            send_all(sender, chunk)

    thread = threading.Thread(target=send)
    thread.start()
    for chunk in chunks:
        assert torch.equal(recv_all(receiver, chunk.numel()), chunk)
    thread.join()


@pytest.mark.parametrize(("offered", "taken"), [(False, True), (True, False), (False, False)])
def test_both_sides_have_to_want_it(offered: bool, taken: bool) -> None:
    assert _meet(offered=offered, taken=taken) == [None, None]


def test_servers_of_two_users_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one machine; their KV goes as between two machines, instead of not at all."""
    user = os.getuid()
    monkeypatch.setattr("streamfill.kv_transfer.shared_memory.os.getuid", lambda: user + 1)
    assert _meet() == [None, None]


def test_a_sender_on_another_machine_says_no() -> None:
    """Nobody listens there under the address."""
    receivers, senders = _stores()
    senders.put("shared", b"\0streamfill-kv-somewhere-else")
    assert take_shared_memory(senders, CALM, LAYOUT, CPU, wanted=True) is None
    assert receivers.get("shared_answer") == b"no"


def test_a_sender_connects_to_nothing_else() -> None:
    """Whatever its peer names, such as the socket of another service."""
    receivers, senders = _stores()
    name = b"\0another-service-%d" % os.getpid()
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(name)
        service.listen()
        service.settimeout(0.05)
        senders.put("shared", name)
        assert take_shared_memory(senders, CALM, LAYOUT, CPU, wanted=True) is None
        with pytest.raises(TimeoutError):
            service.accept()
    assert receivers.get("shared_answer") == b"no"


@pytest.mark.parametrize("size", [1, 2 * NUM_PARTS * PART_BYTES])
def test_the_end_of_a_peer_is_noticed_at_once(size: int) -> None:
    """In a wait for it, and never again usable."""
    receiver, sender = _meet()
    assert receiver is not None
    assert sender is not None
    receiver.close()
    begun_s = time.monotonic()
    for _ in range(2):
        with pytest.raises(TransportError):
            send_all(sender, torch.zeros(size, dtype=torch.uint8))
    assert time.monotonic() - begun_s < CALM.chunk_s
    sender.close()


def test_a_silent_peer_is_given_up() -> None:
    receiver, sender = _meet(timeouts=QUICK)
    assert receiver is not None
    assert sender is not None
    with pytest.raises(TransportError, match=r"Timed out.*1\.0 s"):
        recv_all(receiver, 10)
    with pytest.raises(TransportError, match=r"Timed out"):
        recv_all(receiver, 10)
    receiver.close()
    sender.close()


def test_it_is_chosen_where_it_can_be(
    make_receiver: MakeReceiver, make_sender: MakeSender, *, same_host: bool
) -> None:
    receiver = make_receiver()
    for name, wanted in (("p0", True), ("p1", False)):
        sender = make_sender(name, same_host=wanted)
        sender.submit(address_of(receiver), transfer(len(name) + wanted, 50))
        (outcome,) = outcomes_of(sender).values()
        assert outcome.ok
        assert sender.stats().num_shared == int(same_host and wanted)


def test_a_late_write_meets_nobody(make_receiver: MakeReceiver) -> None:
    """A sender that was replaced goes on writing, and what its successor sends is not touched."""
    receiver = make_receiver(same_host=True)
    with RawSender(receiver.port) as late, RawSender(receiver.port) as raw:
        old = late.open(hello(incarnation=1))
        late.send(offer(1, epoch=old.epoch, num_tokens=4))
        late.receive()
        zombie = late.join_group(old.epoch)
        assert isinstance(zombie, SharedMemoryPair)
        new = raw.open(hello(incarnation=2))
        sent = transfer(2, 400)
        raw.send(offer(2, epoch=new.epoch, num_tokens=400))
        raw.receive()
        pair = raw.join_group(new.epoch)
        for part in zombie._ring.parts:
            part.fill_(0xEE)
        send_all(pair, bytes_of(sent))
        for part in zombie._ring.parts:
            part.fill_(0xEE)
        incoming = arrivals_of(receiver)[2]
        assert torch.equal(incoming.staging, bytes_of(sent))
        receiver.release(incoming)
        pair.close()
        zombie.close()
