"""Times that cannot be measured here and are drawn instead. Pure."""

from __future__ import annotations

import math
import random

from streamfill.traces.distribution import QuantileCurve
from streamfill.traces.published import SOURCE, Workload


class DrawnGaps:
    """Draws gaps between segments from the published quantiles of one workload."""

    def __init__(self, workload: Workload, *, seed: int) -> None:
        figures = workload.gap_ms
        points = dict(figures.quantiles)
        if figures.maximum is not None:
            num_gaps = workload.num_queries * (workload.segments.mean - 1)
            points[1 - 1 / num_gaps] = figures.maximum
        self._curve = QuantileCurve(tuple(sorted(points.items())))
        self._name = f"{workload.name}/{seed}"
        self.description = (
            f"gaps of the workload {workload.name} of {SOURCE}: log-normal between the published "
            f"quantiles, none below the lowest of them, {self._curve.points[0][1]:g} ms"
        )

    def of_request(self, number: int) -> RequestGaps:
        """The gaps of one request; they do not depend on those of the others."""
        return RequestGaps(self._curve, random.Random(f"{self._name}/gaps of request {number}"))


class RequestGaps:
    """The gaps of one request, one after the other."""

    def __init__(self, curve: QuantileCurve, generator: random.Random) -> None:
        self._curve = curve
        self._generator = generator

    def next_ms(self) -> float:
        """The next gap in milliseconds."""
        return self._curve.quantile(self._generator.random())


def poisson_arrivals_ms(num_requests: int, *, rate_per_s: float, seed: int) -> list[float]:
    """Arrival times of a Poisson process since its first arrival, at 0."""
    generator = random.Random(f"arrivals/{seed}")
    arrivals_ms, now_ms = [], 0.0
    for _ in range(num_requests):
        arrivals_ms.append(round(now_ms, 3))
        now_ms += -math.log(1.0 - generator.random()) * 1000.0 / rate_per_s
    return arrivals_ms
