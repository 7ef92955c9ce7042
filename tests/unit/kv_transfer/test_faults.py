"""Faults that are injected into every step of a transfer, over either data path."""

from __future__ import annotations

import random
import re
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from streamfill.errors import ConfigError
from streamfill.kv_transfer.faults import CHUNK_BYTES, VARIABLE, Fault, FaultPlan, Faults
from streamfill.kv_transfer.interface import (
    IncomingTransfer,
    OutgoingTransfer,
    TransferOutcome,
    TransferStatus,
)
from streamfill.kv_transfer.receiver import KvReceiver
from streamfill.kv_transfer.sender import KvSender
from streamfill.kv_transfer.shared_buffers import SharedBuffers
from streamfill.kv_transfer.source import paged_kv
from streamfill.kv_transfer.timeouts import TransportTimeouts
from tests.unit.kv_transfer.builders import (
    CALM,
    LAYOUT,
    address_of,
    arrivals_of,
    bytes_of,
    outcomes_of,
    transfer,
    wait_until,
)
from tests.unit.kv_transfer.conftest import MakeReceiver, MakeSender

SLOW_ONES: tuple[Fault, ...] = (
    Fault.SENDER_STALLS,
    Fault.RECEIVER_STALLS,
    Fault.ACCEPT_LOST,
    Fault.COMPLETE_LOST,
    Fault.COMPLETE_LATE,
)
"""Noticed by a time-out only."""
QUICK_ONES = tuple(fault for fault in Fault if fault not in SLOW_ONES)
MAY_ARRIVE = frozenset({Fault.SENDER_BREAKS_LAST, Fault.COMPLETE_LOST, Fault.COMPLETE_LATE})
"""The receiver has all bytes by then, and cannot know that the sender is not told."""

NUM_SLOTS = 600


def _pool_transfer(transfer_id: int, num_tokens: int, pool: SharedBuffers) -> OutgoingTransfer:
    """Of scattered pages, which a neighbour can map."""
    generator = torch.Generator().manual_seed(transfer_id)
    slots = torch.randperm(NUM_SLOTS, generator=generator)[:num_tokens]
    kv = paged_kv(LAYOUT, pool.k_buffers, pool.v_buffers, slots, buffers=pool)
    return OutgoingTransfer(
        transfer_id=transfer_id, stream_id=7, token_ids=range(num_tokens), first_token=0, kv=kv
    )


@pytest.fixture
def pool() -> SharedBuffers:
    """Random KV in memory that another process could map."""
    made = SharedBuffers(LAYOUT, NUM_SLOTS)
    for buffer in (*made.k_buffers, *made.v_buffers):
        buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)))
    return made


class _Bench:
    """A sender and a receiver with the same plan, and what became of the transfers."""

    def __init__(
        self,
        make_receiver: MakeReceiver,
        make_sender: MakeSender,
        plan: FaultPlan,
        timeouts: TransportTimeouts = CALM,
    ):
        self.faults = Faults(plan), Faults(plan)
        self.receiver: KvReceiver = make_receiver(faults=self.faults[1], timeouts=timeouts)
        self.sender: KvSender = make_sender(faults=self.faults[0], timeouts=timeouts)
        self.arrived: dict[int, IncomingTransfer] = {}

    def count(self, *faults: Fault) -> int:
        """How many happened on either side."""
        return sum(each.count(fault) for each in self.faults for fault in faults)

    def carry(self, sent: OutgoingTransfer) -> TransferOutcome:
        """To its outcome."""
        self.sender.submit(address_of(self.receiver), sent)
        return outcomes_of(self.sender)[sent.transfer_id]

    def receive(self, *sent: OutgoingTransfer) -> None:
        """Take in what has arrived; each came once and is what was sent."""
        contents = {each.transfer_id: bytes_of(each) for each in sent}
        for incoming in self.receiver.poll():
            assert incoming.transfer_id not in self.arrived, "twice"
            assert torch.equal(incoming.staging, contents[incoming.transfer_id]), "damaged"
            self.arrived[incoming.transfer_id] = incoming
            self.receiver.release(incoming)

    def rests(self) -> None:
        """No staging is held, nothing pends, and no second outcome comes."""
        wait_until(lambda: self.receiver.stats().num_active == 0)
        wait_until(lambda: self.receiver.stats().staging_used_bytes == 0)
        assert self.sender.poll() == []
        assert self.sender.stats().num_pending == 0


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("is_paged", [True, False], ids=["pages", "staged"])
@pytest.mark.parametrize("fault", QUICK_ONES, ids=lambda fault: str(fault.value))
def test_each_fault_that_is_noticed_at_once(
    make_receiver: MakeReceiver,
    make_sender: MakeSender,
    pool: SharedBuffers,
    fault: Fault,
    *,
    is_paged: bool,
    is_first: bool,
) -> None:
    """The transfer has one outcome and nothing wrong is delivered; the next one is well."""
    plan = FaultPlan(every=2, seed=1, kinds=(fault,))
    bench = _Bench(make_receiver, make_sender, plan)
    before, spoiled, after = (
        _pool_transfer(number, 400, pool) if is_paged else transfer(number, 400)
        for number in (1, 2, 3)
    )
    if not is_first:
        assert bench.carry(before).ok
    outcome = bench.carry(spoiled)
    assert outcome.status is (
        TransferStatus.REFUSED if fault is Fault.OFFER_REFUSED else TransferStatus.FAILED
    )
    assert bench.count(fault) == 1
    assert bench.carry(after).ok
    wait_until(lambda: bench.receiver.stats().num_active == 0)
    bench.receive(before, spoiled, after)
    # A neighbour that maps the pages reads ahead: it may have them all when the sender breaks.
    may_arrive = fault in MAY_ARRIVE or (is_paged and fault is Fault.SENDER_BREAKS_MIDDLE)
    assert {3} <= set(bench.arrived) <= ({1, 2, 3} if may_arrive else {1, 3})
    # Whatever broke the link ended the session.
    is_new = fault is not Fault.OFFER_REFUSED
    assert bench.sender.stats().num_sessions == 1 + is_new
    if not is_first:
        assert (bench.arrived[3].epoch > bench.arrived[1].epoch) is is_new
    bench.rests()
    pool.close()


