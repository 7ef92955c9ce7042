"""One session of a sender with one receiver: the control socket and the pair's group.

    connecting ──Welcome──▶ open ──(group at the first chunk)──▶ open ──any failure──▶ closed

A session never recovers: whatever fails closes it, and a new one gets a new epoch. Used by one
thread only, that of the link which made it. This is the sender's border at which errors of zmq
become `TransportError`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import torch
import zmq

from streamfill.curve.keys import ConnectKeys
from streamfill.errors import ProtocolError, TransportError
from streamfill.kv_transfer.counters import Counters, SenderCount
from streamfill.kv_transfer.group import SENDER_RANK, Pair, local_address_towards, make_pair
from streamfill.kv_transfer.interface import HeldNews, HeldReport, PeerAddress
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.rendezvous import RendezvousStore
from streamfill.kv_transfer.shared_memory import SharedMemoryPair
from streamfill.kv_transfer.timeouts import TransportTimeouts
from streamfill.kv_transfer.waker import Waker
from streamfill.messages.codec import MAX_FRAME_BYTES, FrameDecoder, encode
from streamfill.messages.handoff import (
    Abort,
    Held,
    Hello,
    Ping,
    Pong,
    Reject,
    Rendezvous,
    ToReceiver,
    ToSender,
    Welcome,
)
from streamfill.observability.logging import RateLimited

_log = logging.getLogger(__name__)

LINGER_MS = 200
"""An ``Abort`` just sent may still leave; `close` waits no longer for it."""

RECONNECT_FIRST_MS = 50
RECONNECT_LAST_MS = 500
"""Back-off of ZeroMQ's own connecting, below that of ``Hello``."""


class SessionLostError(TransportError):
    """The receiver does not know this session, or not any more: it restarted or gave it up."""


class SessionRejectedError(TransportError):
    """The receiver wants no session with this sender."""


