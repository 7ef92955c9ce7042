"""Which runs a comparison makes, and in which order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.errors import ConfigError
from streamfill.loadgen.compare import (
    POLICIES,
    EngineSession,
    check_policy,
    parse_modes,
    plan_runs,
    split_by_trace,
)
from streamfill.scheduling import fcfs

WORDS = ("oneshot", "warmup", "stream", "sglang-pd", "vllm", "vllm:stream", "sglang-pd:oneshot")


def order(session: EngineSession, run: int) -> list[str]:
    return [each.variant.label for each in session.runs if each.run == run]


def test_names_of_modes() -> None:
    """A mode is ours, a peer stands for all that it can do, each once."""
    found = [v.label for v in parse_modes("stream, vllm,vllm:stream,oneshot,sglang-pd")]
    assert found == [
        "stream",
        "vllm:oneshot",
        "vllm:warmup",
        "vllm:stream",
        "oneshot",
        "sglang-pd:oneshot",
        "sglang-pd:warmup",
    ]


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("oneshoot", "no mode 'oneshoot'; known: oneshot, warmup, stream, sglang-pd, vllm"),
        ("", "no mode ''"),
        ("oneshot,", "no mode ''"),
        ("sglang-pd:stream", "sglang-pd can do: sglang-pd:oneshot, sglang-pd:warmup"),
        ("vllm:fast", "vllm can do: vllm:oneshot"),
        ("ours:stream", "no mode 'ours:stream'"),
    ],
)
def test_unknown_modes(spec: str, part: str) -> None:
    """The error names the option, the word and what there is."""
    with pytest.raises(ConfigError, match="--modes") as caught:
        parse_modes(spec)
    assert part in str(caught.value)


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


def test_policies() -> None:
    """Only policies that exist are accepted."""
    assert check_policy("fcfs") == "fcfs"
    assert hasattr(fcfs, "FcfsPolicy")
    with pytest.raises(ConfigError, match=r"--policy = 'mcps'.*it has: fcfs"):
        check_policy("mcps")
    assert POLICIES == ("fcfs",)
