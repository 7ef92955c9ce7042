"""Transfers between servers of different tensor-parallel sizes, over loopback."""

from __future__ import annotations

import dataclasses
import select
from collections.abc import Iterator

import msgspec
import pytest
import torch

from streamfill.kv_transfer.head_copies import scatter_blocks
from streamfill.kv_transfer.interface import (
    OutgoingTransfer,
    PeerAddress,
    TransferOutcome,
    TransferStatus,
)
from streamfill.kv_transfer.layout import KvLayout
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.sender import KvSender
from streamfill.kv_transfer.shared_buffers import SharedBuffers
from streamfill.kv_transfer.slices import HeadShare
from streamfill.kv_transfer.source import StagedKv, paged_kv
from streamfill.kv_transfer.staging import gather
from streamfill.kv_transfer.timeouts import TransportTimeouts
from streamfill.messages.handoff import Abort, Accept, Complete, Hello, Refuse, Reject
from tests.unit.kv_transfer.builders import (
    CALM,
    HOST,
    LAYOUT,
    PATIENCE_S,
    RawSender,
    arrivals_of,
    hello,
    offer,
    outcomes_of,
    wait_until,
)
from tests.unit.kv_transfer.conftest import MakeReceiver, MakeSender

NUM_PAGES = 20


class _Rank:
    """A rank's pool: all heads of it are a part of one model's."""

    def __init__(self, share: HeadShare, page_size: int, whole: SharedBuffers | None) -> None:
        """``whole``: the pool of a server of one rank, whose KV this one has too; None: zeros."""
        self.share = share
        self.layout = msgspec.structs.replace(
            LAYOUT, num_kv_heads=share.heads.num, page_size=page_size
        )
        self.pool = SharedBuffers(self.layout, NUM_PAGES * page_size)
        if whole is not None:
            for ours, theirs in zip(self.buffers, _buffers(whole), strict=True):
                ours.copy_(theirs[:, share.heads.first : share.heads.end])

    @property
    def buffers(self) -> list[torch.Tensor]:
        return _buffers(self.pool)


def _buffers(pool: SharedBuffers) -> list[torch.Tensor]:
    return [*pool.k_buffers, *pool.v_buffers]


def _whole(num_heads: int, page_size: int) -> SharedBuffers:
    layout = msgspec.structs.replace(LAYOUT, num_kv_heads=num_heads, page_size=page_size)
    pool = SharedBuffers(layout, NUM_PAGES * page_size)
    generator = torch.Generator().manual_seed(5)
    for buffer in _buffers(pool):
        buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return pool


def _slots(pages: list[int], page_size: int) -> torch.Tensor:
    return torch.tensor(
        [page * page_size + offset for page in pages for offset in range(page_size)],
        dtype=torch.int64,
    )


def _to(receiver: KvReceiver, rank: int, num_ranks: int) -> PeerAddress:
    return PeerAddress("d0", HOST, receiver.port, rank, num_ranks)


def _outcomes(sender: KvSender, num: int) -> list[TransferOutcome]:
    """The next ones, also if they are of one transfer."""
    ended: list[TransferOutcome] = []
    while len(ended) < num:
        assert select.select([sender.fileno()], [], [], PATIENCE_S)[0], f"only {ended} ended"
        ended += sender.poll()
    return ended


