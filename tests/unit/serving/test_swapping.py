"""KV that memory pressure takes from a stream: how it goes, how it comes back, what is told."""

from __future__ import annotations

from array import array

import msgspec
import pytest

from prefill_server.host_index import block_keys
from streamfill.engine.interface import ExportedKv
from streamfill.kv_transfer.fake import FakeKvReceiver
from streamfill.messages import server_to_router as s
from streamfill.messages.common import HandoffTarget
from streamfill.messages.control import PreemptionAction, PreemptionMode, Residency
from streamfill.messages.router_to_server import FlushCache
from streamfill.serving.core import DONE_RETENTION_S
from tests.support.fake_cache import CachedPage
from tests.support.fake_engine import FakeEngine, predict
from tests.unit.serving.builders import (
    GREEDY,
    STEP_TOKENS,
    TO_DECODE,
    PrefillUnderTest,
    cancel,
    commit,
    forget,
    generate,
    opened,
    splice,
    tokens,
)

SIZE = 240
"""Tokens of a context; a pool has room for one and a half."""


def _server(
    mode: PreemptionMode = PreemptionMode.AUTO, host_tokens: int = 2000, pool_tokens: int = 400
) -> PrefillUnderTest:
    engine = FakeEngine(pool_tokens=pool_tokens, page_size=4, host_tokens=host_tokens)
    return PrefillUnderTest(engine, mode=mode)


def _fill(server: PrefillUnderTest, *stream_ids: int, size: int = SIZE) -> None:
    for stream_id in stream_ids:
        server.run(opened(stream_id))
        ids = tokens(size, stream_id)
        server.run(splice(ids, stream_id=stream_id))
        server.clock.now_s += 5.0


def _commit(server: PrefillUnderTest, stream_id: int, size: int = SIZE) -> None:
    server.run(commit(size, stream_id=stream_id, handoff=None))
    expected = predict(tokens(size, stream_id), GREEDY, server.engine.facts.eos_token_ids)
    assert server.answer(stream_id)[0] == expected


def _account(server: PrefillUnderTest, stream_id: int, size: int = SIZE) -> s.Output:
    server.run(commit(size, stream_id=stream_id, handoff=None))
    return next(output for output in server.take(s.Output, stream_id) if output.account)


def test_swapped_out_context_is_not_computed_again() -> None:
    server = _server()
    _fill(server, 1, 2)
    assert server.engine.cached_tokens(server.core._records[1].ids, namespace="") < SIZE
    before = server.core.num_computed_tokens
    _commit(server, 1)
    assert server.core.num_computed_tokens - before <= 4, "only the last page, for its logits"
    assert server.core.kv.num_recomputed_tokens == 0
    assert server.engine.num_restored_tokens > 0
    assert server.core.kv.num_swap_outs > 0
    assert server.core.kv.num_swap_ins > 0


@pytest.mark.parametrize("mode", [PreemptionMode.RECOMPUTE, PreemptionMode.NONE])
def test_without_copies_it_is_computed_again(mode: PreemptionMode) -> None:
    server = _server(mode)
    _fill(server, 1, 2)
    _commit(server, 1)
    assert server.core.kv.num_recomputed_tokens > 0
    assert server.core.kv.num_swap_outs == 0


@pytest.mark.parametrize("host_tokens", [0, 8, 40, 10_000])
@pytest.mark.parametrize("mode", PreemptionMode)
def test_any_host_memory_gives_the_same_answers(mode: PreemptionMode, host_tokens: int) -> None:
    server = _server(mode, host_tokens)
    _fill(server, 1, 2, 3, 4)
    for stream_id in (2, 1, 4, 3):
        _commit(server, stream_id)
        server.run(cancel(stream_id))
    server.assert_nothing_is_left()


def test_the_second_time_is_free() -> None:
    """What was swapped in keeps its copy."""
    server = _server()
    _fill(server, 1, 2)
    server.run(splice(tokens(8, 77), keep=SIZE, seq=2, stream_id=1))  # 1 comes back, 2 goes
    server.clock.now_s += 5.0
    copied = server.core.kv.swap_out_bytes
    server.run(splice(tokens(8, 78), keep=SIZE, seq=2, stream_id=2))  # 2 comes back, 1 goes
    assert server.core.kv.swap_in_bytes > 0
    new_bytes = server.core.kv.swap_out_bytes - copied
    assert new_bytes <= 16 * 4, "only what was new"


