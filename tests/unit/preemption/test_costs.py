"""What things cost: the forms, at the victim, and how observation corrects them."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.preemption.costs import (
    BUILT_IN,
    CopyCost,
    Corrected,
    CostKind,
    CostModel,
    RecomputeCost,
)

MODEL = CostModel(
    recompute=RecomputeCost(fixed_s=0.1, per_token_s=0.01, per_pair_s=1e-4),
    swap_out=CopyCost(fixed_s=0.01, per_byte_s=1e-9),
    swap_in=CopyCost(fixed_s=0.02, per_byte_s=2e-9),
    copies_overlap=False,
)


def test_recompute_counts_attention_to_the_prefix() -> None:
    alone, behind = MODEL.recompute.seconds(10), MODEL.recompute.seconds(10, 100)
    assert alone == pytest.approx(0.1 + 0.1 + 10 * 5 * 1e-4)
    assert behind - alone == pytest.approx(10 * 100 * 1e-4)


def test_long_recomputation_takes_several_passes() -> None:
    cost = RecomputeCost(fixed_s=1.0, per_token_s=0.0, pass_tokens=256)
    assert [cost.seconds(n) for n in (1, 256, 257, 1000)] == [1.0, 1.0, 2.0, 4.0]


def test_beside_others_a_pass_is_shared() -> None:
    cost = RecomputeCost(fixed_s=1.0, per_token_s=0.0, pass_tokens=256)
    assert [cost.share_seconds(n) for n in (0, 64, 256, 384)] == [0.0, 0.25, 1.0, 1.5]
    assert RecomputeCost(fixed_s=1.0, per_token_s=0.0).share_seconds(64) == 1.0


@given(st.integers(1, 5000), st.integers(0, 5000))
def test_pieces_cost_what_the_whole_costs_but_for_the_starts(n: int, p: int) -> None:
    cost = RecomputeCost(fixed_s=0.0, per_token_s=0.01, per_pair_s=1e-5)
    half = n // 2
    pieces = cost.seconds(half, p) + cost.seconds(n - half, p + half)
    assert pieces == pytest.approx(cost.seconds(n, p))


def test_nothing_costs_nothing() -> None:
    assert MODEL.recompute.seconds(0, 100) == 0.0
    assert MODEL.swap_out.seconds(0) == 0.0


@given(st.floats(0.1, 10.0))
def test_observations_correct_the_model(factor: float) -> None:
    corrected = Corrected(MODEL)
    for _ in range(200):
        corrected.observe_recompute(100, 50, factor * MODEL.recompute.seconds(100, 50))
        corrected.observe_copy(
            out=True, num_bytes=10**6, observed_s=factor * MODEL.swap_out.seconds(10**6)
        )
    assert corrected.model().recompute.seconds(70, 3) == pytest.approx(
        factor * MODEL.recompute.seconds(70, 3), rel=0.01
    )
    assert corrected.factors[CostKind.SWAP_OUT] == pytest.approx(factor, rel=0.01)
    assert corrected.factors[CostKind.SWAP_IN] == 1.0


def test_one_wild_observation_does_little() -> None:
    corrected = Corrected(MODEL)
    for _ in range(50):
        corrected.observe_recompute(100, 0, MODEL.recompute.seconds(100))
    corrected.observe_recompute(100, 0, 1e6)
    assert corrected.factors[CostKind.RECOMPUTE] < 1.3


def test_a_host_may_be_slow_at_starting_and_not_at_computing() -> None:
    """Passes of different sizes tell the two apart, though each takes some 15% more or less."""
    corrected, rng = Corrected(BUILT_IN["cpu"]), Random(1)
    host = RecomputeCost(fixed_s=0.2, per_token_s=0.0021, per_pair_s=9.5e-7)
    for num_tokens in (256, 20, 100, 256) * 10:
        prefix = rng.randrange(200)
        observed_s = host.seconds(num_tokens, prefix) * rng.uniform(0.85, 1.15)
        corrected.observe_recompute(num_tokens, prefix, observed_s)
    model = corrected.model().recompute
    for num_tokens in (1, 20, 256, 1000):
        assert model.seconds(num_tokens) == pytest.approx(host.seconds(num_tokens), rel=0.1)


def test_passes_of_one_size_say_nothing_of_others() -> None:
    """Both parts of the cost then are off by the same, as far as anybody knows."""
    corrected = Corrected(MODEL)
    for _ in range(100):
        corrected.observe_recompute(100, 0, 3.0 * MODEL.recompute.seconds(100))
    model = corrected.model().recompute
    assert model.fixed_s == pytest.approx(3.0 * MODEL.recompute.fixed_s, rel=0.05)
    assert model.per_token_s == pytest.approx(3.0 * MODEL.recompute.per_token_s, rel=0.05)


@given(st.lists(st.tuples(st.integers(1, 500), st.integers(0, 2000), st.floats(1e-6, 1e4))))
def test_corrected_costs_stay_sensible(observed: list[tuple[int, int, float]]) -> None:
    """Whatever is observed: neither part is negative, nor far from by how much the whole is off."""
    corrected = Corrected(MODEL)
    for num_tokens, prefix, seconds in observed:
        corrected.observe_recompute(num_tokens, prefix, seconds)
    factor = corrected.factors[CostKind.RECOMPUTE]
    model = corrected.model().recompute
    for part, was in (
        (model.fixed_s, MODEL.recompute.fixed_s),
        (model.per_token_s, MODEL.recompute.per_token_s),
    ):
        assert 0.24 * factor <= part / was <= 4.1 * factor


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_times_that_cannot_be_are_passed_over(seconds: float) -> None:
    corrected = Corrected(MODEL)
    corrected.observe_recompute(100, 0, seconds)
    corrected.observe_copy(out=False, num_bytes=0, observed_s=1.0)
    assert set(corrected.factors.values()) == {1.0}


def test_every_platform_has_a_model() -> None:
    assert set(BUILT_IN) == {"cpu", "cuda"}
    for model in BUILT_IN.values():
        assert model.swap_in.seconds(10**6) < model.recompute.seconds(1000)
