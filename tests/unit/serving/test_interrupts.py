"""Commits that come while a step of context is computed."""

from __future__ import annotations

import pytest

from streamfill.links.server_link import Inbound
from streamfill.messages import router_to_server as r
from streamfill.messages import server_to_router as s
from tests.support.fake_engine import FakeEngine, next_token
from tests.unit.serving.builders import (
    GREEDY,
    TO_DECODE,
    PrefillUnderTest,
    cancel,
    commit,
    opened,
    splice,
    tokens,
)

LONG, SHORT = tokens(60), tokens(30, start=2)


@pytest.fixture
def server() -> PrefillUnderTest:
    """The context of stream 1 is computed next; stream 2 is open and has none."""
    server = PrefillUnderTest(can_interrupt=True)
    server.turn(opened(1), opened(2), splice(LONG))
    return server


def _to_decode(prompt: list[int], stream_id: int) -> list[r.Splice | r.Commit]:
    return [
        splice(prompt, stream_id=stream_id, commit_follows=True),
        commit(len(prompt), stream_id=stream_id, handoff=TO_DECODE),
    ]


def test_a_commit_is_answered_before_the_step_ends(server: PrefillUnderTest) -> None:
    """Its first token is on its way, and the interrupted stream has lost nothing."""
    engine = server.engine
    assert engine.may_interrupt
    engine.begin()
    plan = server.core.interrupt(_to_decode(SHORT, 2))
    assert plan is not None
    assert [run.stream_id for run in plan.runs] == [2]
    engine.advance()
    server.core.end_interruption(plan, 0.01)
    assert server.answer(2)[0] == [next_token(SHORT)]
    assert server.progress(1).num_computed_tokens == 0
    engine.go_on()
    server.run(commit(len(LONG)))
    assert server.answer(1)[0][0] == next_token(LONG)
    assert server.core.counters(0).num_interruptions == 1
    assert [kind for kind, _, _ in engine.started] == ["segment", "answer", "answer"]


def test_what_was_interrupted_is_not_blamed(server: PrefillUnderTest) -> None:
    """The account's run is as long as it took, without what came between; as is the step that the
    server learns from."""
    engine, clock = server.engine, server.clock
    engine.begin()
    plan = server.core.interrupt(_to_decode(SHORT, 2))
    assert plan is not None
    clock.now_s += 5.0
    engine.advance()
    server.core.end_interruption(plan, 5.0)
    engine.go_on()
    clock.now_s += 0.5
    engine.advance()
    server.run(commit(len(LONG)))
    (account,) = (output.account for output in server.take(s.Output, 1) if output.account)
    run = account.runs[0]
    assert run.start_age_s - run.end_age_s == pytest.approx(0.51)


@pytest.mark.parametrize("what", ["nothing", "a segment", "the end of the interrupted stream"])
def test_only_commits_interrupt(server: PrefillUnderTest, what: str) -> None:
    """Other messages are applied, and start nothing."""
    messages: dict[str, list[Inbound]] = {
        "nothing": [],
        "a segment": [splice(SHORT, stream_id=2)],
        "the end of the interrupted stream": [cancel(1)],
    }
    server.engine.begin()
    assert server.core.interrupt(messages[what]) is None
    assert len(server.engine.started) == 1
    server.engine.go_on()
    server.run(cancel(1), cancel(2))
    server.assert_nothing_is_left()


def test_a_commit_of_the_step_itself_waits(server: PrefillUnderTest) -> None:
    """What it lacks is being computed."""
    server.engine.begin()
    assert server.core.interrupt([commit(len(LONG))]) is None
    server.engine.go_on()
    server.run()
    assert server.answer(1)[0][0] == next_token(LONG)
    assert server.core.counters(0).num_computed_tokens == len(LONG) + 1


def test_no_context_is_computed_in_between(server: PrefillUnderTest) -> None:
    """Only what somebody waits for, however much room there is."""
    server.engine.begin()
    third: list[Inbound] = [opened(3), splice(tokens(20, start=3), stream_id=3)]
    plan = server.core.interrupt([*third, *_to_decode(SHORT, 2)])
    assert plan is not None
    assert [run.stream_id for run in plan.runs] == [2]
    server.engine.advance()
    server.core.end_interruption(plan, 0.01)
    assert server.core.interrupt((), again=True) is None


def test_a_commit_that_memory_does_not_suffice_for_waits() -> None:
    """What fits beside the interrupted step is computed, and nothing is left in the engine's queue;
    the rest comes behind it."""
    prompt = tokens(50, start=2)
    server = PrefillUnderTest(FakeEngine(pool_tokens=96), can_interrupt=True)
    server.turn(opened(1), opened(2), splice(LONG))
    server.engine.begin()
    plan = server.core.interrupt(_to_decode(prompt, 2))
    assert plan is not None
    assert not plan.runs[0].is_commit
    server.engine.advance()
    server.core.end_interruption(plan, 0.01)
    assert server.core.interrupt((), again=True) is None
    assert not server.engine.waiting_keys()
    server.engine.go_on()
    server.run()
    assert server.answer(2)[0] == [next_token(prompt)]


def test_steps_beside_answers_are_not_interrupted() -> None:
    """An answer that goes on here has its own step in between."""
    server = PrefillUnderTest(can_interrupt=True)
    server.step(opened(1), splice(SHORT), commit(len(SHORT)))
    server.turn(opened(2), splice(LONG, stream_id=2))
    assert server.engine.started[-1][:2] == ("segment", 2)
    assert not server.engine.may_interrupt
    server.run()
    assert len(server.answer(1)[0]) == GREEDY.max_new_tokens
