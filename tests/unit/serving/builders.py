"""A server's core around a fake engine, driven message by message and forward pass by pass."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import ClassVar, TypeVar

from decode_server.core import DecodeCore
from prefill_server.core import PrefillCore
from prefill_server.pushes import EarlyPush
from streamfill.kv_transfer.fake import FakeKvReceiver, FakeKvSender, FakeNetwork
from streamfill.kv_transfer.slices import HeadShare
from streamfill.links.server_link import Inbound
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import pack_ids, unpack_ids
from streamfill.messages.common import FinishReason, HandoffTarget, Sampling, StreamMode
from streamfill.messages.control import PreemptionMode
from streamfill.serving.core import ServingCore
from streamfill.serving.deciding import PolicySetting, PreemptionSetting
from tests.support.fake_engine import FakeEngine

M = TypeVar("M")

STEP_TOKENS = 64
GREEDY = Sampling(temperature=0.0, max_new_tokens=4)
TO_DECODE = HandoffTarget(transfer_id=900, server_id="d0", host="nowhere", control_ports=(1,))


ONE_RANK = HeadShare(num_heads=2)


class FakeClock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class ServerUnderTest:
    """What is common to both roles."""

    core: ServingCore
    _made: ClassVar[list[ServerUnderTest]] = []

    def __init__(self, engine: FakeEngine | None) -> None:
        self._made.append(self)
        self.engine = engine or FakeEngine()
        self.clock = FakeClock()
        self.sent: list[s.ServerToRouter] = []
        self.base = self.engine.memory()

    @classmethod
    def close_all(cls) -> None:
        """Close every server made so far."""
        while cls._made:
            cls._made.pop().close()

    def close(self) -> None:
        """End the fake transport."""

    def turn(self, *messages: Inbound) -> None:
        """One turn of the server's loop, without the forward pass behind it."""
        self.clock.now_s += 0.01
        self.core.kv.note_copies(self.engine.poll_copies())
        self.core.step(messages)

    def step(self, *messages: Inbound) -> None:
        """A turn, and a forward pass."""
        self.turn(*messages)
        self.engine.advance()

    def run(self, *messages: Inbound, max_steps: int = 400) -> None:
        """Steps until nothing is left to do."""
        self.step(*messages)
        for _ in range(max_steps):
            before = (self.engine.num_forward_passes, len(self.sent), len(self.engine.started))
            self.step()
            if before == (self.engine.num_forward_passes, len(self.sent), len(self.engine.started)):
                return
        raise AssertionError(f"still busy after {max_steps} steps")

    def take(self, kind: type[M], stream_id: int | None = None) -> list[M]:
        """Messages of one kind that were sent, and forget them."""
        taken: list[M] = []
        for message in list(self.sent):
            wanted = stream_id is None or getattr(message, "stream_id", None) == stream_id
            if isinstance(message, kind) and wanted:
                taken.append(message)
                self.sent.remove(message)
        return taken

    def progress(self, stream_id: int = 1) -> s.Progress:
        """The newest one."""
        return self.take(s.Progress, stream_id)[-1]

    def answer(self, stream_id: int = 1) -> tuple[list[int], FinishReason | None]:
        """All output of a stream that was sent since the last call, put together as the router
        does."""
        tokens: list[int] = []
        first: int | None = None
        finish: FinishReason | None = None
        for output in self.take(s.Output, stream_id):
            first = output.first_index if first is None else first
            assert output.first_index == first + len(tokens), "a gap, or tokens sent twice"
            assert finish is None, "output behind the end"
            tokens += unpack_ids(output.token_ids)
            finish = output.finish.reason if output.finish is not None else None
        return tokens, finish

    def assert_nothing_is_left(self) -> None:
        """All counters are back at their base; only the cache may have grown."""
        self.run()
        counters = self.core.counters(0)
        assert counters.num_streams == 0
        assert counters.num_waiting == counters.num_running == 0
        assert counters.num_pending_tokens == 0
        assert counters.num_used_tokens == self.base.used_tokens == 0
        assert counters.num_free_slots == counters.num_total_slots
        assert counters.num_host_tokens == 0
        assert counters.num_transfers == counters.staging_bytes == 0
        assert not any(page.streams for page in self.engine.cache.all_pages()), "tags pile up"


