"""What a server learns from its own steps and streams; the policies use it as ``Experience``.

Deterministic: the same observations give the same experience, on every tensor-parallel rank. A new
object is made only where something changed enough to matter, since every order of turns that
depends on it has to be made anew.
"""

from __future__ import annotations

from typing import Final

from streamfill.scheduling.snapshot import (
    UNIT_COSTS,
    ContextMode,
    Experience,
    Habits,
    StepCosts,
)

MAX_SEGMENTS: Final = 64
"""Streams with more segments count as this long."""
MATTERS: Final = 0.2
"""Relative change of a step cost below which the old value stays."""
_FORGET_COMMIT: Final = 0.99
"""Weight that a commit keeps with each new one: the last hundred count."""
_FORGET_STEP: Final = 0.995
"""Likewise for steps."""
_PRIOR_SEGMENTS: Final = 12
"""Before anything was seen, any number of segments up to this is as likely as any other."""
_PRIOR_WEIGHT: Final = 2.0
"""Of that: two commits are as much."""
_PRIOR_STEPS: Final = ((1.0, 4.0), (256.0, 4.0))
"""(tokens, weight) of steps that are taken for seen, at the costs of the platform."""
_LEAST_WEIGHT: Final = 0.05
_MAX_LEFT_OUT: Final = 3
"""So many steps in a row may stand out; behind them it is the server that is slow."""


class Learner:
    """Collects observations, and gives out the newest experience."""

    def __init__(self, costs: StepCosts = UNIT_COSTS) -> None:
        """``costs``: what a step may be expected to take before one was seen."""
        self._steps = _StepLearner(costs)
        self._modes = tuple(_ModeLearner() for _ in ContextMode)
        self._experience = Experience(costs=costs, habits=self._habits())
        self._num_left_out = 0

    def note_step(self, num_tokens: int, took_s: float) -> None:
        """A step of so many prefill tokens took so long. What stands out by a factor of ten, as the
        first step does that makes everything warm, is left out, unless all steps do."""
        if num_tokens <= 0:
            return
        expected_s = self._experience.costs.step_s(num_tokens)
        if took_s >= 10.0 * expected_s and self._num_left_out < _MAX_LEFT_OUT:
            self._num_left_out += 1
            return
        self._num_left_out = 0
        self._steps.note(num_tokens, took_s)

    def note_commit(self, mode: ContextMode, num_segments: int, gaps_s: tuple[float, ...]) -> None:
        """A stream was committed with so many segments, the one with the commit included."""
        self._modes[mode].note(num_segments, gaps_s)

    def experience(self) -> Experience:
        """As of now."""
        old = self._experience
        costs, habits = self._steps.costs(), self._habits()
        if costs is not old.costs or any(
            new is not known for new, known in zip(habits, old.habits, strict=True)
        ):
            self._experience = Experience(costs=costs, habits=habits)
        return self._experience

    def _habits(self) -> tuple[Habits, ...]:
        return tuple(mode.habits() for mode in self._modes)


class _StepLearner:
    """Least squares of ``took = fixed + tokens * per_token`` over the newest steps."""

    def __init__(self, prior: StepCosts) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0
        self._costs = prior
        self._is_new = False
        for num_tokens, weight in _PRIOR_STEPS:
            self._add(num_tokens, prior.step_s(int(num_tokens)), weight)

    def note(self, num_tokens: int, took_s: float) -> None:
        self._n *= _FORGET_STEP
        self._x *= _FORGET_STEP
        self._y *= _FORGET_STEP
        self._xx *= _FORGET_STEP
        self._xy *= _FORGET_STEP
        self._add(num_tokens, took_s, 1.0)
        self._is_new = True

    def _add(self, x: float, y: float, weight: float) -> None:
        self._n += weight
        self._x += weight * x
        self._y += weight * y
        self._xx += weight * x * x
        self._xy += weight * x * y

    def costs(self) -> StepCosts:
        if not self._is_new:
            return self._costs
        self._is_new = False
        spread = self._n * self._xx - self._x * self._x
        if spread <= 0.0:
            return self._costs
        slope = (self._n * self._xy - self._x * self._y) / spread
        old = self._costs
        # Noise must not make a token free or a step cost less than nothing.
        slope = max(slope, 0.05 * self._y / self._x)
        fixed = max((self._y - slope * self._x) / self._n, 0.01 * self._y / self._n)
        if _differs(slope, old.per_token_s) or _differs(fixed, old.fixed_s):
            self._costs = StepCosts(fixed_s=fixed, per_token_s=slope)
        return self._costs


class _ModeLearner:
    """How many segments streams of one mode had, and with what pauses."""

    def __init__(self) -> None:
        self._weights = [0.0] * (MAX_SEGMENTS + 1)
        for num_segments in range(1, _PRIOR_SEGMENTS + 1):
            self._weights[num_segments] = _PRIOR_WEIGHT / _PRIOR_SEGMENTS
        self._gap_s = Habits().gap_s
        self._num_gaps = 1.0
        self._num_new = 1
        self._num_seen = 0
        self._habits = Habits()

    def note(self, num_segments: int, gaps_s: tuple[float, ...]) -> None:
        self._weights = [weight * _FORGET_COMMIT for weight in self._weights]
        self._weights[max(1, min(num_segments, MAX_SEGMENTS))] += 1.0
        for gap_s in gaps_s:
            self._num_gaps = min(self._num_gaps + 1.0, 1000.0)
            self._gap_s += (gap_s - self._gap_s) / self._num_gaps
        self._num_seen += 1
        self._num_new += 1

    def habits(self) -> Habits:
        # New ones after 1, 2, 3, 5, 8, ... commits, later after every 32nd.
        if self._num_new >= min(32, max(1, self._num_seen // 2)):
            self._num_new = 0
            self._habits = Habits(expected_more=self._expected_more(), gap_s=self._gap_s)
        return self._habits

    def _expected_more(self) -> tuple[float, ...]:
        """E[K - k | K > k] for k = 0, 1, 2, …, with K the number of segments of a stream."""
        more = [1.0] * (MAX_SEGMENTS + 1)
        weight = weighted = 0.0
        for num_segments in range(MAX_SEGMENTS, 0, -1):
            weight += self._weights[num_segments]
            weighted += self._weights[num_segments] * num_segments
            if weight > _LEAST_WEIGHT:
                more[num_segments - 1] = weighted / weight - (num_segments - 1)
        return tuple(more)


def _differs(new: float, old: float) -> bool:
    return abs(new - old) > MATTERS * old