def _hello(share: HeadShare, layout: KvLayout = LAYOUT, *, attempt: int = 1) -> Hello:
    """Of a sender rank that sends all that it holds."""
    return msgspec.structs.replace(
        hello(attempt=attempt),
        rank=share.rank,
        layout=msgspec.structs.replace(layout, num_kv_heads=share.heads.num),
        model_kv_heads=share.num_heads,
        first_kv_head=share.heads.first,
    )


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize(
    "sizes",
    [(4, 2, 1), (4, 1, 2), (4, 4, 2), (12, 3, 2), (12, 2, 3), (2, 4, 1), (2, 1, 4), (2, 4, 2)],
)
def test_every_rank_has_its_heads_in_its_pages(
    make_receiver: MakeReceiver,
    make_sender: MakeSender,
    sizes: tuple[int, int, int],
    *,
    is_shared: bool,
    page_size: int,
    same_host: bool,
) -> None:
    """Whatever ranks hold the KV; out of pages at random into others, several times. The sizes are
    the model's KV heads, the ranks that send and those that receive."""
    num_heads, num_senders, num_receivers = sizes
    whole = _whole(num_heads, page_size)
    senders = [
        _Rank(HeadShare(num_heads, num_senders, rank), page_size, whole)
        for rank in range(num_senders)
    ]
    receivers = [
        _Rank(HeadShare(num_heads, num_receivers, rank), page_size, None)
        for rank in range(num_receivers)
    ]
    ends = [make_receiver(layout=rank.layout, share=rank.share) for rank in receivers]
    sources: list[KvSender] = [
        make_sender(layout=rank.layout, share=rank.share, chunk_bytes=1000, same_host=same_host)
        for rank in senders
    ]
    generator = torch.Generator().manual_seed(num_heads)
    for number in range(2):
        pages, others = (
            torch.randperm(NUM_PAGES, generator=generator)[: 6 + number].tolist() for _ in range(2)
        )
        from_slots, to_slots = _slots(pages, page_size), _slots(others, page_size)
        in_turn = list(zip(sources, senders, strict=True))
        for source, rank in reversed(in_turn) if number else in_turn:
            kv = paged_kv(
                rank.layout,
                rank.pool.k_buffers,
                rank.pool.v_buffers,
                from_slots,
                buffers=rank.pool if is_shared else None,
            )
            sent = OutgoingTransfer(
                transfer_id=number,
                stream_id=1,
                token_ids=range(len(from_slots)),
                first_token=0,
                kv=kv,
            )
            if number:
                staged = gather(rank.layout, rank.pool.k_buffers, rank.pool.v_buffers, from_slots)
                sent = dataclasses.replace(sent, kv=StagedKv(staged))
            ranks = rank.share.receivers(num_receivers)
            for place in ranks:
                source.submit(_to(ends[place], place, num_receivers), sent)
            ended = _outcomes(source, len(ranks))
            assert all(outcome.ok for outcome in ended), ended
            assert {outcome.peer_rank for outcome in ended} == set(ranks)
        for end, rank in zip(ends, receivers, strict=True):
            incoming = arrivals_of(end)[number]
            scatter_blocks(
                rank.layout,
                incoming.staging,
                rank.pool.k_buffers,
                rank.pool.v_buffers,
                to_slots,
                blocks=incoming.blocks,
            )
            end.release(incoming)
            heads = rank.share.heads
            for ours, theirs in zip(rank.buffers, _buffers(whole), strict=True):
                expected = theirs[from_slots, heads.first : heads.end]
                assert torch.equal(ours[to_slots], expected)
            assert end.stats().staging_used_bytes == 0
            assert end.stats().bytes_received == incoming.staging.numel() + (
                6 * page_size * rank.layout.bytes_per_token if number else 0
            )
    for rank in (*senders, *receivers):
        rank.pool.close()
    whole.close()


