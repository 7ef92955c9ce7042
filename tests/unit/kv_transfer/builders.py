"""Builders for tests of the KV transport: endpoints, transfers, and peers made of bare sockets."""

from __future__ import annotations

import dataclasses
import select
import time
from collections.abc import Callable
from types import TracebackType

import torch
import zmq

from streamfill.kv_transfer.group import SENDER_RANK, Pair, make_pair
from streamfill.kv_transfer.interface import (
    IncomingTransfer,
    OutgoingTransfer,
    PeerAddress,
    TransferOutcome,
)
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.rendezvous import RendezvousStore
from streamfill.kv_transfer.sender import KvSender
from streamfill.kv_transfer.source import StagedKv
from streamfill.kv_transfer.timeouts import TransportTimeouts
from streamfill.messages.codec import FrameDecoder, encode, pack_ids
from streamfill.messages.handoff import (
    PROTOCOL_VERSION,
    Hello,
    Offer,
    Rendezvous,
    ToReceiver,
    ToSender,
    Welcome,
)

HOST = "127.0.0.1"

LAYOUT = KvLayout(
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    v_head_dim=4,
    dtype="float32",
    item_bytes=4,
    page_size=1,
)

CALM = TransportTimeouts(ping_s=0.1)
"""For what must end well: on a busy machine short time-outs would be faults of their own."""

QUICK = TransportTimeouts(
    session_s=3.0,  # on a busy machine two endpoints may find each other late
    reply_s=1.0,
    group_setup_s=1.0,
    chunk_s=1.0,
    ping_s=0.1,
    silence_s=0.6,
    parts_s=1.0,
)
"""For what must be given up."""

PATIENCE_S = 20.0
"""Far beyond every time-out of `QUICK`, and beyond those of `CALM`; a test that waits this long has
failed."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a state of another thread."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s, "did not happen"
        time.sleep(0.001)


def outcomes_of(sender: KvSender, num: int = 1) -> dict[int, TransferOutcome]:
    """The next ``num`` outcomes by transfer id, waited for through the file descriptor."""
    ended: dict[int, TransferOutcome] = {}
    while len(ended) < num:
        assert select.select([sender.fileno()], [], [], PATIENCE_S)[0], f"only {ended} ended"
        ended |= {outcome.transfer_id: outcome for outcome in sender.poll()}
    return ended


def arrivals_of(receiver: KvReceiver, num: int = 1) -> dict[int, IncomingTransfer]:
    """The next ``num`` arrivals by transfer id, waited for through the file descriptor."""
    arrived: dict[int, IncomingTransfer] = {}
    while len(arrived) < num:
        assert select.select([receiver.fileno()], [], [], PATIENCE_S)[0], f"only {arrived} came"
        arrived |= {incoming.transfer_id: incoming for incoming in receiver.poll()}
    return arrived


def address_of(receiver: KvReceiver, server_id: str = "d0") -> PeerAddress:
    """Where a receiver made by the fixtures listens."""
    return PeerAddress(server_id=server_id, host=HOST, control_port=receiver.port)


def transfer(
    transfer_id: int, num_tokens: int, *, first_token: int = 0, layout: KvLayout = LAYOUT
) -> OutgoingTransfer:
    """A transfer of random bytes; its token ids are 1000, 1001, …"""
    generator = torch.Generator().manual_seed(transfer_id)
    return OutgoingTransfer(
        transfer_id=transfer_id,
        stream_id=7,
        token_ids=range(1000, 1000 + first_token + num_tokens),
        first_token=first_token,
        kv=StagedKv(
            torch.randint(
                0,
                256,
                (num_tokens * layout.bytes_per_token,),
                dtype=torch.uint8,
                generator=generator,
            )
        ),
    )


def bytes_of(sent: OutgoingTransfer) -> torch.Tensor:
    """What a transfer carries, uint8 [number of bytes]."""
    content = torch.empty(sent.kv.num_bytes, dtype=torch.uint8)
    sent.kv.read(0, content)
    return content


class SlowKv:
    """KV that is read so slowly that its transfer is under way for as long as a test needs, however
    late the test's own thread comes to it."""

    def __init__(self, content: torch.Tensor, pause_s: float) -> None:
        self.num_bytes = content.numel()
        self.cuts = ()
        self._content = content
        self._pause_s = pause_s

    def piece(self, begin: int, end: int) -> torch.Tensor | None:
        time.sleep(self._pause_s)
        return self._content[begin:end]

    def read(self, begin: int, out: torch.Tensor) -> None:
        time.sleep(self._pause_s)
        out.copy_(self._content[begin : begin + out.numel()])


