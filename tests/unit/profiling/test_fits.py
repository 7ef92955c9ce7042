"""Fits find the coefficients that made the points, say when they cannot, and survive a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("scipy.optimize")  # now: its import outlasts the deadline of an example

from streamfill.errors import ConfigError
from streamfill.observability.lifetime import LifetimeEntry, LifetimeEvent
from streamfill.preemption.costs import BUILT_IN
from streamfill.profiling.fits import Curve, Point, fit_copy, fit_recompute
from streamfill.profiling.profile_file import (
    CostProfile,
    costs_for,
    load_profile,
    profile_path,
    save_profile,
)
from streamfill.profiling.recompute import points_of


def _recompute_points(fixed: float, token: float, pair: float) -> list[Point]:
    return [
        Point(
            x={"num_tokens": n, "prefix_tokens": p},
            seconds=fixed + n * token + n * (p + n / 2) * pair,
        )
        for n in (16.0, 64.0, 256.0)
        for p in (0.0, 1000.0, 4000.0)
    ]


def _copy_points(fixed: float, per_byte: float) -> list[Point]:
    return [Point(x={"num_bytes": n}, seconds=fixed + n * per_byte) for n in (1e6, 1e7, 1e8)]


@given(st.floats(1e-4, 0.2), st.floats(1e-5, 1e-2), st.floats(0.0, 1e-6))
def test_recompute_coefficients_are_found(fixed: float, token: float, pair: float) -> None:
    curve = fit_recompute(_recompute_points(fixed, token, pair))
    assert curve.coefficients["fixed_s"] == pytest.approx(fixed, rel=1e-3)
    assert curve.coefficients["per_token_s"] == pytest.approx(token, rel=1e-3)
    assert curve.coefficients["per_pair_s"] == pytest.approx(pair, rel=1e-3, abs=1e-12)
    assert curve.r2 == pytest.approx(1.0)
    assert curve.warning is None


def test_copy_coefficients_are_found() -> None:
    curve = fit_copy(_copy_points(1e-4, 2e-10))
    assert curve.coefficients == pytest.approx({"fixed_s": 1e-4, "per_byte_s": 2e-10}, rel=1e-3)
    assert [point.residual_s for point in curve.points] == pytest.approx([0, 0, 0], abs=1e-9)


def test_no_coefficient_is_negative() -> None:
    """Times that fall with size are noise, not a negative bandwidth."""
    points = [Point(x={"num_bytes": n}, seconds=1.0 / n) for n in (1.0, 2.0, 3.0, 4.0)]
    curve = fit_copy(points)
    assert min(curve.coefficients.values()) >= 0.0
    assert curve.warning is not None


def test_a_poor_fit_warns() -> None:
    points = [Point(x={"num_bytes": n}, seconds=s) for n, s in ((1, 5), (2, 1), (3, 9), (4, 2))]
    assert "variance" in (fit_copy(points).warning or "")


def test_a_fit_that_is_off_for_most_points_warns() -> None:
    curve = Curve(coefficients={}, r2=0.99, median_error=0.3, points=())
    assert curve.warning == "its median error is 30 %, above 25 %"


@pytest.mark.parametrize("num_points", [0, 1])
def test_too_few_points(num_points: int) -> None:
    with pytest.raises(ValueError, match="too few"):
        fit_copy(_copy_points(1.0, 1.0)[:num_points])


def _entry(event: LifetimeEvent, at_s: float, num_tokens: int | None = None) -> LifetimeEntry:
    return LifetimeEntry(event, at_s, None, num_tokens, "")


def test_each_pass_of_a_stream_is_a_point() -> None:
    lifetime = [
        _entry(LifetimeEvent.OPENED, 0.0),
        _entry(LifetimeEvent.COMPUTE_STARTED, 1.0),
        _entry(LifetimeEvent.COMPUTE_DONE, 1.5, 96),
        _entry(LifetimeEvent.COMPUTE_STARTED, 2.0),
        _entry(LifetimeEvent.COMPUTE_DONE, 2.25, 40),
    ]
    first, second = points_of(lifetime)
    assert (first.x, first.seconds) == ({"num_tokens": 96.0, "prefix_tokens": 0.0}, 0.5)
    assert (second.x, second.seconds) == ({"num_tokens": 40.0, "prefix_tokens": 96.0}, 0.25)


def _profile() -> CostProfile:
    return CostProfile(
        model="tiny",
        device="cpu",
        device_type="cpu",
        bytes_per_token=100,
        threads=1,
        versions={"torch": "2"},
        curves={
            "recompute": fit_recompute(_recompute_points(0.1, 0.01, 1e-7)),
            "swap_out": fit_copy(_copy_points(1e-4, 2e-10)),
            "swap_in": fit_copy(_copy_points(2e-4, 3e-10)),
            "handoff": fit_copy(_copy_points(1e-3, 1e-9)),
        },
    )


def test_servers_find_the_profile_of_their_model(tmp_path: Path) -> None:
    save_profile(_profile(), profile_path(tmp_path, "tiny", "cpu"))
    costs, source = costs_for(None, home=tmp_path, model="tiny", device_type="cpu")
    assert costs.recompute.per_token_s == pytest.approx(0.01, rel=1e-3)
    assert not costs.copies_overlap
    assert source == "tiny.cpu.json"
    assert costs_for(None, home=tmp_path, model="other", device_type="cpu") == (
        BUILT_IN["cpu"],
        "built-in",
    )


def test_a_broken_profile_that_nobody_named_is_passed_over(tmp_path: Path) -> None:
    path = profile_path(tmp_path, "tiny", "cpu")
    path.parent.mkdir()
    path.write_text("{}")
    assert costs_for(None, home=tmp_path, model="tiny", device_type="cpu")[1] == "built-in"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot be read"),
        ("{}", "is no cost profile"),
        ("not json", "is no cost profile"),
    ],
)
def test_a_broken_profile_that_is_named_is_an_error(
    tmp_path: Path, content: str | None, part: str
) -> None:
    path = tmp_path / "profile.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError) as raised:
        costs_for(str(path), home=tmp_path, model="tiny", device_type="cpu")
    assert part in str(raised.value)
    assert "streamfill profile" in str(raised.value)


@pytest.mark.parametrize("curve", ["recompute", "swap_out", "swap_in"])
@pytest.mark.parametrize(
    ("value", "part"), [(None, "lacks {}"), (-1.0, "has {} = -1.0, which is no time")]
)
def test_a_profile_without_a_time_names_it(
    tmp_path: Path, curve: str, value: float | None, part: str
) -> None:
    """An error for who named it, and passed over where nobody did."""
    path = profile_path(tmp_path, "tiny", "cpu")
    save_profile(_profile(), path)
    content = json.loads(path.read_text())
    coefficients = content["curves"][curve]["coefficients"]
    del coefficients["fixed_s"]
    if value is not None:
        coefficients["fixed_s"] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as raised:
        costs_for(str(path), home=tmp_path, model="tiny", device_type="cpu")
    assert part.format(f"curves.{curve}.coefficients.fixed_s") in str(raised.value)
    assert str(path) in str(raised.value)
    assert costs_for(None, home=tmp_path, model="tiny", device_type="cpu")[1] == "built-in"


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile = _profile()
    save_profile(profile, tmp_path / "sub" / "profile.json")
    assert load_profile(tmp_path / "sub" / "profile.json") == profile


def test_a_profile_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save_profile(_profile(), path)
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(ConfigError, match="has format 9"):
        load_profile(path)