def test_a_rank_without_anything_to_send_says_so(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """The other rank with the same heads sends them; and a number of ranks can be impossible."""
    share = HeadShare(2, 4, 1)
    layout = msgspec.structs.replace(LAYOUT, num_kv_heads=1)
    sender, receiver = make_sender(layout=layout, share=share), make_receiver()
    sent = OutgoingTransfer(
        transfer_id=1,
        stream_id=1,
        token_ids=(),
        first_token=0,
        kv=StagedKv(torch.empty(0, dtype=torch.uint8)),
    )
    with pytest.raises(ValueError, match="rank 1 of 4 has nothing for rank 0 of 1 at d0"):
        sender.submit(_to(receiver, 0, 1), sent)
    with pytest.raises(ValueError, match="3 ranks cannot share 2 KV heads"):
        sender.submit(_to(receiver, 0, 3), sent)
    assert sender.stats().num_pending == 0


def test_pools_that_do_not_have_the_heads_of_their_rank(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """Both endpoints stop the start."""
    for make in (make_receiver, make_sender):
        with pytest.raises(ValueError, match="holds 2 KV heads, but rank 1 of 2 has 4"):
            make(share=HeadShare(8, 2, 1))


@pytest.mark.parametrize(
    ("share", "page_size", "complaints"),
    [
        (HeadShare(4, 2), 1, ["the model's KV heads are 2 here and 4 there"]),
        (HeadShare(2, 2), 16, ["page_size is 1 here and 16 there"]),
        (HeadShare(4, 2), 16, ["page_size is 1", "KV heads are 2 here and 4 there"]),
    ],
)
def test_models_and_pages_that_differ_are_refused_at_connect(
    make_receiver: MakeReceiver, share: HeadShare, page_size: int, complaints: list[str]
) -> None:
    """Whatever the number of ranks, with the values of both sides."""
    receiver = make_receiver()
    layout = msgspec.structs.replace(LAYOUT, page_size=page_size)
    with RawSender(receiver.port) as peer:
        peer.send(_hello(share, layout))
        answer = peer.receive()
    assert isinstance(answer, Reject)
    assert all(complaint in answer.reason for complaint in complaints), answer


def test_heads_of_another_rank_are_refused_at_connect(make_receiver: MakeReceiver) -> None:
    """A sender that has other ideas of who holds what."""
    layout = msgspec.structs.replace(LAYOUT, num_kv_heads=1)
    receiver = make_receiver(layout=layout, share=HeadShare(2, 2, 1))
    with RawSender(receiver.port) as peer:
        peer.send(_hello(HeadShare(2, 2, 0)))
        answer = peer.receive()
    assert isinstance(answer, Reject)
    assert "KV heads 0 to 0 are offered, rank 1 of 2 here holds 1 to 1" in answer.reason


class _Halves:
    """Two sender ranks with one of two heads each, as bare sockets, and a receiver of both."""

    def __init__(self, receiver: KvReceiver, left: RawSender, right: RawSender) -> None:
        self.receiver = receiver
        self.ranks = (left, right)
        self.epochs = [
            rank.open(_hello(HeadShare(2, 2, place))).epoch for place, rank in enumerate(self.ranks)
        ]

    def offer(self, place: int, transfer_id: int = 1, **changes: object) -> object:
        """Offer a part without KV; returns the answer, or the last of two."""
        rank = self.ranks[place]
        nothing = offer(transfer_id, epoch=self.epochs[place], num_tokens=0, first_token=4)
        rank.send(msgspec.structs.replace(nothing, **changes))
        answer = rank.receive_reply()
        return rank.receive_reply() if isinstance(answer, Accept) else answer

    def begin(self, place: int, transfer_id: int = 1) -> None:
        """Offer a part with KV, which is accepted, and send none of it yet."""
        rank = self.ranks[place]
        some = offer(transfer_id, epoch=self.epochs[place])
        rank.send(msgspec.structs.replace(some, num_bytes=some.num_bytes // 2))
        assert isinstance(rank.receive_reply(), Accept)


@pytest.fixture
def timeouts() -> TransportTimeouts:
    """Of the receiver."""
    return CALM


@pytest.fixture
def halves(make_receiver: MakeReceiver, timeouts: TransportTimeouts) -> Iterator[_Halves]:
    receiver = make_receiver(timeouts=timeouts)
    left, right = RawSender(receiver.port), RawSender(receiver.port)
    with left, right:
        yield _Halves(receiver, left, right)


def test_it_is_complete_with_its_last_part(halves: _Halves) -> None:
    """Each part is answered at once; the server gets one transfer, and a part comes once."""
    assert isinstance(halves.offer(1), Complete)
    assert halves.receiver.stats().num_active == 1
    answer = halves.offer(1)
    assert isinstance(answer, Refuse)
    assert "offered before" in answer.reason
    assert halves.receiver.poll() == []
    assert isinstance(halves.offer(0), Complete)
    assert len(arrivals_of(halves.receiver)[1].blocks) == 2
    for place in (0, 1):
        answer = halves.offer(place)
        assert isinstance(answer, Refuse)
        assert "offered before" in answer.reason
    stats = halves.receiver.stats()
    assert (stats.num_active, stats.num_completed, stats.num_duplicates) == (0, 1, 3)


def test_parts_that_differ_are_given_up(halves: _Halves) -> None:
    """KV of different tokens must not become one transfer."""
    assert isinstance(halves.offer(0), Complete)
    answer = halves.offer(1, version=3)
    assert isinstance(answer, Refuse)
    assert "differ in version" in answer.reason
    answer = halves.offer(1)
    assert isinstance(answer, Refuse)
    assert "another part of transfer 1 was given up: its parts differ in version" in answer.reason
    assert halves.receiver.stats().num_active == 0
    assert halves.receiver.poll() == []


@pytest.mark.parametrize(
    "timeouts", [dataclasses.replace(CALM, group_setup_s=1.0)], ids=["short set-up"]
)
def test_a_part_that_fails_gives_up_all(halves: _Halves) -> None:
    """The staging of all is free, and what is offered later is refused."""
    halves.begin(0)
    assert halves.receiver.stats().staging_used_bytes > 0
    assert isinstance(halves.ranks[0].receive_reply(), Abort)  # nobody sets the group up
    wait_until(lambda: halves.receiver.stats().staging_used_bytes == 0)
    answer = halves.offer(1)
    assert isinstance(answer, Refuse)
    assert "another part of transfer 1 was given up" in answer.reason
    assert halves.receiver.stats().num_failed == 1


def test_a_part_that_its_sender_gives_up_ends_the_others(halves: _Halves) -> None:
    """Of the others nothing is delivered either, though their bytes came."""
    halves.begin(0)
    halves.begin(1)
    halves.ranks[0].send(Abort(transfer_id=1, epoch=halves.epochs[0], reason="cancelled"))
    for place in (0, 1):
        pair = halves.ranks[place].join_group(halves.epochs[place])
        content = StagedKv(torch.ones(2 * LAYOUT.bytes_per_token, dtype=torch.uint8))
        pair.send(content, 0, content.num_bytes)
        pair.flush()
        answer = halves.ranks[place].receive_reply()
        assert isinstance(answer, Abort), answer
        pair.close()
    assert halves.receiver.poll() == []
    wait_until(lambda: halves.receiver.stats().staging_used_bytes == 0)
    assert halves.receiver.stats().num_aborted == 1


@pytest.mark.parametrize("timeouts", [dataclasses.replace(CALM, parts_s=2.0)], ids=["short wait"])
def test_a_part_that_never_comes_is_not_waited_for(halves: _Halves) -> None:
    """After ``parts_s`` the staging of the one that came is free."""
    halves.begin(0)
    pair = halves.ranks[0].join_group(halves.epochs[0])
    content = StagedKv(torch.ones(2 * LAYOUT.bytes_per_token, dtype=torch.uint8))
    pair.send(content, 0, content.num_bytes)
    pair.flush()
    assert isinstance(halves.ranks[0].receive_reply(), Complete)
    assert halves.receiver.stats().staging_used_bytes > 0
    wait_until(lambda: halves.receiver.stats().staging_used_bytes == 0)
    pair.close()
    stats = halves.receiver.stats()
    assert (stats.num_failed, stats.num_active) == (1, 0)
    assert halves.receiver.poll() == []


def test_a_first_part_that_is_refused_takes_the_others_along(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """Memory for all parts is had with the first one, so none waits for another's."""
    receiver = make_receiver(memory_limit_bytes=600)
    layout = msgspec.structs.replace(LAYOUT, num_kv_heads=1)
    senders = [make_sender(layout=layout, share=HeadShare(2, 2, rank)) for rank in range(2)]
    for sender, complaint in zip(senders, ("768 bytes wanted", "another part"), strict=True):
        sent = OutgoingTransfer(
            transfer_id=1,
            stream_id=1,
            token_ids=range(4),
            first_token=0,
            kv=StagedKv(torch.ones(4 * layout.bytes_per_token, dtype=torch.uint8)),
        )
        sender.submit(_to(receiver, 0, 1), sent)
        outcome = outcomes_of(sender)[1]
        assert outcome.status is TransferStatus.REFUSED
        assert complaint in outcome.reason
    assert receiver.stats().staging_used_bytes == 0


def test_cancelling_reaches_every_part(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """A transfer that is queued for two ranks ends for both."""
    layout = msgspec.structs.replace(LAYOUT, num_kv_heads=1)
    sender = make_sender(timeouts=dataclasses.replace(CALM, session_s=20.0))
    ends = [make_receiver(layout=layout, share=HeadShare(2, 2, rank)) for rank in range(2)]
    for end in ends:
        end.close()
    sent = OutgoingTransfer(
        transfer_id=1,
        stream_id=1,
        token_ids=range(4),
        first_token=0,
        kv=StagedKv(torch.ones(4 * LAYOUT.bytes_per_token, dtype=torch.uint8)),
    )
    for rank, end in enumerate(ends):
        sender.submit(_to(end, rank, 2), sent)
    assert sender.stats().num_pending == 2
    sender.cancel(1)
    wait_until(lambda: sender.stats().num_cancelled == 2)
    assert {outcome.peer_rank for outcome in sender.poll()} == {0, 1}
