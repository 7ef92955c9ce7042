"""Streams of two namespaces on one pair of servers: what one computed the other does not find."""

from __future__ import annotations

import msgspec
import pytest

from prefill_server.pushes import EarlyPush
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from streamfill.messages.common import StreamMode
from tests.support.fake_engine import KV_BYTES_PER_TOKEN, FakeEngine, predict
from tests.unit.serving.builders import (
    GREEDY,
    TO_DECODE,
    DecodeUnderTest,
    PrefillUnderTest,
    cancel,
    commit,
    forget,
    generate,
    ids_array,
    opened,
    splice,
    tokens,
)

PROMPT = tokens(202)
NUM_WHOLE = 200
"""In whole pages. The rest is computed with the first token, and never handed over."""
NUM_STEPS = 20
PAGE = 4


class Pair:
    """A prefill server and a decode server; streams have the namespaces that they are told."""

    def __init__(self, early_push: EarlyPush) -> None:
        engine = FakeEngine(page_size=PAGE)
        self.prefill = PrefillUnderTest(engine, early_push=early_push)
        self.decode = DecodeUnderTest(FakeEngine(page_size=PAGE), self.prefill.network)
        self._next_id = 0

    def serve(self, namespace: str) -> tuple[s.Output, s.HandoffReport, s.Output]:
        """One stream of `PROMPT` from its opening to its end: the prefill server's output, the
        report of the hand-off, and the decode server's first output."""
        self._next_id += 1
        number = self._next_id
        target = msgspec.structs.replace(TO_DECODE, transfer_id=900 + number)
        opening = msgspec.structs.replace(
            opened(number), mode=StreamMode.APPEND, namespace=namespace
        )
        self._run(opening, r.PushTo(stream_id=number, attempt=1, peer=target.peer))
        self._run(splice(PROMPT[:100], stream_id=number))
        self._run(splice(PROMPT[100:], keep=100, seq=2, stream_id=number))
        self._run(commit(len(PROMPT), seq=3, stream_id=number, handoff=target))
        first = self.prefill.take(s.Output, number)[0]
        report = self.prefill.take(s.HandoffReport, number)[0]
        answer = predict(PROMPT, GREEDY, frozenset())
        going_on = generate(PROMPT, answer[:1], stream_id=number, transfer_id=target.transfer_id)
        self.decode.run(msgspec.structs.replace(going_on, namespace=namespace))
        second = self.decode.take(s.Output, number)[0]
        for server in (self.prefill, self.decode):
            server.run(forget(number))
            server.assert_nothing_is_left()
        return first, report, second

    def _run(self, *messages: r.RouterToServer) -> None:
        self.prefill.step(*messages)
        for _ in range(NUM_STEPS):
            self.decode.step()
            self.prefill.step()


@pytest.mark.parametrize("early_push", [EarlyPush.OFF, EarlyPush.ON, EarlyPush.AUTO])
def test_a_prompt_is_computed_and_handed_over_once_per_namespace(early_push: EarlyPush) -> None:
    """All of it again for the second tenant, on both servers, however much the first one left
    there; for each tenant's second stream next to nothing. The shared namespace is one of its
    own."""
    pair = Pair(early_push)
    for namespace in ("a", "b", ""):
        before = pair.prefill.core.num_computed_tokens
        first, report, second = pair.serve(namespace)
        assert pair.prefill.core.num_computed_tokens - before == len(PROMPT)
        assert first.account is not None
        assert (first.account.num_reused_tokens, first.account.num_computed_tokens) == (
            0,
            len(PROMPT),
        )
        assert report.ok
        assert report.num_bytes == NUM_WHOLE * KV_BYTES_PER_TOKEN
        assert second.num_cached_tokens == NUM_WHOLE, "its own hand-off"
    for namespace in ("a", "b", ""):
        before = pair.prefill.core.num_computed_tokens
        first, report, _ = pair.serve(namespace)
        assert pair.prefill.core.num_computed_tokens - before <= PAGE
        assert first.account is not None
        assert first.account.num_reused_tokens == NUM_WHOLE
        assert report.ok
        if early_push is not EarlyPush.OFF:  # else nobody asks what is there
            assert report.num_bytes == 0
    assert pair.decode.core.num_computed_tokens <= 6 * PAGE, (
        "each time the last page, with the brought token"
    )


def test_a_decode_server_recomputes_rather_than_look_into_another_namespace() -> None:
    """Without a hand-off it has nothing of the prompt, though it lies there."""
    pair = Pair(EarlyPush.OFF)
    pair.serve("a")
    before = pair.decode.core.num_computed_tokens
    pair.decode.run(msgspec.structs.replace(generate(PROMPT, stream_id=50), namespace="b"))
    assert pair.decode.take(s.Output, 50)[0].num_cached_tokens == 0
    assert pair.decode.core.num_computed_tokens - before == len(PROMPT)


def test_what_others_hold_is_not_told_as_shared() -> None:
    """Two tenants with the same open context: each is alone with it."""
    server = PrefillUnderTest(FakeEngine(page_size=PAGE))
    for number, namespace in ((1, "a"), (2, "b"), (3, "b")):
        server.run(msgspec.structs.replace(opened(number), namespace=namespace))
        server.run(splice(PROMPT, stream_id=number))
    server.run(r.DescribeStreams(request_id=1))
    told = server.take(s.StreamsDescribed)[-1].streams
    shared = {each.stream_id: each.num_shared_tokens for each in told}
    assert shared[1] == 0
    assert shared[3] == NUM_WHOLE


def test_context_that_was_swapped_out_comes_back_to_its_own_namespace_only() -> None:
    """Memory pressure puts the first tenant's context into host memory. The second one, with the
    same context, computes it; the first one gets it back."""
    engine = FakeEngine(pool_tokens=400, page_size=PAGE, host_tokens=2000)
    server = PrefillUnderTest(engine)
    context = tokens(240)
    server.run(msgspec.structs.replace(opened(1), namespace="a"))
    server.run(splice(context, stream_id=1))
    server.clock.now_s += 5.0
    server.run(opened(9), splice(tokens(240, 9), stream_id=9))
    server.run(cancel(9))
    assert engine.host_tokens(ids_array(context), 0, namespace="a") > 0
    assert engine.host_tokens(ids_array(context), 0, namespace="b") == 0
    before, restored = server.core.num_computed_tokens, engine.num_restored_tokens
    server.run(msgspec.structs.replace(opened(2), namespace="b"))
    server.run(splice(context, stream_id=2))
    assert server.core.num_computed_tokens - before == 240
    assert engine.num_restored_tokens == restored
    server.run(cancel(2))
    server.clock.now_s += 5.0
    server.run(commit(240, stream_id=1))
    expected = predict(context, GREEDY, engine.facts.eos_token_ids)
    assert server.answer(1)[0] == expected
    assert engine.num_restored_tokens > restored
