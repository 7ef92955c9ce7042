"""The sending endpoint of a server rank; the contract is `interface.KvSenderInterface`."""

from __future__ import annotations

import dataclasses
import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence

import msgspec
import torch
import zmq

from streamfill.curve.keys import ConnectKeys
from streamfill.kv_transfer.codecs import NO_CODEC, codec_for, measure_codec
from streamfill.kv_transfer.counters import Counters, SenderCount
from streamfill.kv_transfer.faults import CHUNK_BYTES, Faults
from streamfill.kv_transfer.group import backend_name
from streamfill.kv_transfer.head_copies import layout_of_heads, slice_heads
from streamfill.kv_transfer.interface import (
    HeldNews,
    OutgoingTransfer,
    PeerAddress,
    SenderStats,
    TransferOutcome,
    TransferStatus,
)
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.sender_link import LinkOptions, SenderLink
from streamfill.kv_transfer.slices import HeadRange, HeadShare
from streamfill.kv_transfer.timeouts import JOIN_SLACK_S, TransportTimeouts
from streamfill.kv_transfer.waker import Waker
from streamfill.messages.codec import pack_ids
from streamfill.messages.common import SHARED_NAMESPACE
from streamfill.messages.handoff import PROTOCOL_VERSION, Ask, Hello, LetGo

_log = logging.getLogger(__name__)

DEFAULT_CHUNK_BYTES = 16 * 1024 * 1024
"""Large enough that the hand-shake per chunk does not show (1.4 GB/s), small enough that a
cancelled or stopped transfer is noticed within some 20 ms."""

DEFAULT_MAX_QUEUED = 64
"""Per peer. Each holds staging memory, so the pool of the server is the tighter bound."""

_STATUS_COUNT = {
    TransferStatus.DELIVERED: SenderCount.DELIVERED,
    TransferStatus.REFUSED: SenderCount.REFUSED,
    TransferStatus.CANCELLED: SenderCount.CANCELLED,
    TransferStatus.FAILED: SenderCount.FAILED,
}


