"""Measured points to the coefficients of ``preemption.costs``, and how well they describe them.

Coefficients are times, so none may be negative: least squares under that condition (``nnls`` of
scipy). Points are weighted by one over their time, so that the fit minimises *relative* errors: a
cost model is used to compare short times with long ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

POOR_R2: Final = 0.9
"""A fit below this explains too little to be relied on."""
POOR_ERROR: Final = 0.25
"""Median relative error above which a fit is poor."""


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One measurement, and what the fit makes of it."""

    x: dict[str, float]
    """``num_tokens`` and ``prefix_tokens``, or ``num_bytes``."""
    seconds: float
    predicted_s: float = 0.0

    @property
    def residual_s(self) -> float:
        """Measured less predicted."""
        return self.seconds - self.predicted_s


class Curve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fitted form with its points."""

    coefficients: dict[str, float]
    r2: float
    """Share of the variance of the measured times that it explains; 1 is perfect."""
    median_error: float
    """Median of ``|measured - predicted| / measured``."""
    points: tuple[Point, ...]

    @property
    def warning(self) -> str | None:
        """What is wrong with the fit; None where it is good."""
        if self.r2 < POOR_R2:
            return f"it explains {100 * self.r2:.0f} % of the variance, below {100 * POOR_R2:.0f} %"
        if self.median_error > POOR_ERROR:
            return (
                f"its median error is {100 * self.median_error:.0f} %, "
                f"above {100 * POOR_ERROR:.0f} %"
            )
        return None


def fit_recompute(points: Sequence[Point]) -> Curve:
    """``fixed_s + n * per_token_s + n * (p + n / 2) * per_pair_s``; each point one forward pass of
    ``num_tokens`` tokens behind ``prefix_tokens``.

    Raises:
        ValueError: fewer than three points.
    """

    def terms(point: Point) -> dict[str, float]:
        n, p = point.x["num_tokens"], point.x["prefix_tokens"]
        return {"fixed_s": 1.0, "per_token_s": n, "per_pair_s": n * (p + n / 2)}

    return _fit(points, [terms(point) for point in points])


def fit_copy(points: Sequence[Point]) -> Curve:
    """``fixed_s + num_bytes * per_byte_s``.

    Raises:
        ValueError: fewer than two points.
    """
    return _fit(points, [{"fixed_s": 1.0, "per_byte_s": point.x["num_bytes"]} for point in points])


def _fit(points: Sequence[Point], terms: Sequence[dict[str, float]]) -> Curve:
    import numpy as np
    from scipy.optimize import nnls

    names = list(terms[0]) if terms else []
    if len(points) < max(2, len(names)):
        raise ValueError(f"{len(points)} points are too few to fit {', '.join(names) or 'a curve'}")
    rows = np.array([[term[name] for name in names] for term in terms])
    times = np.array([point.seconds for point in points])
    weights = 1.0 / np.maximum(times, 1e-9)
    # Columns of like size, or the solver takes the smallest for zero.
    scales = np.maximum(np.abs(rows).max(axis=0), 1e-300)
    solution, _ = nnls(rows / scales * weights[:, None], times * weights)
    values = solution / scales
    predicted = rows @ values
    spread = float(((times - times.mean()) ** 2).sum())
    left = float(((times - predicted) ** 2).sum())
    errors = np.abs(times - predicted) / np.maximum(times, 1e-9)
    return Curve(
        coefficients={name: float(value) for name, value in zip(names, values, strict=True)},
        r2=1.0 - left / spread if spread > 0 else float(left == 0.0),
        median_error=float(np.median(errors)),
        points=tuple(
            Point(x=point.x, seconds=point.seconds, predicted_s=float(value))
            for point, value in zip(points, predicted, strict=True)
        ),
    )
