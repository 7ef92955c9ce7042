"""Steps of context that commits may interrupt."""

from __future__ import annotations

import pytest

from streamfill.errors import ConfigError
from streamfill.scheduling.harness import ContextChange, Harness, ServerModel, StreamStory
from streamfill.scheduling.policy import Policy
from streamfill.scheduling.registry import make_policy
from streamfill.scheduling.snapshot import StepCosts, StreamView
from streamfill.stream.ids import StreamId
from tests.unit.scheduling.builders import policy, snapshot, stream

COSTS = StepCosts(fixed_s=0.1, per_token_s=0.001)
LAYERS = 10


def story(stream_id: int, num_tokens: int, at_s: float, committed_s: float | None) -> StreamStory:
    change = ContextChange(at_s=at_s, keep_tokens=0, num_new_tokens=num_tokens)
    return StreamStory(
        stream_id=StreamId(stream_id), opened_s=at_s, changes=(change,), committed_s=committed_s
    )


def played(
    spec: str, *stories: StreamStory, num_layers: int = LAYERS, segment_tokens: int = 1000
) -> Harness:
    chosen = policy(spec, segment_tokens=segment_tokens, can_interrupt=num_layers > 0)
    model = ServerModel(costs=COSTS, step_tokens=1000, num_layers=num_layers)
    harness = Harness(chosen, model)
    harness.run(stories)
    return harness


def test_a_commit_waits_for_one_layer_of_others_context() -> None:
    """And the step that it interrupts takes as much longer as the commit's own."""
    harness = played("adaptive", story(1, 1000, 0.0, 5.0), story(2, 50, 0.3, 0.35))
    first, second = harness.outcomes[StreamId(1)], harness.outcomes[StreamId(2)]
    layer_s = COSTS.step_s(1000) / LAYERS
    assert second.ttft_s is not None
    assert second.ttft_s <= layer_s + COSTS.step_s(50) + 1e-9
    assert harness.num_interruptions == 1
    assert first.num_computed_tokens == 1000 + 1  # its last token again, for its logits
    assert harness.busy_s == pytest.approx(COSTS.step_s(1000) + COSTS.step_s(50) + COSTS.step_s(1))


@pytest.mark.parametrize(
    ("spec", "num_layers"),
    [("adaptive(interrupts=off)", LAYERS), ("adaptive", 0), ("fcfs", LAYERS)],
)
def test_without_interrupts_it_waits_for_the_step(spec: str, num_layers: int) -> None:
    """Where the user, the server or the policy has none."""
    stories = (story(1, 150, 0.0, 5.0), story(2, 50, 0.05, 0.1))
    harness = played(spec, *stories, num_layers=num_layers, segment_tokens=96)
    ttft_s = harness.outcomes[StreamId(2)].ttft_s
    assert harness.num_interruptions == 0
    assert ttft_s is not None
    assert ttft_s > COSTS.step_s(96) - 0.1 + COSTS.step_s(50) - 1e-9


def test_all_commits_go_before_the_step_goes_on() -> None:
    """One by one where a step of both would cost more than it saves."""
    commits = [story(number, 400, 0.2, 0.25) for number in (2, 3, 4)]
    harness = played("adaptive", story(1, 1000, 0.0, 9.0), *commits)
    assert harness.num_interruptions >= 2
    ttfts_s = [harness.outcomes[StreamId(number)].ttft_s or 99.0 for number in (2, 3, 4)]
    layer_s = COSTS.step_s(1000) / LAYERS
    assert max(ttfts_s) <= layer_s + 3 * COSTS.step_s(400) + 1e-9
    assert harness.outcomes[StreamId(1)].num_runs == 2


def test_a_commit_of_the_step_itself_waits_for_its_end() -> None:
    """Its KV is not there before."""
    harness = played("adaptive", story(1, 900, 0.0, 0.2))
    outcome = harness.outcomes[StreamId(1)]
    assert harness.num_interruptions == 0
    assert outcome.answered_s == pytest.approx(COSTS.step_s(900) + COSTS.step_s(1))


