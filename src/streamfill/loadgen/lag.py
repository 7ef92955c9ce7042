"""How late the load generator was, and what it cost: the figures by which a measurement is judged.

A generator that sends late measures itself. Its lag is therefore in every report.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from streamfill.loadgen.records import RequestRecord
from streamfill.observability.lifetime import percentile

P99_LIMIT_MS: Final = 5.0
"""What the generator promises at 500 pieces a second on one core."""


@dataclass(frozen=True, kw_only=True)
class Lag:
    """By how much things were sent late, in ms; all 0 where nothing was sent."""

    num_sent: int
    p50_ms: float
    p99_ms: float
    max_ms: float

    @property
    def line(self) -> str:
        """For people."""
        return (
            f"Generator lag of {self.num_sent} sends: P50 {self.p50_ms:.2f} ms, "
            f"P99 {self.p99_ms:.2f} ms, max {self.max_ms:.2f} ms"
        )


def lag_of(records: Iterable[RequestRecord]) -> Lag:
    """Of all requests together, warm-ups included."""
    lags_ms = [1000.0 * lag_s for record in records for lag_s in record.lag_s]
    return Lag(
        num_sent=len(lags_ms),
        p50_ms=percentile(lags_ms, 50) or 0.0,
        p99_ms=percentile(lags_ms, 99) or 0.0,
        max_ms=max(lags_ms, default=0.0),
    )


class CpuMeter:
    """How much of a core this process, with all its threads, used since the meter was made."""

    def __init__(self) -> None:
        self._cpu_s = time.process_time()
        self._start_s = time.monotonic()

    @property
    def cores(self) -> float:
        """1 is one core all the time."""
        wall_s = time.monotonic() - self._start_s
        return (time.process_time() - self._cpu_s) / wall_s if wall_s > 0 else 0.0