@pytest.mark.parametrize("fault", SLOW_ONES, ids=lambda fault: str(fault.value))
def test_each_fault_that_takes_a_time_out(
    make_receiver: MakeReceiver, make_sender: MakeSender, fault: Fault
) -> None:
    """As above; what comes after the time-out finds nobody who waits for it."""
    plan = FaultPlan(every=2, seed=1, kinds=(fault,))
    timeouts = replace(CALM, reply_s=2.0, chunk_s=2.0)
    bench = _Bench(make_receiver, make_sender, plan, timeouts)
    sent = [transfer(number, 400) for number in (1, 2, 3)]
    assert [bench.carry(each).status for each in sent] == [
        TransferStatus.DELIVERED,
        TransferStatus.FAILED,
        TransferStatus.DELIVERED,
    ]
    assert bench.count(fault) == 1
    wait_until(lambda: bench.receiver.stats().num_active == 0)
    bench.receive(*sent)
    assert set(bench.arrived) == ({1, 2, 3} if fault in MAY_ARRIVE else {1, 3})
    assert bench.arrived[3].epoch > bench.arrived[1].epoch
    bench.rests()
    if fault is Fault.COMPLETE_LATE:
        # The sender's last word about a transfer that is over here, and a word to a closed session.
        wait_until(lambda: bench.receiver.stats().num_stale_frames == 2)


@pytest.mark.parametrize("seed", range(3))
def test_many_transfers_of_which_every_third_is_spoiled(
    make_receiver: MakeReceiver, make_sender: MakeSender, pool: SharedBuffers, seed: int
) -> None:
    """Two senders, all sizes, both sources: each transfer has one outcome, which is true."""
    plan = FaultPlan(every=3, seed=seed, kinds=QUICK_ONES)
    draw = random.Random(seed)
    faults = [Faults(plan) for _ in range(3)]
    receiver = make_receiver(faults=faults[0])
    senders = [make_sender(f"p{number}", faults=faults[1 + number]) for number in range(2)]
    sent: dict[int, OutgoingTransfer] = {}
    outcomes: dict[int, TransferOutcome] = {}
    contents: dict[int, bytes] = {}
    for number in range(1, 61):
        num_tokens = draw.choice([0, 1, 3, 90, 400])
        is_paged = num_tokens > 0 and draw.random() < 0.5
        sent[number] = (
            _pool_transfer(number, num_tokens, pool) if is_paged else transfer(number, num_tokens)
        )
        senders[number % 2].submit(address_of(receiver), sent[number])

    def take() -> None:
        for incoming in receiver.poll():
            assert incoming.transfer_id not in contents, "twice"
            contents[incoming.transfer_id] = bytes(incoming.staging.numpy())
            receiver.release(incoming)

    for sender in senders:
        while len(outcomes) < 60 and sender.stats().num_pending:
            ended = outcomes_of(sender)
            assert not ended.keys() & outcomes.keys()
            outcomes |= ended
            take()
    wait_until(lambda: receiver.stats().num_active == 0)
    take()
    assert outcomes.keys() == sent.keys()
    for number, content in contents.items():
        assert content == bytes(bytes_of(sent[number]).numpy())
    for number, outcome in outcomes.items():
        assert not outcome.ok or number in contents
        assert outcome.ok or plan.fault_of(number) is not None, outcome
    num_injected = sum(each.count(kind) for each in faults for kind in Fault)
    # A transfer without bytes has no data path that could break.
    assert 8 <= num_injected <= 20
    wait_until(lambda: receiver.stats().staging_used_bytes == 0)
    pool.close()