class PrefillUnderTest(ServerUnderTest):
    """A prefill server on one rank."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        network: FakeNetwork | None = None,
        mode: PreemptionMode = PreemptionMode.AUTO,
        *,
        can_interrupt: bool = False,
        early_push: EarlyPush = EarlyPush.OFF,
        share: HeadShare = ONE_RANK,
    ) -> None:
        super().__init__(engine)
        self.network = network or FakeNetwork()
        self.sender = FakeKvSender("p0", self.network)
        self.core: PrefillCore = PrefillCore(
            self.engine,
            self.sent.append,
            PolicySetting(can_interrupt=can_interrupt),
            self.sender,
            share=share,
            step_tokens=STEP_TOKENS,
            clock=self.clock,
            preemption=PreemptionSetting(mode=mode),
            early_push=early_push,
        )

    def close(self) -> None:
        self.sender.close()

    def turn(self, *messages: Inbound) -> None:
        self.core.poll_transfers()
        self.core.take_events(self.core.poll_events())
        super().turn(*messages)

    def interrupt(self, *messages: Inbound) -> int:
        """A turn, and a forward pass in whose middle the messages come, where that may be. Returns
        how often it was interrupted."""
        self.turn()
        engine, num_interruptions = self.engine, 0
        if not engine.may_interrupt:
            self.turn(*messages)
            return 0
        engine.begin()
        if engine.waiting_keys():
            engine.go_on()
            engine.advance()
            self.turn(*messages)
            return 0
        plan = self.core.interrupt(messages)
        while plan is not None:
            num_interruptions += 1
            self.clock.now_s += 0.01
            engine.advance()
            self.core.end_interruption(plan, 0.01)
            if engine.waiting_keys():
                break
            plan = self.core.interrupt((), again=True)
        engine.go_on()
        engine.advance()
        return num_interruptions

    def open(self, stream_id: int = 1, **fields: int) -> None:
        """Open a stream, nothing else."""
        self.turn(opened(stream_id, **fields))


class DecodeUnderTest(ServerUnderTest):
    """A decode server on one rank."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        network: FakeNetwork | None = None,
        server_id: str = "d0",
    ) -> None:
        super().__init__(engine)
        self.network = network or FakeNetwork()
        self.receiver = FakeKvReceiver(server_id, self.network)
        self.core: DecodeCore = DecodeCore(
            self.engine,
            self.sent.append,
            PolicySetting(name="fcfs"),
            self.receiver,
            step_tokens=STEP_TOKENS,
            clock=self.clock,
            server_id=server_id,
        )

    def close(self) -> None:
        self.receiver.close()

    def turn(self, *messages: Inbound) -> None:
        arrived = self.core.receive()
        self.core.take_events(self.core.poll_events())
        self.core.take_in(arrived)
        super().turn(*messages)


def tokens(num_tokens: int, start: int = 1) -> list[int]:
    """Some token ids; other ``start``, other ids from the first one on."""
    return [(start * 131 + index * 7) % 997 for index in range(num_tokens)]


def opened(stream_id: int = 1, *, attempt: int = 1, priority: int = 0) -> r.OpenStream:
    """An ``OpenStream``."""
    return r.OpenStream(
        stream_id=stream_id, attempt=attempt, mode=StreamMode.UPDATE, priority=priority
    )


def splice(
    token_ids: Sequence[int],
    *,
    keep: int = 0,
    seq: int = 1,
    stream_id: int = 1,
    attempt: int = 1,
    commit_follows: bool = False,
) -> r.Splice:
    """A ``Splice``."""
    return r.Splice(
        stream_id=stream_id,
        attempt=attempt,
        seq=seq,
        keep_tokens=keep,
        token_ids=pack_ids(token_ids),
        commit_follows=commit_follows,
    )


def commit(
    num_prompt_tokens: int,
    *,
    seq: int = 2,
    stream_id: int = 1,
    attempt: int = 1,
    sampling: Sampling = GREEDY,
    handoff: HandoffTarget | None = None,
) -> r.Commit:
    """A ``Commit``."""
    return r.Commit(
        stream_id=stream_id,
        attempt=attempt,
        seq=seq,
        num_prompt_tokens=num_prompt_tokens,
        sampling=sampling,
        handoff=handoff,
    )


def generate(
    prompt_ids: Sequence[int],
    output_ids: Sequence[int] = (),
    *,
    stream_id: int = 1,
    attempt: int = 1,
    sampling: Sampling = GREEDY,
    transfer_id: int | None = None,
) -> r.Generate:
    """A ``Generate``."""
    return r.Generate(
        stream_id=stream_id,
        attempt=attempt,
        prompt_ids=pack_ids(prompt_ids),
        output_ids=pack_ids(output_ids),
        sampling=sampling,
        transfer_id=transfer_id,
    )


def cancel(stream_id: int = 1, attempt: int = 1) -> r.Cancel:
    """A ``Cancel``."""
    return r.Cancel(stream_id=stream_id, attempt=attempt)


def forget(stream_id: int = 1, attempt: int = 1) -> r.Forget:
    """A ``Forget``."""
    return r.Forget(stream_id=stream_id, attempt=attempt)


def ids_array(token_ids: Sequence[int]) -> array[int]:
    """As the engine wants them."""
    return array("q", token_ids)
