"""Any interleaving of operations on several streams, against a model that only knows tokens.

A prefill and a decode server share a fake network. After each rule the memory is checked for being
given out twice (`FakeEngine.check`), the router's view for gaps, and what the prefill server says
of its work for sums that hold. In the end every committed stream has exactly the tokens that the
model predicts, and all counters are back at their base.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from streamfill.kv_transfer.fake import FakeNetwork
from streamfill.kv_transfer.interface import TransferStatus
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.codec import unpack_ids
from streamfill.messages.common import HandoffTarget, Sampling, StreamAccount
from streamfill.messages.control import PreemptionMode
from tests.support.fake_engine import FakeEngine, next_token, predict
from tests.unit.serving.builders import (
    DecodeUnderTest,
    PrefillUnderTest,
    ServerUnderTest,
    cancel,
    commit,
    forget,
    generate,
    opened,
    splice,
)

_TOKEN = st.integers(0, 2)
"""Few, so that streams share prefixes."""
_EOS = frozenset({next_token([0]), next_token([1, 1]), next_token([2, 0, 1])})


@dataclass
class _Stream:
    stream_id: int
    prompt: list[int] = field(default_factory=list)
    seq: int = 0
    num_replaced: int = 0
    """Tokens that updates took away."""
    sampling: Sampling | None = None
    """None: not committed."""
    transfer_id: int | None = None
    """None: the prefill server answers alone."""
    answer: list[int] = field(default_factory=list)
    is_finished: bool = False
    has_moved: bool = False
    """The decode server was told to go on."""


class Cluster(RuleBasedStateMachine):
    """The router's part, in a few lines; messages arrive at once and in order."""

    @initialize(
        page_size=st.sampled_from([1, 4]),
        pool_tokens=st.sampled_from([96, 400]),
        max_requests=st.sampled_from([2, 16]),
        host_tokens=st.sampled_from([0, 12, 100, 2000]),
        mode=st.sampled_from(PreemptionMode),
        can_interrupt=st.booleans(),
    )
    def start(
        self,
        page_size: int,
        pool_tokens: int,
        max_requests: int,
        host_tokens: int,
        mode: PreemptionMode,
        *,
        can_interrupt: bool,
    ) -> None:
        self.network = FakeNetwork()

        def engine() -> FakeEngine:
            return FakeEngine(
                pool_tokens=pool_tokens,
                page_size=page_size,
                max_requests=max_requests,
                eos_token_ids=_EOS,
                host_tokens=host_tokens,
            )

        self.prefill = PrefillUnderTest(engine(), self.network, mode, can_interrupt=can_interrupt)
        self.decode = DecodeUnderTest(engine(), self.network)
        self.streams: dict[int, _Stream] = {}
        self.num_opened = 0

    @precondition(lambda self: len(self.streams) < 6)
    @rule(priority=st.integers(0, 1))
    def open(self, priority: int) -> None:
        self.num_opened += 1
        self.streams[self.num_opened] = _Stream(self.num_opened)
        self._turn(self.prefill, opened(self.num_opened, priority=priority))

    @precondition(lambda self: self._open_streams())
    @rule(data=st.data(), kept=st.sampled_from([1.0, 1.0, 0.7, 0.3, 0.0]))
    def extend_or_replace(self, data: st.DataObject, kept: float) -> None:
        stream = data.draw(st.sampled_from(self._open_streams()))
        keep = int(kept * len(stream.prompt))
        room = 60 - keep
        stream.num_replaced += len(stream.prompt) - keep
        new_ids = data.draw(st.lists(_TOKEN, max_size=min(room, 25)))
        stream.prompt[keep:] = new_ids
        stream.seq += 1
        message = splice(new_ids, keep=keep, seq=stream.seq, stream_id=stream.stream_id)
        self._turn(self.prefill, message)

    @precondition(lambda self: self._open_streams())
    @rule(
        data=st.data(),
        max_new_tokens=st.integers(1, 6),
        handoff=st.booleans(),
        last=st.lists(_TOKEN, min_size=1, max_size=4),
        arrival=st.sampled_from(["one turn", "two turns", "in the middle of a step"]),
    )
    def commit(
        self,
        data: st.DataObject,
        max_new_tokens: int,
        handoff: bool,
        last: list[int],
        arrival: str,
    ) -> None:
        stream = data.draw(st.sampled_from(self._open_streams()))
        keep = len(stream.prompt)
        stream.prompt += last
        stream.sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens)
        target: HandoffTarget | None = None
        if handoff:
            stream.transfer_id = 1000 + stream.stream_id
            target = HandoffTarget(
                transfer_id=stream.transfer_id, server_id="d0", host="", control_ports=(1,)
            )
        messages: list[r.Splice | r.Commit] = [
            splice(
                last,
                keep=keep,
                seq=stream.seq + 1,
                stream_id=stream.stream_id,
                commit_follows=True,
            ),
            commit(
                len(stream.prompt),
                seq=stream.seq + 2,
                stream_id=stream.stream_id,
                sampling=stream.sampling,
                handoff=target,
            ),
        ]
        if arrival == "in the middle of a step":
            self.prefill.interrupt(*messages)
            self._turn(self.prefill)
        elif arrival == "one turn":
            self._turn(self.prefill, *messages)
        else:
            for message in messages:
                self._turn(self.prefill, message)

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        stream_id = data.draw(st.sampled_from(sorted(self.streams)))
        del self.streams[stream_id]
        for server in (self.prefill, self.decode):
            self._turn(server, cancel(stream_id))

    @rule(num_passes=st.integers(1, 4))
    def compute(self, num_passes: int) -> None:
        for _ in range(num_passes):
            for server in (self.prefill, self.decode):
                self._turn(server)
                server.engine.advance()

    @rule(share=st.sampled_from([0.3, 1.0]))
    def lose_kv(self, share: float) -> None:
        for server in (self.prefill, self.decode):
            evictable = server.engine.memory().evictable_tokens
            server.engine.evict(int(share * evictable))
            server.engine.check()

    @rule(status=st.sampled_from([TransferStatus.FAILED, TransferStatus.REFUSED]))
    def break_the_next_transfer(self, status: TransferStatus) -> None:
        self.network.next_failures = deque([(status, "for a test")])

    @rule(is_holding=st.booleans())
    def delay_transfers(self, is_holding: bool) -> None:
        self.network.is_holding = is_holding
        if not is_holding:
            self.network.deliver_held()

    @rule()
    def let_time_pass(self) -> None:
        for server in (self.prefill, self.decode):
            server.clock.now_s += 11.0

    def teardown(self) -> None:
        if not hasattr(self, "network"):
            return
        self.delay_transfers(False)
        try:
            self._finish()
        finally:
            ServerUnderTest.close_all()

    def _finish(self) -> None:
        for stream in self._open_streams():
            self._turn(self.prefill, cancel(stream.stream_id))
            del self.streams[stream.stream_id]
        for _ in range(300):
            if all(stream.is_finished for stream in self.streams.values()):
                break
            self.compute(1)
        for stream in self.streams.values():
            assert stream.sampling is not None
            assert stream.is_finished, f"{stream} was never answered"
            assert stream.answer == predict(stream.prompt, stream.sampling, _EOS)
            for server in (self.prefill, self.decode):
                self._turn(server, forget(stream.stream_id))
        for server in (self.prefill, self.decode):
            server.assert_nothing_is_left()

    def _open_streams(self) -> list[_Stream]:
        return [stream for stream in self.streams.values() if stream.sampling is None]

    def _turn(self, server: ServerUnderTest, *messages: r.RouterToServer) -> None:
        server.turn(*messages)
        server.engine.check()
        sent, server.sent[:] = list(server.sent), []
        for message in sent:
            self._hear(server, message)

    def _hear(self, server: ServerUnderTest, message: s.ServerToRouter) -> None:
        assert not isinstance(message, s.StreamFailed), message
        stream = self.streams.get(getattr(message, "stream_id", 0))
        if stream is None:
            return
        match message:
            case s.Progress():
                assert message.num_computed_tokens <= message.num_known_tokens
            case s.Output():
                assert message.first_index == len(stream.answer), "a gap, or tokens sent twice"
                assert not stream.is_finished
                if server is self.prefill:
                    self._check_account(stream, message.account)
                stream.answer += unpack_ids(message.token_ids)
                stream.is_finished = message.finish is not None
                if not stream.is_finished and stream.transfer_id and not stream.has_moved:
                    stream.has_moved = True
                    assert stream.sampling is not None
                    go_on = generate(
                        stream.prompt,
                        stream.answer,
                        stream_id=stream.stream_id,
                        sampling=stream.sampling,
                        transfer_id=stream.transfer_id,
                    )
                    self._turn(self.decode, go_on)
            case s.HandoffReport(ok=False) if stream.has_moved:
                failed = r.HandoffFailed(
                    stream_id=stream.stream_id, attempt=1, transfer_id=message.transfer_id
                )
                self._turn(self.decode, failed)

    def _check_account(self, stream: _Stream, account: StreamAccount | None) -> None:
        """With the first token: every token of the prompt was computed or found, and nothing is
        counted twice but what was evicted, replaced, or computed for its logits."""
        if stream.answer:
            assert account is None
            return
        assert account is not None
        assert account.num_computed_tokens == sum(run.num_tokens for run in account.runs)
        surplus = (
            account.num_computed_tokens
            - account.num_recomputed_tokens
            + account.num_reused_tokens
            - len(stream.prompt)
        )
        assert surplus >= 0
        if not stream.num_replaced:
            assert surplus <= self.prefill.engine.facts.page_size
        if not self.prefill.engine.num_evicted_tokens:
            assert account.num_recomputed_tokens == 0
            assert not account.preemptions


TestCluster = Cluster.TestCase
TestCluster.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
