"""The page of a cost profile: self-contained, with every curve and every warning."""

from __future__ import annotations

import pytest

pytest.importorskip("plotly")

from streamfill.profiling.fits import Curve, Point
from streamfill.profiling.page import render_profile
from streamfill.profiling.profile_file import CostProfile


def _curve(r2: float, *prefixes: float) -> Curve:
    points = tuple(
        Point(
            x={"num_tokens": 16.0, "prefix_tokens": p, "num_bytes": 1e6},
            seconds=0.1,
            predicted_s=0.11,
        )
        for p in prefixes or (0.0,)
    )
    return Curve(coefficients={"fixed_s": 0.1}, r2=r2, median_error=0.01, points=points)


def test_page_has_curves_and_warnings_and_needs_no_network() -> None:
    profile = CostProfile(
        model="<tiny>",
        device="cpu",
        device_type="cpu",
        bytes_per_token=100,
        threads=1,
        versions={"torch": "2"},
        curves={
            "recompute": _curve(0.99, *map(float, range(20))),
            "swap_out": _curve(0.5),
            "swap_in": _curve(1.0),
        },
    )
    page = render_profile(profile)
    assert page.count("This fit is poor") == 1
    assert "explains 50 %" in page
    for name in profile.curves:
        assert f'<div id="{name}">' in page
    assert "<tiny>" not in page
    assert 'src="http' not in page
