"""When the requests of a run arrive."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamfill.errors import ConfigError
from streamfill.loadgen.arrivals import (
    ArrivalKind,
    ArrivalsFile,
    load_arrivals,
    make_arrivals,
    save_arrivals,
)

DRAWN = [ArrivalKind.POISSON, ArrivalKind.GAMMA, ArrivalKind.FIXED]


@given(
    kind=st.sampled_from(DRAWN),
    num=st.integers(0, 200),
    rate=st.floats(0.01, 1000),
    burstiness=st.floats(0.05, 20),
    seed=st.integers(0, 2**32),
)
def test_drawn_arrivals_are_ordered_and_repeatable(
    kind: ArrivalKind, num: int, rate: float, burstiness: float, seed: int
) -> None:
    """As many as asked for, from 0 on, never falling, and the same again for the same seed."""

    def draw() -> list[float]:
        return make_arrivals(kind, num, rate=rate, burstiness=burstiness, seed=seed)

    starts_s = draw()
    assert len(starts_s) == num
    assert starts_s[:1] == [0.0][:num]
    assert all(before <= after for before, after in pairwise(starts_s))
    assert draw() == starts_s


@pytest.mark.parametrize(
    ("kind", "burstiness", "expected"),
    [
        (ArrivalKind.POISSON, 1.0, 1.0),
        (ArrivalKind.POISSON, 9.0, 1.0),
        (ArrivalKind.GAMMA, 1.0, 1.0),
        (ArrivalKind.GAMMA, 0.25, 2.0),
        (ArrivalKind.GAMMA, 16.0, 0.25),
        (ArrivalKind.FIXED, 1.0, 0.0),
    ],
)
def test_rate_and_variation(kind: ArrivalKind, burstiness: float, expected: float) -> None:
    """The rate is met, and the gaps vary by 1/sqrt(burstiness) of their mean."""
    starts_s = make_arrivals(kind, 20_000, rate=4.0, burstiness=burstiness, seed=1)
    gaps_s = np.diff(starts_s)
    assert np.mean(gaps_s) == pytest.approx(0.25, rel=0.05)
    assert np.std(gaps_s) / np.mean(gaps_s) == pytest.approx(expected, rel=0.05, abs=1e-6)


def test_seeds_differ() -> None:
    """Another seed gives other arrivals."""
    one, two = (make_arrivals("poisson", 10, rate=1.0, seed=seed) for seed in (1, 2))
    assert one != two


def test_arrivals_of_a_trace_begin_at_zero() -> None:
    """Without a rate the gaps are those of the trace."""
    starts_s = make_arrivals("trace", 3, trace_arrivals_s=[5.0, 6.0, 10.0, 20.0])
    assert starts_s == [0.0, 1.0, 5.0]


def test_a_rate_stretches_the_times_of_a_trace() -> None:
    """Three gaps in six seconds at half a request per second; their proportions stay."""
    starts_s = make_arrivals("trace", 4, rate=0.5, trace_arrivals_s=[1.0, 2.0, 3.0, 4.0])
    assert starts_s == pytest.approx([0.0, 2.0, 4.0, 6.0])


def test_closed_arrivals_are_all_there_at_once() -> None:
    """The limit on requests at the same time does the rest."""
    assert make_arrivals("closed", 3) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"kind": "poisson"}, "--arrivals"),
        ({"kind": "unknown", "rate": 1.0}, "--arrivals"),
        ({"kind": "poisson", "rate": 0.0}, "--request-rate"),
        ({"kind": "fixed", "rate": float("nan")}, "--request-rate"),
        ({"kind": "closed", "rate": 1.0}, "--request-rate"),
        ({"kind": "gamma", "rate": 1.0, "burstiness": 0.0}, "--burstiness"),
        ({"kind": "trace", "rate": 1.0, "trace_arrivals_s": [3.0, 3.0]}, "--request-rate"),
    ],
)
def test_options_that_cannot_work(arguments: dict[str, object], option: str) -> None:
    """The error names the option."""
    with pytest.raises(ConfigError) as raised:
        make_arrivals(num_requests=2, **arguments)  # type: ignore[arg-type]
    assert raised.value.key == option


def test_saved_arrivals_come_back(tmp_path: Path) -> None:
    """Exactly, and only as many as are needed."""
    path = tmp_path / "arrivals.json"
    starts_s = tuple(make_arrivals("poisson", 20, rate=3.0, seed=7))
    save_arrivals(path, ArrivalsFile(kind=ArrivalKind.POISSON, request_rate=3.0, starts_s=starts_s))
    assert load_arrivals(path, 12).starts_s == starts_s[:12]
    assert load_arrivals(path, 20).kind is ArrivalKind.POISSON


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("no json", "is no file of arrivals"),
        ('{"kind": "fixed", "starts_s": [0.0]}', "has 1 arrivals for 2 requests"),
        ('{"kind": "fixed", "starts_s": [1.0, 0.5]}', "falls"),
        ('{"kind": "fixed", "starts_s": [-1.0, 0.5]}', "below 0"),
        (None, "cannot be read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str | None, reason: str) -> None:
    """The error names the file and says why."""
    path = tmp_path / "arrivals.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=reason) as raised:
        load_arrivals(path, 2)
    assert raised.value.value == str(path)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    """It is no file of arrivals."""
    path = tmp_path / "arrivals.json"
    path.write_bytes(b'{"kind": "fixed", "\xff": 1}')
    with pytest.raises(ConfigError, match="is no file of arrivals"):
        load_arrivals(path, 2)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    """The error names the file."""
    path = tmp_path / "missing" / "arrivals.json"
    with pytest.raises(ConfigError, match="cannot be written"):
        save_arrivals(path, ArrivalsFile(kind=ArrivalKind.CLOSED, starts_s=(0.0,)))