def test_telemetry_says_where_it_is() -> None:
    server = _server(pool_tokens=260)
    _fill(server, 1, 2)
    first, second = server.core.telemetry()
    assert second.residency is Residency.DEVICE
    assert first.was_preempted
    assert first.num_host_tokens > SIZE // 2
    assert first.num_computed_tokens + first.num_host_tokens == SIZE
    assert not second.was_preempted


@pytest.mark.parametrize(
    ("mode", "action"),
    [
        (PreemptionMode.AUTO, PreemptionAction.SWAP),
        (PreemptionMode.RECOMPUTE, PreemptionAction.RECOMPUTE),
    ],
)
def test_the_account_tells_predicted_and_actual_cost(
    mode: PreemptionMode, action: PreemptionAction
) -> None:
    server = _server(mode)
    _fill(server, 1, 2)
    account = _account(server, 1).account
    assert account is not None
    (loss,) = account.preemptions
    assert loss.action == action.value
    assert loss.predicted_s is not None
    assert loss.actual_s is not None
    assert loss.predicted_s > 0
    assert loss.actual_s >= 0
    assert "idle for" in loss.reason


def test_what_is_not_in_host_memory_is_priced_too() -> None:
    """It is computed again, which costs far more than the copy of the rest."""
    server = _server(PreemptionMode.SWAP)
    _fill(server, 1, 2)
    record = server.core._records[1]
    assert record.account.num_lost_tokens == record.num_host

    def predicted_s(num_host: int) -> float:
        record.num_host = num_host
        server.core.kv.price_loss(record)
        loss = record.account.message(server.clock.now_s).preemptions[-1]
        assert loss.predicted_s is not None
        return loss.predicted_s

    all_copied, most_copied = predicted_s(record.num_host), predicted_s(record.num_host - 8)
    half_copied, none_copied = predicted_s(record.num_host // 2), predicted_s(0)
    assert most_copied <= all_copied, "the end of a block comes back with other tokens"
    assert 2 * all_copied < half_copied < none_copied


def test_an_update_finds_the_common_prefix_on_the_host() -> None:
    server = _server()
    _fill(server, 1, 2)
    before = server.core.num_computed_tokens
    server.run(splice(tokens(20, 9), keep=200, seq=2, stream_id=1))
    assert server.core.num_computed_tokens - before == 20
    assert server.core.kv.num_recomputed_tokens == 0


def test_copies_of_what_an_update_replaced_make_room() -> None:
    """Nobody will come back for them; they are found if somebody does."""
    server = _server(PreemptionMode.SWAP, pool_tokens=260)
    _fill(server, 1, 2)
    num_before = server.engine.host_room().num_free_tokens
    assert server.core._records[1].num_host > SIZE / 2
    server.run(splice(tokens(20, 9), keep=8, seq=2, stream_id=1))
    assert server.engine.host_room().num_free_tokens >= num_before + SIZE / 2
    old = array("q", tokens(SIZE, 1))
    assert server.engine.host_tokens(old, 0, namespace="") > SIZE / 2


@pytest.mark.parametrize("end", ["nobody", "cancelled", "replaced"])
def test_copies_of_a_prefix_stay_for_others(end: str) -> None:
    """Also while its KV is in host memory alone, where no node of the tree says whose it is."""
    server = _server(PreemptionMode.SWAP, host_tokens=400)
    shared = tokens(160, 50)
    for stream_id in (1, 2):
        own = tokens(20, stream_id)
        server.run(opened(stream_id), splice([*shared, *own], stream_id=stream_id))
        server.clock.now_s += 1.0
    _fill(server, 3, size=380)
    assert server.core._records[2].num_computed < 40
    if end == "cancelled":
        server.run(cancel(1))
    elif end == "replaced":
        server.run(splice([], keep=0, seq=2))
    for stream_id in (4, 5):
        _fill(server, stream_id, size=380)
    keys = block_keys(array("q", shared), server.engine.facts.page_size)
    assert server.engine.host.num_present(keys) == len(keys)


def test_the_mode_can_be_changed() -> None:
    server = _server()
    server.core.decider.set_preemption(PreemptionMode.RECOMPUTE)
    _fill(server, 1, 2)
    assert server.core.kv.num_swap_outs == 0
    server.core.decider.set_preemption(PreemptionMode.SWAP)
    _fill(server, 3)
    assert server.core.kv.num_swap_outs > 0


def test_who_would_go_next_is_copied_ahead() -> None:
    """While nothing is to be computed and memory is short; then taking it costs no copy."""
    server = _server()
    _fill(server, 1)
    assert server.core.kv.swap_out_bytes == SIZE * 4
    assert server.engine.cached_tokens(server.core._records[1].ids, namespace="") == SIZE
    _fill(server, 2)
    assert server.engine.host.num_present(_keys(server, 1)) == SIZE // 4


class _HostBlocks(FakeEngine):
    """Host memory keeps whole blocks of 16 tokens, as the swap engine's does."""

    def copy_ahead(self, token_ids: array[int], *, namespace: str) -> int:
        whole = len(token_ids) - len(token_ids) % 16
        return super().copy_ahead(token_ids[:whole], namespace=namespace)


def test_all_who_would_go_next_are_copied_ahead() -> None:
    """What is less than a block at the end of the first one does not pass for full host memory."""
    engine = _HostBlocks(pool_tokens=400, host_tokens=2000)
    server = PrefillUnderTest(engine, mode=PreemptionMode.SWAP)
    _fill(server, 1, 2, size=150)
    server.turn()
    assert [server.core._records[stream_id].num_saved for stream_id in (1, 2)] == [144, 144]


@pytest.mark.parametrize("mode", [PreemptionMode.RECOMPUTE, PreemptionMode.NONE])
def test_nothing_is_copied_ahead_without_copies(mode: PreemptionMode) -> None:
    server = _server(mode)
    _fill(server, 1)
    assert server.core.kv.swap_out_bytes == 0


def test_context_comes_back_before_its_next_segment() -> None:
    """Of a stream whose pauses say when that will be, into memory that nobody needs."""
    server = _server(pool_tokens=2000)
    server.run(opened(1))
    for seq in (1, 2, 3):
        server.run(splice(tokens(80, seq), keep=80 * (seq - 1), seq=seq, stream_id=1))
        server.clock.now_s += 10.0
    record = server.core._records[1]
    server.engine.copy_ahead(record.ids, namespace="")
    server.engine.evict(240)
    server.clock.now_s = record.last_splice_s + 5.0
    server.turn()
    assert (record.num_computed, record.num_host) == (0, 240), "too early"
    expected_s = record.expected_next_s()
    assert expected_s is not None
    server.clock.now_s = expected_s - 0.5
    server.turn()
    assert (record.num_computed, record.num_host) == (240, 0)


def _keys(server: PrefillUnderTest, stream_id: int) -> list[bytes]:
    return block_keys(server.core._records[stream_id].ids, server.engine.facts.page_size)


def test_the_clients_hint_counts_for_more_than_its_pauses() -> None:
    server = _server(pool_tokens=2000)
    server.run(opened(1))
    for seq in (1, 2, 3):
        message = splice(tokens(80, seq), keep=80 * (seq - 1), seq=seq, stream_id=1)
        hint = 40.0 if seq == 3 else None
        server.run(msgspec.structs.replace(message, next_in_s=hint))
        server.clock.now_s += 10.0
    record = server.core._records[1]
    (telemetry,) = server.core.telemetry()
    assert telemetry.expected_next_s == pytest.approx(
        record.last_splice_s + 40.0 - server.clock.now_s
    )
    server.run(splice(tokens(80, 4), keep=240, seq=4, stream_id=1))
    (telemetry,) = server.core.telemetry()
    assert telemetry.expected_next_s is not None
    assert telemetry.expected_next_s < 11.0, "a hint holds for one segment"


def _answered(server: PrefillUnderTest, stream_id: int, keep_s: float) -> None:
    """A stream from its opening to the router's last word."""
    server.run(opened(stream_id))
    ids = tokens(SIZE, stream_id)
    server.run(splice(ids, stream_id=stream_id))
    message = commit(SIZE, stream_id=stream_id, handoff=None)
    server.run(msgspec.structs.replace(message, keep_s=keep_s))
    server.run(forget(stream_id))


@pytest.mark.parametrize("handoff", [None, TO_DECODE])
def test_a_kept_stream_may_be_forgotten_before_its_server_is_through(
    handoff: HandoffTarget | None,
) -> None:
    """The router ended the answer at a stop string, or a short one came before the end of the
    hand-off. What is under way ends, and the KV is kept."""
    server = _server(host_tokens=2 * SIZE)
    server.network.is_holding = True
    receiver = FakeKvReceiver("d0", server.network)
    sampling = msgspec.structs.replace(GREEDY, max_new_tokens=100)
    server.run(opened(1), splice(tokens(SIZE, 1), stream_id=1))
    message = commit(SIZE, stream_id=1, sampling=sampling, handoff=handoff)
    server.step(msgspec.structs.replace(message, keep_s=600.0))
    server.step()
    server.step(forget(1))
    server.run()
    counters = server.core.counters(0)
    assert (counters.num_streams, counters.num_running, counters.num_transfers) == (0, 0, 0)
    _fill(server, 2, 3)
    server.run(cancel(2), cancel(3))
    assert _comes_back(server, 4, 1) <= 12
    server.clock.now_s += 601.0
    server.run(cancel(4))
    server.assert_nothing_is_left()
    receiver.close()


def test_what_a_commit_computed_is_kept_too() -> None:
    """All of a prompt that came in one piece with its commit."""
    server = _server(host_tokens=2 * SIZE)
    message = commit(SIZE, stream_id=1, handoff=None)
    server.run(
        opened(1),
        splice(tokens(SIZE, 1), stream_id=1, commit_follows=True),
        msgspec.structs.replace(message, keep_s=600.0),
    )
    server.run(forget(1))
    (telemetry,) = server.core.telemetry()
    assert telemetry.num_computed_tokens == SIZE
    _fill(server, 2, 3)
    server.run(cancel(2), cancel(3))
    assert _comes_back(server, 4, 1) <= 12


def test_the_time_to_keep_begins_when_the_whole_answer_is_there() -> None:
    """A decode server wrote on it for longer than that."""
    server = _server()
    server.run(opened(1), splice(tokens(SIZE, 1)))
    message = commit(SIZE, stream_id=1, handoff=TO_DECODE)
    server.run(msgspec.structs.replace(message, keep_s=60.0))
    for silence_s in (100.0, DONE_RETENTION_S, 30.0):
        server.clock.now_s += silence_s
        server.run()
    server.run(forget(1))
    server.clock.now_s += 59.0
    server.run()
    (telemetry,) = server.core.telemetry()
    assert telemetry.expected_next_s is not None
    server.clock.now_s += 2.0
    server.run()
    server.assert_nothing_is_left()


def test_a_kept_stream_that_is_cancelled_is_let_go() -> None:
    server = _server()
    _answered(server, 1, 600.0)
    server.run(cancel(1))
    server.assert_nothing_is_left()


def _comes_back(server: PrefillUnderTest, stream_id: int, old_id: int) -> int:
    """A prompt that begins with the old one; returns how many tokens were computed for it."""
    before = server.core.num_computed_tokens
    server.run(opened(stream_id))
    ids = [*tokens(SIZE, old_id), *tokens(8, 99)]
    server.run(splice(ids, stream_id=stream_id))
    return server.core.num_computed_tokens - before


def test_a_kept_stream_is_swapped_and_comes_back() -> None:
    """As an agent does behind its tool; without it, its KV is a leftover that is dropped."""
    kept, left = (_server(host_tokens=2 * SIZE) for _ in range(2))
    for server, keep_s in ((kept, 600.0), (left, 0.0)):
        _answered(server, 1, keep_s)
        _fill(server, 2, 3)
        server.run(cancel(2), cancel(3))
    assert _comes_back(left, 4, 1) > SIZE / 2
    assert _comes_back(kept, 4, 1) <= 12


def test_nobody_is_kept_for_longer_than_was_said() -> None:
    server = _server()
    _answered(server, 1, 600.0)
    assert len(server.core.telemetry()) == 1
    assert server.core.num_streams == 0
    server.clock.now_s += 601.0
    server.run()
    assert server.core.telemetry() == ()
    server.assert_nothing_is_left()


def test_emptying_the_caches_lets_the_kept_go() -> None:
    server = _server()
    _answered(server, 1, 600.0)
    server.run(FlushCache(request_id=1))
    assert server.take(s.CacheFlushed)[0].ok
    server.assert_nothing_is_left()


def test_what_is_refused_lets_nobody_go() -> None:
    """A stream is open, so the caches are not emptied, and the kept one is still expected."""
    server = _server()
    _answered(server, 1, 600.0)
    server.run(opened(2), FlushCache(request_id=1))
    assert not server.take(s.CacheFlushed)[0].ok
    assert {telemetry.stream_id for telemetry in server.core.telemetry()} == {1, 2}


def test_a_kept_stream_that_is_taken_up_again_is_its_new_attempt() -> None:
    """Its answer was long under way elsewhere, and goes on here; the end of the old one's time is
    not its."""
    server = _server()
    server.run(opened(1), splice(tokens(SIZE, 1)))
    message = commit(SIZE, stream_id=1, handoff=TO_DECODE)
    server.run(msgspec.structs.replace(message, keep_s=DONE_RETENTION_S + 60.0))
    (first,), _ = server.answer(1)
    server.clock.now_s += DONE_RETENTION_S + 1.0
    server.run()
    sampling = msgspec.structs.replace(GREEDY, max_new_tokens=40)
    server.step(generate(tokens(SIZE, 1), [first], attempt=2, sampling=sampling))
    server.clock.now_s += DONE_RETENTION_S + 60.0
    server.step()
    assert server.core.num_streams == 1
    server.step(cancel(1, attempt=2))
    server.assert_nothing_is_left()


class _Forgetful(FakeEngine):
    """Promises what it does not keep: host memory is lost just before it is needed."""

    def restore(self, token_ids: array[int], *, namespace: str) -> int:
        self.host.clear()
        return super().restore(token_ids, namespace=namespace)


def test_what_does_not_come_back_is_computed_in_steps_of_the_usual_size() -> None:
    engine = _Forgetful(pool_tokens=400, page_size=4, host_tokens=2000)
    server = PrefillUnderTest(engine)
    _fill(server, 1, 2)
    record = server.core._records[1]
    assert record.num_host > STEP_TOKENS
    server.turn(commit(SIZE, stream_id=1, handoff=None))
    while record.in_flight is not None:
        assert record.in_flight.num_new_tokens <= STEP_TOKENS
        server.engine.advance()
        server.turn()
    assert server.answer(1)[0] == predict(tokens(SIZE, 1), GREEDY, frozenset())
    assert server.core.kv.num_recomputed_tokens > 0


def test_what_copies_cost_is_forgotten_with_the_caches() -> None:
    """So that no run of a comparison knows what earlier ones saw."""
    server = _server()
    before = server.core.decider.costs.model()
    _fill(server, 1, 2)
    assert server.core.decider.costs.model() != before
    server.run(cancel(1), cancel(2))
    server.run(FlushCache(request_id=1))
    assert server.core.decider.costs.model() == before


class _Lending(FakeEngine):
    """Its KV stays locked where it is until its transfer is over, as on the CPU."""

    def __init__(self, pool_tokens: int = 300) -> None:
        super().__init__(pool_tokens=pool_tokens, page_size=4, host_tokens=2000)
        self.lent: dict[int, list[CachedPage]] = {}

    def export_kv(
        self, token_ids: array[int], first_token: int = 0, *, namespace: str
    ) -> ExportedKv | None:
        exported = super().export_kv(token_ids, first_token, namespace=namespace)
        if exported is not None:
            pages = self.cache.match(token_ids, namespace)
            self.cache.lock(pages)
            self.lent[id(exported)] = pages
        return exported

    @property
    def num_lent(self) -> int:
        return len(self.lent)

    def release_export(self, exported: ExportedKv) -> None:
        self.cache.unlock(self.lent.pop(id(exported)))
        super().release_export(exported)


def test_copies_wait_while_a_hand_off_holds_the_memory() -> None:
    """A committed stream whose copies have no room to come back to is not computed again: the room
    is free as soon as the hand-off is over."""
    server = PrefillUnderTest(_Lending(), mode=PreemptionMode.SWAP)
    server.network.is_holding = True
    _fill(server, 1, 2)
    record = server.core._records[1]
    assert record.num_host > SIZE / 2
    server.run(commit(SIZE, stream_id=2, handoff=TO_DECODE))
    assert server.network.num_held == 1
    num_computed = server.core.num_computed_tokens
    server.run(commit(SIZE, stream_id=1, handoff=None))
    assert server.take(s.Output, 1) == []
    assert record.num_host > SIZE / 2
    server.network.deliver_held()
    server.run()
    expected = predict(tokens(SIZE, 1), GREEDY, server.engine.facts.eos_token_ids)
    assert server.answer(1)[0] == expected
    assert server.core.kv.num_recomputed_tokens == 0
    assert server.core.num_computed_tokens - num_computed <= 4


def test_copies_that_have_no_room_at_all_are_given_up() -> None:
    """Where nothing is under way that would make some, so that the stream goes on in steps."""
    engine = _Lending()
    server = PrefillUnderTest(engine, mode=PreemptionMode.SWAP)
    _fill(server, 1, 2)
    record = server.core._records[1]
    assert record.num_host > SIZE / 2
    held = engine.cache.match(server.core._records[2].ids, "")
    engine.cache.lock(held)
    server.run(commit(SIZE, stream_id=1, handoff=None))
    assert record.num_host == 0
    engine.cache.unlock(held)
    server.run()
    expected = predict(tokens(SIZE, 1), GREEDY, server.engine.facts.eos_token_ids)
    assert server.answer(1)[0] == expected


def test_what_a_waiting_request_builds_on_comes_back() -> None:
    """The engine has a commit, and no memory for it yet; what is taken from it meanwhile is not
    computed again when there is some."""
    engine = _Lending(pool_tokens=304)
    server = PrefillUnderTest(engine, mode=PreemptionMode.SWAP)
    server.network.is_holding = True
    _fill(server, 2, size=60)
    server.run(commit(60, stream_id=2, handoff=TO_DECODE))
    assert server.network.num_held == 1
    _fill(server, 1)
    more = tokens(40, 9)
    message = splice(more, keep=SIZE, seq=2, stream_id=1, commit_follows=True)
    server.turn(message, commit(SIZE + len(more), stream_id=1, seq=3, handoff=None))
    engine.advance()
    assert len(engine.waiting_keys()) == 1
    num_computed = server.core.num_computed_tokens
    engine.set_victim_order({1: 0}, frozenset({1}))
    engine.evict(120)
    prompt = array("q", [*tokens(SIZE, 1), *more])
    assert engine.cached_tokens(prompt, namespace="") == SIZE - 120
    server.turn()
    assert engine.cached_tokens(prompt, namespace="") == SIZE
    server.network.deliver_held()
    server.run()
    expected = predict(list(prompt), GREEDY, server.engine.facts.eos_token_ids)
    assert server.answer(1)[0] == expected
    assert server.core.num_computed_tokens - num_computed <= len(more) + 4


def test_nothing_comes_back_at_the_cost_of_what_waits() -> None:
    """While the engine has no memory for a commit, another one's KV stays in host memory: it would
    take the room of what the first one builds on, and wait behind it all the same."""
    engine = _Lending(pool_tokens=304)
    server = PrefillUnderTest(engine, mode=PreemptionMode.SWAP)
    _fill(server, 3, size=100)
    server.network.is_holding = True
    _fill(server, 2, size=60)
    server.run(commit(60, stream_id=2, handoff=TO_DECODE))
    _fill(server, 1)
    assert engine.cached_tokens(array("q", tokens(100, 3)), namespace="") < 50
    more = tokens(40, 9)
    message = splice(more, keep=SIZE, seq=2, stream_id=1, commit_follows=True)
    server.turn(message, commit(SIZE + len(more), stream_id=1, seq=3, handoff=None))
    engine.advance()
    assert len(engine.waiting_keys()) == 1
    num_computed, num_restored = server.core.num_computed_tokens, engine.num_restored_tokens
    server.turn(commit(100, stream_id=3, handoff=None))
    server.turn()
    assert engine.num_restored_tokens == num_restored
    server.network.deliver_held()
    server.run()
    for stream_id, prompt in ((1, [*tokens(SIZE, 1), *more]), (3, tokens(100, 3))):
        expected = predict(prompt, GREEDY, server.engine.facts.eos_token_ids)
        assert server.answer(stream_id)[0] == expected
    assert engine.num_restored_tokens > num_restored
    assert server.core.num_computed_tokens - num_computed <= len(more) + 12
