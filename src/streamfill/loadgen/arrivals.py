"""When the requests of a run arrive. Drawn once and kept, so that all modes meet the same ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final, Literal

import msgspec

from streamfill.errors import ConfigError

_RATE_OPTION: Final = "--request-rate"
_FILE_OPTION: Final = "--arrivals-file"


class ArrivalKind(StrEnum):
    """How requests follow each other."""

    TRACE = "trace"
    """As in the trace; with a rate, its times are stretched to that rate."""
    POISSON = "poisson"
    """Independent of each other."""
    GAMMA = "gamma"
    """Gamma-distributed times between requests. Its shape is the burstiness, as in the benchmarks
    of vLLM and SGLang: 1 is Poisson, less comes in bursts, more is more even."""
    FIXED = "fixed"
    """Evenly spaced."""
    CLOSED = "closed"
    """All are there from the start; each begins when another one has ended."""


class ArrivalsFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arrivals as they stand in a JSON file."""

    schema: Literal[1] = 1
    kind: ArrivalKind
    request_rate: float | None = None
    burstiness: float = 1.0
    seed: int = 0
    starts_s: tuple[float, ...]
    """Of each request, in seconds since the start of the run; never falling."""


def make_arrivals(
    kind: ArrivalKind | str,
    num_requests: int,
    *,
    rate: float | None = None,
    burstiness: float = 1.0,
    seed: int = 0,
    trace_arrivals_s: Sequence[float] = (),
) -> list[float]:
    """The start of each request, in seconds since the start of the run; the first one is 0.

    Args:
        rate: requests per second; needed by ``poisson``, ``gamma`` and ``fixed``.
        burstiness: of ``gamma``.
        seed: of what is drawn. The same arguments always give the same arrivals.
        trace_arrivals_s: of ``trace``, at least ``num_requests``.

    Raises:
        ConfigError: names the option that is missing or cannot work.
    """
    kind = _kind(kind)
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ConfigError(_RATE_OPTION, rate, "must be a number of requests per second above 0")
    if kind is ArrivalKind.CLOSED:
        if rate is not None:
            raise ConfigError(_RATE_OPTION, rate, "closed arrivals have no rate; leave it out")
        return [0.0] * num_requests
    if kind is ArrivalKind.TRACE:
        return _of_trace(trace_arrivals_s[:num_requests], rate)
    if rate is None:
        raise ConfigError("--arrivals", kind.value, f"needs {_RATE_OPTION}")
    if kind is ArrivalKind.FIXED:
        return [number / rate for number in range(num_requests)]
    if not (math.isfinite(burstiness) and burstiness > 0):
        raise ConfigError("--burstiness", burstiness, "must be above 0; 1 is Poisson")
    import numpy as np  # not for `--help`

    shape = 1.0 if kind is ArrivalKind.POISSON else burstiness
    generator = np.random.Generator(np.random.PCG64(seed))
    gaps_s = generator.gamma(shape, 1.0 / (rate * shape), size=max(0, num_requests - 1))
    starts: list[float] = np.cumsum(gaps_s).tolist()
    return [0.0, *starts][:num_requests]


def save_arrivals(path: Path, arrivals: ArrivalsFile) -> None:
    """
    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        path.write_bytes(msgspec.json.encode(arrivals) + b"\n")
    except OSError as error:
        raise ConfigError(
            _FILE_OPTION, str(path), f"cannot be written: {error.strerror}"
        ) from error


def load_arrivals(path: Path, num_requests: int) -> ArrivalsFile:
    """The first arrivals of a file.

    Raises:
        ConfigError: it cannot be read, is something else, or has too few.
    """
    try:
        arrivals = msgspec.json.decode(path.read_bytes(), type=ArrivalsFile)
    except OSError as error:
        raise ConfigError(_FILE_OPTION, str(path), f"cannot be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(_FILE_OPTION, str(path), f"is no file of arrivals: {error}") from error
    starts_s = arrivals.starts_s
    if len(starts_s) < num_requests:
        remedy = (
            f"has {len(starts_s)} arrivals for {num_requests} requests; use --limit or a new file"
        )
        raise ConfigError(_FILE_OPTION, str(path), remedy)
    if any(after < before for before, after in zip((0.0, *starts_s), starts_s, strict=False)):
        raise ConfigError(_FILE_OPTION, str(path), "starts_s falls or begins below 0")
    return msgspec.structs.replace(arrivals, starts_s=starts_s[:num_requests])


def _kind(name: ArrivalKind | str) -> ArrivalKind:
    try:
        return ArrivalKind(name)
    except ValueError as error:
        known = ", ".join(ArrivalKind)
        raise ConfigError("--arrivals", name, f"must be one of {known}") from error


def _of_trace(arrivals_s: Sequence[float], rate: float | None) -> list[float]:
    if not arrivals_s:
        return []
    first_s = arrivals_s[0]
    starts_s = [arrival_s - first_s for arrival_s in arrivals_s]
    if rate is None or len(starts_s) == 1:
        return starts_s
    if starts_s[-1] <= 0:
        remedy = "all requests of the trace arrive at once; use --arrivals poisson or fixed"
        raise ConfigError(_RATE_OPTION, rate, remedy)
    factor = (len(starts_s) - 1) / starts_s[-1] / rate
    return [start_s * factor for start_s in starts_s]
