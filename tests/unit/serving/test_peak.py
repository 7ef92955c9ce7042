"""Memory that answers will need at their worst, and admission by it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode_server.peak import NUM_LENGTHS_KEPT, AnswerLengths, Holding, peak_tokens
from streamfill.messages.common import Sampling
from streamfill.scheduling.plan import StepPlan
from tests.support.fake_engine import FakeEngine
from tests.unit.serving.builders import DecodeUnderTest, generate, tokens


def _simulated(holdings: list[Holding]) -> int:
    """Step by step: each gains a token, and gives all back when it ends."""
    peak, alive = 0, list(holdings)
    step = 0
    while alive:
        peak = max(peak, sum(each.num_tokens + step for each in alive))
        alive = [each for each in alive if each.num_left > step]
        step += 1
    return peak


@given(st.lists(st.builds(Holding, st.integers(0, 50), st.integers(0, 20)), max_size=6))
def test_peak_is_what_a_simulation_sees(holdings: list[Holding]) -> None:
    assert peak_tokens(holdings) == _simulated(holdings)


def test_those_who_end_early_give_back() -> None:
    together = [Holding(100, 10), Holding(100, 1000)]
    assert peak_tokens(together) == 1100
    assert peak_tokens(together) < sum(each.num_tokens + each.num_left for each in together)


def test_nothing_known_means_the_limit() -> None:
    assert AnswerLengths().predict_left(3, 50) == 47


def test_lengths_are_learned_given_what_is_there_already() -> None:
    lengths = AnswerLengths()
    for length in (10, 100):
        for _ in range(50):
            lengths.note(length)
    assert lengths.predict_left(20, 1000) == 80
    assert lengths.predict_left(20, 60) == 40
    assert lengths.predict_left(100, 1000) == 900, "no answer was ever that long"


def test_old_lengths_are_forgotten() -> None:
    lengths = AnswerLengths()
    for _ in range(NUM_LENGTHS_KEPT):
        lengths.note(900)
    for _ in range(NUM_LENGTHS_KEPT):
        lengths.note(20)
    assert lengths.predict_left(1, 1000) == 19


def test_an_answer_that_would_outgrow_the_pool_waits_at_its_beginning() -> None:
    server = DecodeUnderTest(FakeEngine(pool_tokens=200, page_size=4))
    sampling = Sampling(temperature=0.0, max_new_tokens=60)
    server.step(generate(tokens(80, 1), (), stream_id=1, sampling=sampling))
    server.step(generate(tokens(80, 2), (), stream_id=2, sampling=sampling))
    for _ in range(6):
        server.step()
    assert _answering(server) == [1]
    server.run()
    assert _answering(server) == [1, 2]
    for stream_id in (1, 2):
        assert len(server.answer(stream_id)[0]) == 60


def test_nobody_takes_the_memory_that_the_first_one_waits_for() -> None:
    """Not even to compute its prompt: it would be evicted again, and the engine computes prompts
    before answers."""
    server = DecodeUnderTest(FakeEngine(pool_tokens=200, page_size=4))
    sampling = Sampling(temperature=0.0, max_new_tokens=60)
    server.step(generate(tokens(80, 1), (), stream_id=1, sampling=sampling))
    for _ in range(3):
        server.step()
    server.step(
        generate(tokens(80, 2), (), stream_id=2, sampling=sampling),
        generate(tokens(90, 3), (), stream_id=3, sampling=sampling),
    )
    for _ in range(20):
        server.step()
    assert {stream_id for _, stream_id, _ in server.engine.started} == {1}
    server.run()
    for stream_id in (1, 2, 3):
        assert len(server.answer(stream_id)[0]) == 60


def test_a_step_costs_what_was_started_and_not_what_had_to_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or tokens that nobody computed would make a step look cheap."""
    server = DecodeUnderTest(FakeEngine(pool_tokens=200, page_size=4))
    noted: list[int] = []
    note = server.core.decider.note_step_start

    def watch(now_s: float, plan: StepPlan) -> None:
        noted.append(plan.num_tokens)
        note(now_s, plan)

    monkeypatch.setattr(server.core.decider, "note_step_start", watch)
    sampling = Sampling(temperature=0.0, max_new_tokens=60)
    server.step(generate(tokens(40, 1), (), stream_id=1, sampling=sampling))
    assert noted[-1] == 40
    server.step(generate(tokens(60, 2), (), stream_id=2, sampling=sampling))
    assert _answering(server) == [1]
    assert noted[-1] == 0


def _answering(server: DecodeUnderTest) -> list[int]:
    return [stream_id for kind, stream_id, _ in server.engine.started if kind == "answer"]


def test_one_alone_always_starts() -> None:
    server = DecodeUnderTest(FakeEngine(pool_tokens=120, page_size=4))
    sampling = Sampling(temperature=0.0, max_new_tokens=30)
    server.run(generate(tokens(80, 1), (), stream_id=1, sampling=sampling))
    assert len(server.answer(1)[0]) == 30
