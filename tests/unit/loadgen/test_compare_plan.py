"""Which runs a comparison makes, and in which order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.errors import ConfigError
from streamfill.loadgen.compare import EngineSession, plan_runs, split_by_trace
from streamfill.loadgen.compare_modes import parse_modes

WORDS = ("oneshot", "warmup", "stream", "stream@fcfs", "sglang-pd", "vllm", "vllm:stream")


def order(session: EngineSession, run: int) -> list[str]:
    return [each.variant.label for each in session.runs if each.run == run]


def test_order_turns_round() -> None:
    """Every second repetition runs backwards; each pair begins with another mode."""
    (session,) = plan_runs(parse_modes("oneshot,warmup,stream"), 4)
    assert [order(session, run) for run in range(4)] == [
        ["oneshot", "warmup", "stream"],
        ["stream", "warmup", "oneshot"],
        ["warmup", "stream", "oneshot"],
        ["oneshot", "stream", "warmup"],
    ]


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=7), st.integers(1, 6))
def test_every_mode_runs_as_often_as_asked(words: list[str], num_runs: int) -> None:
    """Each variant runs once in each repetition, and each engine has one session."""
    variants = parse_modes(",".join(words))
    sessions = plan_runs(variants, num_runs)
    assert len({s.engine for s in sessions}) == len(sessions)
    made = Counter((r.variant, r.run) for s in sessions for r in s.runs)
    assert made == Counter((v, run) for v in variants for run in range(num_runs))
    assert all(r.variant.engine == s.engine for s in sessions for r in s.runs)


def test_impossible_plans() -> None:
    """No modes and no runs are refused."""
    with pytest.raises(ConfigError, match="--runs = 0"):
        plan_runs(parse_modes("stream"), 0)
    with pytest.raises(ConfigError, match="at least one"):
        plan_runs([], 1)


def test_updates_are_nothing_for_streams_that_only_append() -> None:
    """With updates in the trace vllm:stream is skipped with a reason, and refused if alone."""
    variants = parse_modes("stream,vllm")
    kept, skipped = split_by_trace(variants, has_updates=True)
    assert [v.label for v in kept] == ["stream", "vllm:oneshot", "vllm:warmup"]
    assert "vllm:stream" in skipped
    assert split_by_trace(variants, has_updates=False) == (variants, {})
    with pytest.raises(ConfigError, match="vllm:stream"):
        split_by_trace(parse_modes("vllm:stream"), has_updates=True)