class SenderSession:
    """A control connection to one receiver and, once `welcomed`, its epoch and group."""

    def __init__(
        self,
        address: PeerAddress,
        *,
        context: zmq.Context[zmq.Socket[bytes]],
        waker: Waker,
        device: torch.device,
        timeouts: TransportTimeouts,
        counters: Counters[SenderCount],
        layout: KvLayout,
        same_host: bool,
        on_held: Callable[[HeldNews], None],
        keys: ConnectKeys | None,
    ) -> None:
        """Begin to connect; nothing is sent yet.

        Raises:
            TransportError: the address is none, or there is no socket to be had.
        """
        self._address = address
        self._waker = waker
        self._device = device
        self._timeouts = timeouts
        self._counters = counters
        self._layout = layout
        self._same_host = same_host
        self._on_held = on_held
        self._decoder: FrameDecoder[ToSender] = FrameDecoder(ToSender)
        self._welcome: Welcome | None = None
        self._group: Pair | None = None
        self._store: RendezvousStore | None = None
        self._last_heard_s = self._last_ping_s = time.monotonic()
        self._log_malformed = RateLimited()
        try:
            self._socket = context.socket(zmq.DEALER)
        except zmq.ZMQError as error:
            raise TransportError(f"no socket for {address}: {error}") from error
        try:
            self._socket.set(zmq.LINGER, LINGER_MS)
            self._socket.set(zmq.RECONNECT_IVL, RECONNECT_FIRST_MS)
            self._socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_LAST_MS)
            self._socket.set(zmq.MAXMSGSIZE, 2 * MAX_FRAME_BYTES)
            if keys is not None:
                keys.secure(self._socket)
            self._socket.connect(f"tcp://{address.host}:{address.control_port}")
        except zmq.ZMQError as error:
            self._socket.close(0)
            raise TransportError(f"no address to connect to: {address}: {error}") from error
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(waker.fileno(), zmq.POLLIN)

    @property
    def epoch(self) -> int:
        """Of the session; only once it is open."""
        if self._welcome is None:
            raise TransportError("the session is not open")
        return self._welcome.epoch

    def send(self, message: ToReceiver) -> None:
        """Queue a message to the receiver.

        Raises:
            TransportError: the queue is full, so the receiver has read nothing for long.
        """
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise TransportError(f"cannot send to {self._address}: {error}") from error

    def receive(self, wait_s: float | None) -> ToSender | None:
        """The next message, or None when there is none within ``wait_s`` or the link was woken.

        What belongs to the group's store goes there and is not returned, nor is what the receiver
        says that it holds.

        Raises:
            TransportError: the socket is broken.
        """
        try:
            ready = self._poller.poll(
                None if wait_s is None else math.ceil(max(0.0, wait_s) * 1000)
            )
            if any(source != self._socket for source, _ in ready):
                self._waker.clear()
            frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        except zmq.ZMQError as error:
            raise TransportError(f"cannot receive from {self._address}: {error}") from error
        try:
            if len(frames) != 1:
                raise ProtocolError(f"{len(frames)} frames instead of one")
            message = self._decoder.decode(frames[0])
        except ProtocolError as error:
            self._counters.add(SenderCount.MALFORMED_FRAMES)
            if self._log_malformed.allow():
                _log.warning("malformed frame from %s dropped: %s", self._address, error)
            return None
        self._last_heard_s = time.monotonic()
        store = self._store
        if isinstance(message, Rendezvous) and store is not None and message.epoch == self.epoch:
            store.put(message.key, message.value)
            return None
        if isinstance(message, Held) and self._welcome is not None and message.epoch == self.epoch:
            self._on_held(
                HeldReport(
                    server_id=self._address.server_id,
                    stream_id=message.stream_id,
                    version=message.version,
                    num_tokens=message.num_tokens,
                    is_loss=message.is_loss,
                    missed_transfer_id=message.missed_transfer_id,
                )
            )
            return None
        return message

    def is_welcome(self, message: ToSender | None, hello: Hello) -> bool:
        """Whether ``message`` opens the session that ``hello`` asked for; anything else is stale.

        Raises:
            SessionRejectedError: it says that there will be none.
        """
        match message:
            case None:
                return False
            case Reject(reason=reason):
                raise SessionRejectedError(reason)
            case Welcome(attempt=attempt) if attempt == hello.attempt:
                found = (message.server_id, message.rank)
                wanted = (self._address.server_id, self._address.rank)
                if found != wanted:
                    raise SessionRejectedError(f"{wanted} was looked for, {found} answered")
                self._welcome = message
                return True
            case _:
                self._counters.add(SenderCount.STALE_FRAMES)
                return False

    def keep_alive(self) -> float:
        """Ping when it is time.

        Returns:
            Seconds until this should be called again.

        Raises:
            SessionLostError: the receiver has been silent for too long.
        """
        now_s = time.monotonic()
        if now_s - self._last_heard_s > self._timeouts.silence_s:
            raise SessionLostError(f"{self._address} silent for {self._timeouts.silence_s} s")
        if now_s - self._last_ping_s >= self._timeouts.ping_s:
            self.send(Ping(epoch=self.epoch))
            self._last_ping_s = now_s
        return self._timeouts.ping_s - (now_s - self._last_ping_s)

    @property
    def pair(self) -> Pair | None:
        """The pair's data path, if it was set up before."""
        return self._group

    def group(self) -> Pair:
        """The pair's data path, set up at the first call, just after the receiver began to.

        Raises:
            TransportError: it was not set up in time.
        """
        if self._group is None:
            self._store = RendezvousStore(
                publish=self._publish, timeout_s=self._timeouts.group_setup_s, pump=self._pump
            )
            self._group = make_pair(
                rank=SENDER_RANK,
                store=self._store,
                local_host=local_address_towards(self._address.host, self._address.control_port),
                device=self._device,
                timeouts=self._timeouts,
                layout=self._layout,
                same_host=self._same_host,
            )
            if isinstance(self._group, SharedMemoryPair):
                self._counters.add(SenderCount.SHARED)
        return self._group

    def close(self) -> None:
        """End the session on this side; the receiver's group notices at once."""
        if self._group is not None:
            self._group.close()
            self._group = None
            self._store = None
        self._socket.close()

    def _publish(self, key: str, value: bytes) -> None:
        self.send(Rendezvous(epoch=self.epoch, key=key, value=value))

    def _pump(self, wait_s: float) -> None:
        """Let the store's next entry in, while the group is being set up."""
        match self.receive(wait_s):
            case Reject(reason=reason):
                raise SessionLostError(reason)
            case Abort(epoch=epoch, reason=reason) if epoch == self.epoch:
                raise TransportError(f"given up by the receiver: {reason}")
            case None | Pong():
                pass
            case _:
                self._counters.add(SenderCount.STALE_FRAMES)
