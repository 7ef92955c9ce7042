"""KV that comes in parts, which are made smaller on their way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import msgspec
import pytest
import torch

from streamfill.kv_transfer.codecs import CODECS, CodecCost, codec_of_parts
from streamfill.kv_transfer.head_copies import layout_of_heads, scatter_blocks
from streamfill.kv_transfer.interface import OutgoingTransfer, PeerAddress
from streamfill.kv_transfer.pool import SMALLEST_BLOCK_BYTES
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.slices import HeadShare
from streamfill.kv_transfer.source import paged_kv
from streamfill.messages.handoff import Abort, Accept, Offer, Refuse, ToSender
from tests.unit.kv_transfer.builders import (
    CALM,
    HOST,
    LAYOUT,
    RawSender,
    arrivals_of,
    hello,
    offer,
    outcomes_of,
    wait_until,
)
from tests.unit.kv_transfer.conftest import MakeReceiver, MakeSender

NUM_TOKENS = 40
SHARES = (HeadShare(2, 2, 0), HeadShare(2, 2, 1))
HALF = layout_of_heads(LAYOUT, 1)
PART_BYTES = NUM_TOKENS * HALF.bytes_per_token
BLOCK_BYTES = SMALLEST_BLOCK_BYTES
"""What anything here takes of a pool."""


def _as_written(numbers: torch.Tensor, codec: str) -> torch.Tensor:
    return numbers if codec == "none" else numbers.to(getattr(torch, codec)).to(numbers.dtype)


@pytest.mark.parametrize(
    ("codecs", "codec"),
    [
        (("float16", "float16"), "float16"),
        (("none", "float8_e4m3fn"), "float8_e4m3fn"),
        (("bfloat16", "none"), "bfloat16"),
    ],
)
def test_each_part_is_decoded_into_its_heads(
    make_receiver: MakeReceiver,
    make_sender: MakeSender,
    monkeypatch: pytest.MonkeyPatch,
    codecs: tuple[str, str],
    codec: str,
) -> None:
    """Two ranks send out of their pages to one, each as it likes, after a first transfer that is
    exact; the staging of what is encoded is free as soon as its part is there."""
    monkeypatch.setattr(CodecCost, "pays", lambda *args, **kwargs: True)
    receiver = make_receiver()
    senders = [
        make_sender(layout=HALF, share=share, codec=name, chunk_bytes=1000, with_checksum=True)
        for share, name in zip(SHARES, codecs, strict=True)
    ]
    generator = torch.Generator().manual_seed(3)
    sizes = [LAYOUT.head_dim] * LAYOUT.num_layers + [LAYOUT.v_head_dim] * LAYOUT.num_layers
    whole = [torch.randn(NUM_TOKENS, 2, size, generator=generator) for size in sizes]
    from_slots, to_slots = (torch.randperm(NUM_TOKENS, generator=generator) for _ in range(2))
    num_received = 0
    for number in (1, 2):
        names = codecs if number == 2 else ("none", "none")
        for rank, (sender, name) in enumerate(zip(senders, names, strict=True)):
            pool = [buffer[:, rank : rank + 1].clone() for buffer in whole]
            k_buffers, v_buffers = pool[: LAYOUT.num_layers], pool[LAYOUT.num_layers :]
            sent = OutgoingTransfer(
                transfer_id=number,
                stream_id=1,
                token_ids=range(NUM_TOKENS),
                first_token=0,
                kv=paged_kv(HALF, k_buffers, v_buffers, from_slots, buffers=None),
            )
            sender.submit(PeerAddress("d0", HOST, receiver.port), sent)
            outcome = outcomes_of(sender)[number]
            assert outcome.ok, outcome.reason
            assert (outcome.codec, outcome.num_bytes) == (name, PART_BYTES)
            assert receiver.stats().staging_used_bytes == BLOCK_BYTES
            is_encoded = name != "none"
            num_received += CODECS[name].num_bytes(PART_BYTES, HALF) if is_encoded else PART_BYTES
        incoming = arrivals_of(receiver)[number]
        assert incoming.codec == (codec if number == 2 else "none")
        assert receiver.stats().bytes_received == num_received
        found = [torch.zeros_like(buffer) for buffer in whole]
        scatter_blocks(
            LAYOUT,
            incoming.staging,
            found[: LAYOUT.num_layers],
            found[LAYOUT.num_layers :],
            to_slots,
            blocks=incoming.blocks,
        )
        for ours, theirs in zip(found, whole, strict=True):
            for rank, name in enumerate(names):
                exact = theirs[from_slots, rank]
                assert torch.equal(ours[to_slots, rank], _as_written(exact, name))
        receiver.release(incoming)
        assert receiver.stats().staging_used_bytes == 0


def test_a_lossy_part_makes_all_of_it_lossy() -> None:
    """Whichever it is, and whatever the others are."""
    assert codec_of_parts(["none", "none"]) == "none"
    assert codec_of_parts(["none", "float16", "none"]) == "float16"
    assert codec_of_parts(iter(["bfloat16", "none"])) == "bfloat16"


class _Halves:
    """Two sender ranks with one of two heads each, as bare sockets; four tokens are 768 bytes, half
    of their heads as float16 192."""

    def __init__(self, receiver: KvReceiver, left: RawSender, right: RawSender) -> None:
        self.receiver = receiver
        self.ranks = (left, right)
        self.epochs = [
            rank.open(
                msgspec.structs.replace(hello(), rank=place, layout=HALF, first_kv_head=place)
            ).epoch
            for place, rank in enumerate(self.ranks)
        ]

    def offer(self, place: int, *, num_bytes: int = 192, **changes: object) -> ToSender:
        """Offer a part as float16; returns the answer."""
        some: Offer = offer(1, epoch=self.epochs[place])
        self.ranks[place].send(
            msgspec.structs.replace(some, codec="float16", num_bytes=num_bytes, **changes)
        )
        return self.ranks[place].receive_reply()

    def assert_refused(self, place: int, reason: str, **changes: object) -> None:
        answer = self.offer(place, **changes)  # type: ignore[arg-type]
        assert isinstance(answer, Refuse), answer
        assert reason in answer.reason


@pytest.fixture
def halves(make_receiver: MakeReceiver) -> Iterator[_Halves]:
    timeouts = replace(CALM, group_setup_s=2.0)
    receiver = make_receiver(memory_limit_bytes=2 * BLOCK_BYTES + 191, timeouts=timeouts)
    with ExitStack() as stack:
        left, right = (stack.enter_context(RawSender(receiver.port)) for _ in range(2))
        yield _Halves(receiver, left, right)


def test_the_encoded_size_is_that_of_the_part(halves: _Halves) -> None:
    """Neither that of all heads, nor that of the exact KV."""
    for num_bytes in (384, 768):
        halves.assert_refused(0, f"4 tokens are not {num_bytes} bytes", num_bytes=num_bytes)
    assert halves.receiver.stats().staging_used_bytes == 0
    assert isinstance(halves.offer(0), Accept)
    assert halves.receiver.stats().staging_used_bytes == 2 * BLOCK_BYTES


def test_a_part_that_cannot_be_decoded_for_lack_of_memory_gives_up_all(halves: _Halves) -> None:
    """The part under way ends with its lane, and all staging is free then."""
    assert isinstance(halves.offer(0), Accept)
    halves.assert_refused(1, "staging memory is short: 192 bytes wanted, 131072 of 131263")
    halves.assert_refused(1, "another part of transfer 1 was given up: staging memory is short")
    assert halves.receiver.stats().staging_used_bytes == 2 * BLOCK_BYTES
    assert isinstance(halves.ranks[0].receive_reply(), Abort)  # nobody sets the group up
    wait_until(lambda: halves.receiver.stats().staging_used_bytes == 0)
    assert halves.receiver.stats().num_active == 0
    assert halves.receiver.poll() == []


def test_a_first_part_that_finds_no_memory_leaves_none_taken(make_receiver: MakeReceiver) -> None:
    """Neither for the encoded bytes nor for the exact ones, whichever are too many."""
    for limit_bytes, wanted in ((191, 192), (BLOCK_BYTES + 767, 768)):
        receiver = make_receiver(memory_limit_bytes=limit_bytes)
        with RawSender(receiver.port) as left, RawSender(receiver.port) as right:
            halves = _Halves(receiver, left, right)
            halves.assert_refused(0, f"staging memory is short: {wanted} bytes wanted")
            halves.assert_refused(1, "another part of transfer 1 was given up")
        assert receiver.stats().staging_used_bytes == 0


def test_early_kv_is_allowed_by_the_memory_that_it_will_take(halves: _Halves) -> None:
    """All of its heads, decoded; not by what travels."""
    halves.receiver.allow_early(767)
    halves.assert_refused(0, "768 bytes, 767 left", is_early=True)
    assert halves.receiver.stats().staging_used_bytes == 0
    halves.receiver.allow_early(768)
    assert isinstance(halves.offer(0, transfer_id=2, is_early=True), Accept)
