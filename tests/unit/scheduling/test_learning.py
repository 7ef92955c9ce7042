"""What a server learns of its steps and streams."""

from __future__ import annotations

from random import Random

import pytest

from streamfill.scheduling.learning import MATTERS, MAX_SEGMENTS, Learner
from streamfill.scheduling.snapshot import UNIT_COSTS, ContextMode, Experience, Habits, StepCosts
from tests.unit.scheduling.builders import stream


def noisy(costs: StepCosts, num_steps: int, learner: Learner, noise: float = 0.2) -> None:
    """Steps of all sizes that take about what they should."""
    random = Random(7)
    for _ in range(num_steps):
        num_tokens = random.choice((1, 30, 96, 200, 256))
        took_s = costs.step_s(num_tokens) * random.uniform(1 - noise, 1 + noise)
        learner.note_step(num_tokens, took_s)
        learner.experience()


def about(costs: StepCosts, tolerance: float) -> object:
    return pytest.approx((costs.fixed_s, costs.per_token_s), rel=tolerance)


def learned(learner: Learner) -> tuple[float, float]:
    costs = learner.experience().costs
    return costs.fixed_s, costs.per_token_s


@pytest.mark.parametrize(
    "costs",
    [
        UNIT_COSTS,
        StepCosts(fixed_s=0.02, per_token_s=0.0001),
        StepCosts(fixed_s=0.2, per_token_s=0.008),
        StepCosts(fixed_s=2.0, per_token_s=0.09),
    ],
)
def test_costs_are_learned_from_noisy_steps(costs: StepCosts) -> None:
    """From steps that vary by a fifth, whatever the platform was expected to need."""
    learner = Learner()
    noisy(costs, 1000, learner)
    # An old value stays while the new one is not MATTERS away; the rest is for the noise.
    assert learned(learner) == about(costs, MATTERS + 0.15)


def test_costs_follow_a_server_that_changes() -> None:
    """Old steps are forgotten."""
    learner = Learner()
    noisy(UNIT_COSTS, 500, learner)
    slower = StepCosts(fixed_s=0.15, per_token_s=0.008)
    noisy(slower, 1500, learner)
    assert learned(learner) == about(slower, MATTERS + 0.15)


def test_a_step_that_stands_out_is_left_out() -> None:
    """The first one makes everything warm; it says nothing of those to come."""
    learner = Learner()
    before = learner.experience()
    learner.note_step(256, 500.0)
    assert learner.experience() is before
    learner.note_step(0, 0.05)
    assert learner.experience() is before


def test_costs_stay_sane_without_variety() -> None:
    """Steps of one size alone cannot tell fixed from variable; what is predicted still fits."""
    learner = Learner()
    random = Random(3)
    for _ in range(20_000):
        learner.note_step(256, UNIT_COSTS.step_s(256) * random.uniform(0.9, 1.1))
        costs = learner.experience().costs
        assert 0.0 < costs.per_token_s < 0.01
        assert costs.fixed_s > 0.0
    assert costs.step_s(256) == pytest.approx(UNIT_COSTS.step_s(256), rel=0.3)


def test_noise_makes_nothing_free() -> None:
    """Long steps that were quick by chance do not make a token cost nothing or less."""
    learner = Learner()
    for _ in range(300):
        learner.note_step(256, 0.05)
        learner.note_step(1, 0.3)
    costs = learner.experience().costs
    assert costs.per_token_s > 0.0
    assert costs.fixed_s > 0.0


def test_the_same_experience_while_nothing_matters() -> None:
    """Every order of turns is made anew with a new object, so there is none without a cause."""
    learner = Learner()
    first = learner.experience()
    noisy(UNIT_COSTS, 200, learner, noise=0.05)
    assert learner.experience() is first
    noisy(StepCosts(fixed_s=0.5, per_token_s=0.02), 100, learner)
    second = learner.experience()
    assert second is not first
    assert second.habits[0] is first.habits[0]
    assert learner.experience() is second


def test_habits_are_learned_by_mode() -> None:
    """How many more segments are to be expected, and with what pauses."""
    learner = Learner()
    prior = learner.experience().habits
    assert prior[ContextMode.APPEND].expected_more[0] == pytest.approx(6.5)
    for _ in range(200):
        learner.note_commit(ContextMode.APPEND, 5, (2.0, 2.0, 2.0, 2.0))
    append, update = learner.experience().habits
    assert append.gap_s == pytest.approx(2.0, rel=0.02)
    assert append.expected_more[0] == pytest.approx(5.0, rel=0.05)
    assert append.expected_more[4] == pytest.approx(1.0, rel=0.3)
    assert update == prior[ContextMode.UPDATE]


def test_who_has_come_far_is_expected_to_go_on() -> None:
    """Of streams with two or with ten segments, one that has three is of the long ones."""
    learner = Learner()
    for _ in range(100):
        learner.note_commit(ContextMode.APPEND, 2, (1.0,))
        learner.note_commit(ContextMode.APPEND, 10, (1.0,) * 9)
    more = learner.experience().habits[0].expected_more
    assert more[0] == pytest.approx(6.0, rel=0.1)
    assert more[3] == pytest.approx(7.0, rel=0.1)
    assert all(each > 0.0 for each in more)
    learner.note_commit(ContextMode.APPEND, 10 * MAX_SEGMENTS, ())


def test_new_habits_are_rare() -> None:
    """With each of the first few commits, then with every thirty-second."""
    learner = Learner()
    objects: list[Experience] = []
    for _ in range(640):
        learner.note_commit(ContextMode.APPEND, 3, (1.0, 1.0))
        if not objects or learner.experience() is not objects[-1]:
            objects.append(learner.experience())
    assert 20 <= len(objects) <= 30


def test_expected_commit_is_the_segments_to_come_times_the_pause() -> None:
    """The usual pause counts as one of its own; the last entry holds for what is longer."""
    habits = Habits(expected_more=(3.0, 2.0), gap_s=2.0)
    assert habits.expected_commit_s(stream(1, 9, last_segment_s=10.0)) == 10.0 + 2 * 2.0
    quick = stream(1, 9, last_segment_s=10.0, gaps_s=(0.5, 0.5), num_segments=7)
    assert habits.expected_commit_s(quick) == 10.0 + 2 * 1.0


def test_the_same_observations_teach_the_same() -> None:
    """On every tensor-parallel rank."""
    one, other = Learner(), Learner()
    for learner in (one, other):
        noisy(StepCosts(fixed_s=0.1, per_token_s=0.001), 200, learner)
        learner.note_commit(ContextMode.UPDATE, 4, (0.1, 0.2, 0.3))
    assert one.experience() == other.experience()