def slow_transfer(transfer_id: int, num_tokens: int) -> OutgoingTransfer:
    """A hundred chunks a second."""
    made = transfer(transfer_id, num_tokens)
    return dataclasses.replace(made, kv=SlowKv(bytes_of(made), 0.01))


def send_all(pair: Pair, content: torch.Tensor) -> None:
    """A transfer of one chunk."""
    pair.send(StagedKv(content), 0, content.numel())
    pair.flush()


def recv_all(pair: Pair, num_bytes: int) -> torch.Tensor:
    """The other half of `send_all`."""
    content = torch.empty(num_bytes, dtype=torch.uint8)
    pair.recv(content, 0, num_bytes)
    pair.flush()
    return content


def hello(*, server_id: str = "p0", incarnation: int = 1, attempt: int = 1) -> Hello:
    """A greeting that a receiver with `LAYOUT` accepts."""
    return Hello(
        server_id=server_id,
        rank=0,
        incarnation=incarnation,
        attempt=attempt,
        layout=LAYOUT,
        model_kv_heads=LAYOUT.num_kv_heads,
        first_kv_head=0,
        backend="gloo",
        protocol_version=PROTOCOL_VERSION,
    )


def offer(transfer_id: int, *, epoch: int, num_tokens: int = 4, first_token: int = 0) -> Offer:
    """An offer that fits `LAYOUT`."""
    return Offer(
        transfer_id=transfer_id,
        epoch=epoch,
        stream_id=7,
        token_ids=pack_ids(range(first_token + num_tokens)),
        first_token=first_token,
        num_tokens=num_tokens,
        num_bytes=num_tokens * LAYOUT.bytes_per_token,
        chunk_bytes=1 << 20,
    )


class RawSender:
    """The control socket of a sender, without its thread and group."""

    def __init__(self, port: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(f"tcp://{HOST}:{port}")
        self._decoder: FrameDecoder[ToSender] = FrameDecoder(ToSender)

    def send(self, message: ToReceiver) -> None:
        self._socket.send(encode(message))

    def send_frames(self, *frames: bytes) -> None:
        self._socket.send_multipart(list(frames))

    def receive(self) -> ToSender:
        assert self._socket.poll(round(PATIENCE_S * 1000)), "no answer"
        return self._decoder.decode(self._socket.recv())

    def join_group(self, epoch: int) -> Pair:
        """The sender's half of the group, for an offer that was accepted."""

        def pump(_: float) -> None:
            message = self.receive()
            assert isinstance(message, Rendezvous), message
            store.put(message.key, message.value)

        def publish(key: str, value: bytes) -> None:
            self.send(Rendezvous(epoch=epoch, key=key, value=value))

        store = RendezvousStore(publish=publish, timeout_s=PATIENCE_S, pump=pump)
        return make_pair(
            rank=SENDER_RANK,
            store=store,
            local_host=HOST,
            device=torch.device("cpu"),
            timeouts=CALM,
            layout=LAYOUT,
            same_host=True,
        )

    def receive_reply(self) -> ToSender:
        """The next message that is not about the group's set-up."""
        while isinstance(message := self.receive(), Rendezvous):
            pass
        return message

    def open(self, greeting: Hello) -> Welcome:
        self.send(greeting)
        welcome = self.receive()
        assert isinstance(welcome, Welcome), welcome
        return welcome

    def __enter__(self) -> RawSender:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._context.destroy(linger=0)


class RawReceiver:
    """The control socket of a receiver, which answers only as the test says."""

    def __init__(self, port: int = 0) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.bind(f"tcp://{HOST}:{port or '*'}")
        self._decoder: FrameDecoder[ToReceiver] = FrameDecoder(ToReceiver)
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self.route = b""

    @property
    def address(self) -> PeerAddress:
        return PeerAddress(server_id="d0", host=HOST, control_port=self.port)

    def receive(self) -> ToReceiver:
        assert self._socket.poll(round(PATIENCE_S * 1000)), "nothing came"
        self.route, frame = self._socket.recv_multipart()
        return self._decoder.decode(frame)

    def send(self, message: ToSender) -> None:
        self._socket.send_multipart([self.route, encode(message)])

    def send_frames(self, *frames: bytes) -> None:
        self._socket.send_multipart([self.route, *frames])

    def welcome(self, *, server_id: str = "d0", epoch: int = 1) -> Hello:
        greeting = self.receive()
        assert isinstance(greeting, Hello), greeting
        self.send(
            Welcome(
                server_id=server_id,
                rank=0,
                incarnation=1,
                attempt=greeting.attempt,
                epoch=epoch,
            )
        )
        return greeting

    def __enter__(self) -> RawReceiver:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._context.destroy(linger=0)