def test_without_a_checksum_no_byte_is_damaged(
    make_receiver: MakeReceiver, make_sender: MakeSender
) -> None:
    """Nobody would notice, and a test would blame the transport for it."""
    faults = Faults(FaultPlan(every=1, seed=1, kinds=(Fault.DAMAGED,)))
    receiver, sender = make_receiver(faults=faults), make_sender()
    sent = transfer(1, 400)
    sender.submit(address_of(receiver), sent)
    assert outcomes_of(sender)[1].ok
    incoming = arrivals_of(receiver)[1]
    assert torch.equal(incoming.staging, bytes_of(sent))
    receiver.release(incoming)
    assert faults.count(Fault.DAMAGED) == 0


def test_a_plan_of_the_environment(
    make_receiver: MakeReceiver, make_sender: MakeSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Endpoints that are told nothing else go by it."""
    monkeypatch.setenv(VARIABLE, "every=1,seed=3,kinds=damaged")
    receiver, sender = make_receiver(), make_sender()
    sender.submit(address_of(receiver), transfer(1, 400))
    outcome = outcomes_of(sender)[1]
    assert outcome.status is TransferStatus.FAILED
    assert "checksum" in outcome.reason
    wait_until(lambda: receiver.stats().staging_used_bytes == 0)


def test_no_plan_means_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert Faults.from_environment() is None


def test_a_plan_is_the_same_on_both_sides() -> None:
    """It depends on the seed and the id only, spoils every n-th id, and uses every kind."""
    plan = FaultPlan.parse(" every=5, seed=7 ")
    assert plan == FaultPlan(every=5, seed=7, kinds=tuple(Fault))
    drawn = [plan.fault_of(number) for number in range(5_000)]
    assert [fault is not None for fault in drawn] == [n % 5 == 0 for n in range(5_000)]
    assert set(drawn) == {None, *Fault}
    assert drawn != [FaultPlan(every=5, seed=8).fault_of(number) for number in range(5_000)]
    assert FaultPlan.parse("every=1,seed=1,kinds=damaged+accept_lost").kinds == (
        Fault.DAMAGED,
        Fault.ACCEPT_LOST,
    )


def test_faults_happen_only_while_the_file_is_there(tmp_path: Path) -> None:
    """So that a test can begin and end the faults of a running cluster."""
    file = tmp_path / "on"
    plan = FaultPlan.parse(f"every=1,seed=1,while={file}")
    assert plan.fault_of(1) is None
    file.touch()
    assert plan.fault_of(1) is not None
    file.unlink()
    assert plan.fault_of(1) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "every=5",
        "seed=1",
        "every=0,seed=1",
        "every=-5,seed=1",
        "every=x,seed=1",
        "every=5,seed=",
        "every=5,seed=1,",
        "every=5,seed=1,every=6",
        "every=5,seed=1,kinds=",
        "every=5,seed=1,kinds=fire",
        "every=5,seed=1,colour=red",
    ],
)
def test_a_malformed_plan_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variable, its value and how it is written; nothing is started."""
    before = set(threading.enumerate())
    monkeypatch.setenv(VARIABLE, text)
    wanted = f"{VARIABLE} = {text!r}: .*write every=N,seed=N"
    with pytest.raises(ConfigError, match=re.sub(r"([=+])", r"\\\1", wanted)):
        KvSender("p0", LAYOUT)
    with pytest.raises(ConfigError, match="unset it"):
        KvReceiver("d0", LAYOUT, "127.0.0.1", memory_limit_bytes=1 << 20)
    assert set(threading.enumerate()) <= before


def test_chunks_are_small_enough_for_a_middle() -> None:
    """The transfers above have several chunks, so that each step is another one."""
    assert 400 * LAYOUT.bytes_per_token > 4 * CHUNK_BYTES
