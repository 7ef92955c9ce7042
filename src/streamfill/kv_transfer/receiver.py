"""The receiving endpoint of a server rank; the contract is `interface.KvReceiverInterface`."""

from __future__ import annotations

import logging
import secrets
from collections import deque

import torch
import zmq

from streamfill.curve.keys import ListenKeys
from streamfill.errors import ConfigError, TransportError
from streamfill.kv_transfer.control_socket import ControlSocket
from streamfill.kv_transfer.counters import Counters, ReceiverCount
from streamfill.kv_transfer.faults import BEYOND_S, Faults
from streamfill.kv_transfer.faulty_socket import FaultySocket
from streamfill.kv_transfer.inbound_control import InboundControl, InboundOptions
from streamfill.kv_transfer.interface import (
    HeldReport,
    IncomingTransfer,
    ReceiverStats,
    SenderNote,
)
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.pool import StagingPool
from streamfill.kv_transfer.slices import HeadShare
from streamfill.kv_transfer.timeouts import TransportTimeouts
from streamfill.kv_transfer.waker import Waker

_log = logging.getLogger(__name__)

_WILDCARDS = frozenset({"", "*", "0.0.0.0", "::"})


class KvReceiver:
    """Receives KV from any number of senders, one thread for each that has sent something."""

    def __init__(
        self,
        server_id: str,
        layout: KvLayout,
        bind_host: str,
        port: int = 0,
        *,
        memory_limit_bytes: int,
        share: HeadShare | None = None,
        incarnation: int | None = None,
        advertise_host: str | None = None,
        device: torch.device | None = None,
        timeouts: TransportTimeouts | None = None,
        same_host: bool = True,
        faults: Faults | None = None,
        keys: ListenKeys | None = None,
    ) -> None:
        """Listen.

        Args:
            server_id: of this server.
            layout: of its KV.
            bind_host: address to listen on.
            port: control port; 0 takes a free one, see `port`.
            memory_limit_bytes: of staging, in use and kept for reuse together.
            share: which of the model's KV heads this rank holds; None: there is one rank.
            incarnation: differs with every start; None draws a random one.
            advertise_host: address of this machine for Gloo; needed where ``bind_host`` is a
                wildcard.
            device: of the staging tensors; cpu by default.
            timeouts: see `timeouts`.
            same_host: share memory with senders on the same machine, where both are on the CPU.
            faults: for tests; None: those of the environment, if any.
            keys: which senders are let in. None: all, in the clear.

        Raises:
            ConfigError: it cannot listen there, nobody could know where it listens, or the
                environment asks for faults that cannot be.
            ValueError: the layout does not have the heads of ``share``.
        """
        share = share or HeadShare(layout.num_kv_heads)
        share.check_pool(layout.num_kv_heads)
        if advertise_host is None and bind_host in _WILDCARDS:
            raise ConfigError(
                "advertise_host",
                advertise_host,
                f"name this machine's address, since it listens on all of them ({bind_host!r})",
            )
        device = device or torch.device("cpu")
        timeouts = timeouts or TransportTimeouts()
        faults = faults or Faults.from_environment()
        self._pool = StagingPool(memory_limit_bytes, device=device)
        self._counters: Counters[ReceiverCount] = Counters()
        self._ready: deque[IncomingTransfer] = deque()
        self._notes: deque[SenderNote] = deque()
        self._waker = Waker()
        self._closed = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket: ControlSocket | None = None
        try:
            if faults is None:
                socket = ControlSocket(
                    self._context,
                    host=bind_host,
                    port=port,
                    counters=self._counters,
                    keys=keys,
                )
            else:
                socket = FaultySocket(
                    self._context,
                    host=bind_host,
                    port=port,
                    counters=self._counters,
                    faults=faults,
                    late_s=timeouts.reply_s + BEYOND_S,
                    keys=keys,
                )
            self._port = socket.port
            self._control = InboundControl(
                socket,
                options=InboundOptions(
                    server_id=server_id,
                    incarnation=secrets.randbits(62) if incarnation is None else incarnation,
                    layout=layout,
                    share=share,
                    device=device,
                    advertise_host=advertise_host or bind_host,
                    timeouts=timeouts,
                    same_host=same_host,
                    faults=faults,
                ),
                pool=self._pool,
                counters=self._counters,
                publish=self._publish,
                publish_note=self._publish_note,
                num_ready=lambda: len(self._ready),
            )
        except TransportError as error:
            if socket is not None:
                socket.close()
            self._context.term()
            self._waker.close()
            raise ConfigError(
                "transfer endpoint", f"{bind_host}:{port}", f"choose another: {error}"
            ) from error

    @property
    def port(self) -> int:
        """See `interface.KvReceiverInterface.port`."""
        return self._port

    def poll(self) -> list[IncomingTransfer]:
        """See `interface.KvReceiverInterface.poll`."""
        self._waker.clear()
        ready = []
        while self._ready:
            ready.append(self._ready.popleft())
        return ready

    def poll_notes(self) -> list[SenderNote]:
        """See `interface.KvReceiverInterface.poll_notes`."""
        notes = []
        while self._notes:
            notes.append(self._notes.popleft())
        return notes

    def tell(self, sender_id: str, report: HeldReport) -> None:
        """See `interface.KvReceiverInterface.tell`."""
        self._control.tell(sender_id, report)

    def allow_early(self, num_bytes: int) -> None:
        """See `interface.KvReceiverInterface.allow_early`."""
        self._control.allow_early(num_bytes)

    def release(self, incoming: IncomingTransfer) -> None:
        """See `interface.KvReceiverInterface.release`."""
        self._pool.release(incoming.staging)

    def fileno(self) -> int:
        """See `interface.KvReceiverInterface.fileno`."""
        return self._waker.fileno()

    def stats(self) -> ReceiverStats:
        """See `interface.KvReceiverInterface.stats`."""
        count, usage = self._counters.get, self._pool.usage()
        return ReceiverStats(
            num_peers=self._control.num_sessions,
            num_active=self._control.num_receptions,
            num_ready=len(self._ready),
            staging_used_bytes=usage.used_bytes,
            staging_cached_bytes=usage.cached_bytes,
            num_completed=count(ReceiverCount.COMPLETED),
            num_refused=count(ReceiverCount.REFUSED),
            num_aborted=count(ReceiverCount.ABORTED),
            num_failed=count(ReceiverCount.FAILED),
            num_refused_handshakes=count(ReceiverCount.REFUSED_HANDSHAKES),
            num_malformed_frames=count(ReceiverCount.MALFORMED_FRAMES),
            num_stale_frames=count(ReceiverCount.STALE_FRAMES),
            num_late_writes=count(ReceiverCount.LATE_WRITES),
            num_duplicates=count(ReceiverCount.DUPLICATES),
            bytes_received=count(ReceiverCount.BYTES_RECEIVED),
        )

    def close(self) -> None:
        """See `interface.KvReceiverInterface.close`."""
        if self._closed:
            return
        self._closed = True
        if self._control.close():
            self._context.term()
        else:
            _log.error("the threads of the KV receiver did not end")
        while self._ready:
            self._pool.release(self._ready.popleft().staging)
        self._waker.close()

    def _publish_note(self, note: SenderNote) -> None:
        """Called by the control thread."""
        self._notes.append(note)
        self._waker.set()

    def _publish(self, incoming: IncomingTransfer) -> None:
        """Called by the control thread."""
        self._ready.append(incoming)
        self._waker.set()