class KvSender:
    """Sends KV to any number of receivers, one thread for each."""

    def __init__(
        self,
        server_id: str,
        layout: KvLayout,
        *,
        share: HeadShare | None = None,
        incarnation: int | None = None,
        device: torch.device | None = None,
        timeouts: TransportTimeouts | None = None,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        with_checksum: bool = False,
        max_queued: int = DEFAULT_MAX_QUEUED,
        same_host: bool = True,
        codec: str = NO_CODEC,
        faults: Faults | None = None,
        keys: ConnectKeys | None = None,
    ) -> None:
        """Start nothing yet: the first transfer to a peer starts its thread.

        Args:
            server_id: of this server.
            layout: of its KV.
            share: which of the model's KV heads this rank holds; None: there is one rank.
            incarnation: differs with every start; None draws a random one.
            device: of the staging tensors; cpu by default.
            timeouts: see `timeouts`.
            chunk_bytes: of one torch.distributed operation.
            with_checksum: send a CRC-32 of all bytes, for the receiver to check.
            max_queued: transfers waiting for one peer.
            same_host: as of `KvReceiver`; both sides have to want it.
            codec: that KV may be written in on a link that is slow enough for it, see `codecs`.
            faults: for tests; None: those of the environment, if any. With faults there is always a
                checksum, and chunks are small.
            keys: of this side's control connections. None: in the clear.

        Raises:
            ConfigError: there is no such codec, or it makes this KV no smaller; or the environment
                asks for faults that cannot be.
            ValueError: the layout does not have the heads of ``share``.
        """
        faults = faults or Faults.from_environment()
        if faults is not None:
            with_checksum = True
            chunk_bytes = min(chunk_bytes, CHUNK_BYTES)
        self._layout = layout
        self._share = share or HeadShare(layout.num_kv_heads)
        self._share.check_pool(layout.num_kv_heads)
        device = device or torch.device("cpu")
        chosen = codec_for(codec, layout)
        self._options = LinkOptions(
            hello=Hello(
                server_id=server_id,
                rank=self._share.rank,
                incarnation=secrets.randbits(62) if incarnation is None else incarnation,
                attempt=0,
                layout=layout,
                model_kv_heads=self._share.num_heads,
                first_kv_head=self._share.heads.first,
                backend=backend_name(device),
                protocol_version=PROTOCOL_VERSION,
            ),
            device=device,
            timeouts=timeouts or TransportTimeouts(),
            chunk_bytes=chunk_bytes,
            with_checksum=with_checksum,
            max_queued=max_queued,
            same_host=same_host,
            codec=chosen,
            codec_cost=None if chosen is None else measure_codec(chosen, layout, device),
            faults=faults,
            keys=keys,
        )
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._waker = Waker()
        self._counters: Counters[SenderCount] = Counters()
        self._outcomes: deque[TransferOutcome] = deque()
        self._held: deque[HeldNews] = deque()
        self._links: dict[tuple[str, int], SenderLink] = {}
        self._retired: list[SenderLink] = []
        self._pending: dict[tuple[int, int], SenderLink] = {}
        """By transfer id and rank of the receiver."""
        self._closed = False

    def submit(self, peer: PeerAddress, transfer: OutgoingTransfer) -> None:
        """See `interface.KvSenderInterface.submit`."""
        num_token_ids = len(transfer.token_ids)
        problem = self._layout.transfer_problem(
            num_token_ids=num_token_ids,
            first_token=transfer.first_token,
            num_tokens=num_token_ids - transfer.first_token,
            num_bytes=transfer.kv.num_bytes,
        )
        key = (transfer.transfer_id, peer.rank)
        if problem is None and key in self._pending:
            problem = "it is pending already"
        if problem is None and self._closed:
            problem = "the sender is closed"
        if problem is not None:
            raise ValueError(f"transfer {transfer.transfer_id}: {problem}")
        heads = self._heads_to(peer)
        if heads != self._share.heads:
            part = slice_heads(self._layout, transfer.kv, heads.behind(self._share.heads.first))
            transfer = dataclasses.replace(transfer, kv=part)
        link = self._link_to(peer)
        self._pending[key] = link
        link.submit(transfer)

    def ask(
        self,
        peer: PeerAddress,
        stream_id: int,
        version: int,
        token_ids: Sequence[int],
        *,
        namespace: str = SHARED_NAMESPACE,
    ) -> None:
        """See `interface.KvSenderInterface.ask`."""
        if not self._closed:
            self._link_to(peer).say(
                Ask(
                    epoch=0,
                    stream_id=stream_id,
                    version=version,
                    token_ids=pack_ids(token_ids),
                    namespace=namespace,
                )
            )

    def let_go(self, peer: PeerAddress, stream_id: int) -> None:
        """See `interface.KvSenderInterface.let_go`."""
        link = self._links.get((peer.server_id, peer.rank))
        if link is not None and link.address == peer:
            link.say(LetGo(epoch=0, stream_id=stream_id))

    def poll_held(self) -> list[HeldNews]:
        """See `interface.KvSenderInterface.poll_held`."""
        news = []
        while self._held:
            news.append(self._held.popleft())
        return news

    def cancel(self, transfer_id: int) -> None:
        """See `interface.KvSenderInterface.cancel`."""
        for (pending_id, _), link in self._pending.items():
            if pending_id == transfer_id:
                link.cancel(transfer_id)

    def poll(self) -> list[TransferOutcome]:
        """See `interface.KvSenderInterface.poll`."""
        self._waker.clear()
        ended = []
        while self._outcomes:
            outcome = self._outcomes.popleft()
            del self._pending[outcome.transfer_id, outcome.peer_rank]
            ended.append(outcome)
        return ended

    def fileno(self) -> int:
        """See `interface.KvSenderInterface.fileno`."""
        return self._waker.fileno()

    def stats(self) -> SenderStats:
        """See `interface.KvSenderInterface.stats`."""
        count = self._counters.get
        return SenderStats(
            num_peers=len(self._links),
            num_pending=len(self._pending),
            num_delivered=count(SenderCount.DELIVERED),
            num_refused=count(SenderCount.REFUSED),
            num_cancelled=count(SenderCount.CANCELLED),
            num_failed=count(SenderCount.FAILED),
            num_sessions=count(SenderCount.SESSIONS),
            num_shared=count(SenderCount.SHARED),
            num_malformed_frames=count(SenderCount.MALFORMED_FRAMES),
            num_stale_frames=count(SenderCount.STALE_FRAMES),
            bytes_delivered=count(SenderCount.BYTES_DELIVERED),
        )

    def close(self) -> None:
        """See `interface.KvSenderInterface.close`."""
        if self._closed:
            return
        self._closed = True
        links = [*self._links.values(), *self._retired]
        for link in links:
            link.stop("the sender was closed")
        deadline_s = time.monotonic() + self._options.timeouts.join_s
        all_ended = True
        for link in links:
            left_s = max(JOIN_SLACK_S / 10, deadline_s - time.monotonic())
            if not link.join(left_s):
                all_ended = False
                _log.error("the thread that sends to %s did not end", link.address)
        self._links.clear()
        self._retired.clear()
        self._waker.close()
        if all_ended:
            self._context.term()

    def _link_to(self, peer: PeerAddress) -> SenderLink:
        """The link to a peer; one at another address is retired, since that server restarted."""
        key = (peer.server_id, peer.rank)
        link = self._links.get(key)
        if link is not None and link.address == peer:
            return link
        if link is not None:
            link.stop(f"{peer.server_id} moved to {peer.host}:{peer.control_port}")
            self._retired.append(link)
        self._retired = [retired for retired in self._retired if not retired.join(0)]
        heads, hello = self._heads_to(peer), self._options.hello
        layout = layout_of_heads(hello.layout, heads.num)
        hello = msgspec.structs.replace(hello, layout=layout, first_kv_head=heads.first)
        self._links[key] = link = SenderLink(
            peer,
            options=dataclasses.replace(self._options, hello=hello),
            context=self._context,
            publish=self._publish,
            publish_held=self._publish_held,
            counters=self._counters,
        )
        return link

    def _heads_to(self, peer: PeerAddress) -> HeadRange:
        heads = self._share.heads_to(peer.rank, peer.num_ranks)
        if heads is None:
            raise ValueError(
                f"rank {self._share.rank} of {self._share.tp_size} has nothing for rank "
                f"{peer.rank} of {peer.num_ranks} at {peer.server_id}"
            )
        return heads

    def _publish_held(self, news: HeldNews) -> None:
        """Called by the links' threads."""
        self._held.append(news)
        self._waker.set()

    def _publish(self, outcome: TransferOutcome) -> None:
        """Called by the links' threads and by our own."""
        self._counters.add(_STATUS_COUNT[outcome.status])
        if outcome.ok:
            self._counters.add(SenderCount.BYTES_DELIVERED, outcome.num_bytes)
        self._outcomes.append(outcome)
        self._waker.set()