@pytest.mark.parametrize(("at_s", "is_interrupted"), [(0.2, True), (2.4, False)])
def test_a_short_commit_goes_before_a_long_one(at_s: float, is_interrupted: bool) -> None:
    """While it saves more than it costs: not at the end of the long one's step."""
    stories = (story(1, 3000, 0.0, 0.0), story(2, 100, at_s, at_s))
    chosen = policy("adaptive(ageing=1)", can_interrupt=True)
    harness = Harness(chosen, ServerModel(costs=COSTS, step_tokens=3000, num_layers=30))
    harness.run(stories)
    assert harness.num_interruptions == is_interrupted
    first, second = (harness.outcomes[StreamId(number)].answered_s for number in (1, 2))
    assert first is not None
    assert second is not None
    assert (second < first) == is_interrupted


def test_a_long_commit_does_not_interrupt_a_short_one() -> None:
    """It would wait for less than it makes wait."""
    harness = played("adaptive", story(1, 300, 0.0, 0.0), story(2, 900, 0.05, 0.05))
    assert harness.num_interruptions == 0


def test_who_interrupts_is_asked_of_the_policy() -> None:
    """With what is under way, and for how long."""
    adaptive = policy("adaptive", can_interrupt=True)
    views = (
        stream(1, 900, committed_s=1.0, in_flight=True),
        stream(2, 100, committed_s=2.0),
        stream(3, 100),
    )
    for under_way, under_way_s, expected in (
        ([], 0.0, [2]),  # a step of context
        ([StreamId(1)], 0.0, [2]),
        ([StreamId(1)], 1e6, []),
    ):
        asked = snapshot(*views, under_way=under_way, under_way_s=under_way_s)
        plan = adaptive.decide(asked)
        assert [run.stream_id for run in plan.runs] == expected, (under_way, under_way_s)


def test_no_context_interrupts() -> None:
    """Nobody waits for it yet."""
    adaptive = policy("adaptive", can_interrupt=True)
    assert not adaptive.decide(snapshot(stream(1, 100), under_way=[])).runs
    assert adaptive.decide(snapshot(stream(1, 100))).interruptible
    assert not policy("adaptive").decide(snapshot(stream(1, 100))).interruptible


def test_the_steps_are_longer_where_they_can_be_interrupted() -> None:
    """Nobody but their own streams waits for them."""
    streams = [stream(number, 90) for number in range(20)]
    long = policy("adaptive", segment_tokens=96, can_interrupt=True).decide(snapshot(*streams))
    short = policy("adaptive", segment_tokens=96).decide(snapshot(*streams))
    assert short.num_tokens <= 3 * 96
    assert long.num_tokens > short.num_tokens


def test_a_wrong_option_is_refused() -> None:
    """By name, with what there is."""
    with pytest.raises(ConfigError, match=r"interrupts.*maybe.*on, off"):
        make_policy("adaptive", {"interrupts": "maybe"})


def test_a_step_of_commits_may_be_long() -> None:
    """Where it can be interrupted; one of context may not, nor what interrupts."""

    def num_tokens(by: Policy, view: StreamView, *, interrupts: bool = False) -> int:
        under_way: list[StreamId] | None = [] if interrupts else None
        asked = snapshot(view, budget=256, long_budget=1024, under_way=under_way)
        return by.decide(asked).num_tokens

    commit, context = stream(1, 700, committed_s=1.0), stream(1, 700)
    adaptive = policy("adaptive", can_interrupt=True)
    assert num_tokens(adaptive, commit) == 700
    assert num_tokens(adaptive, context) == 256
    assert num_tokens(adaptive, commit, interrupts=True) == 256
    for other in (policy("adaptive"), policy("fcfs", can_interrupt=True)):
        assert num_tokens(other, commit) == 256
