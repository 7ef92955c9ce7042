"""Options of all `streamfill bench` commands: what is replayed, when, and what is kept."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import msgspec

from streamfill.errors import ConfigError
from streamfill.loadgen.arrivals import (
    ArrivalKind,
    ArrivalsFile,
    load_arrivals,
    make_arrivals,
    save_arrivals,
)
from streamfill.loadgen.workload import Workload, read_workload


class ReplayOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a trace is replayed; the same for all runs of a comparison.

    Attributes:
        limit: only so many requests from the start of the trace; None: all.
        time_scale: all times of the trace are multiplied by it.
        request_rate: per second; None: as in the trace.
        burstiness: of gamma arrivals.
        seed: of arrivals that are drawn.
        arrivals_file: read if it is there, else written.
        max_concurrency: most requests at the same time; None: no limit.
        num_warm_up: so many requests at the start are left out of the figures.
        timeout_s: a request is given up so long after its prompt was complete; None: never.
        ttft_slo_ms: from the commit to the first token, as each request tells it to the servers.
    """

    trace: Path
    limit: int | None = None
    time_scale: float = 1.0
    arrivals: ArrivalKind = ArrivalKind.TRACE
    request_rate: float | None = None
    burstiness: float = 1.0
    seed: int = 0
    arrivals_file: Path | None = None
    max_concurrency: int | None = None
    num_warm_up: int = 0
    timeout_s: float | None = None
    ttft_slo_ms: float | None = None

    @property
    def is_closed_loop(self) -> bool:
        """Whether a request arrives only when another one has ended."""
        return self.arrivals is ArrivalKind.CLOSED


def add_replay_options(parser: argparse.ArgumentParser) -> None:
    """Options that say what is sent, and when."""
    parser.add_argument("--trace", type=Path, required=True, metavar="FILE", help="trace to replay")
    parser.add_argument(
        "--request-rate", type=float, metavar="R", help="requests per second; rescales trace times"
    )
    parser.add_argument(
        "--arrivals-file",
        type=Path,
        metavar="FILE",
        help="use the arrivals in it; where there is no such file, write it",
    )
    add_pace_options(parser)


def add_pace_options(parser: argparse.ArgumentParser) -> None:
    """Those of them that mean the same for any number of traces and rates."""
    parser.add_argument("--limit", type=int, metavar="N", help="only a trace's first N requests")
    parser.add_argument(
        "--time-scale", type=float, default=1.0, metavar="X", help="multiply all times of the trace"
    )
    parser.add_argument(
        "--arrivals",
        choices=[kind.value for kind in ArrivalKind],
        default=ArrivalKind.TRACE.value,
        help="how requests follow each other; default: as in the trace",
    )
    parser.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="shape of gamma arrivals; 1: Poisson, below: bursts",
    )
    parser.add_argument("--seed", type=int, default=0, help="of arrivals that are drawn")
    parser.add_argument(
        "--max-concurrency", type=int, metavar="N", help="most requests at the same time"
    )
    parser.add_argument(
        "--warm-up",
        type=int,
        default=0,
        metavar="N",
        help="leave the first N requests out of the figures",
    )
    parser.add_argument(
        "--timeout-s",
        type=float,
        metavar="S",
        help="give a request up so long after its prompt was complete",
    )
    parser.add_argument(
        "--ttft-slo-ms",
        type=float,
        metavar="MS",
        help="tell our cluster the time to the first token that each request wants; some policies "
        "go by it",
    )


def add_output_options(
    parser: argparse.ArgumentParser, *, always_saves_records: bool = False
) -> None:
    """What is counted as good, and which files are written."""
    parser.add_argument(
        "--goodput",
        nargs="+",
        metavar="NAME:MS",
        help="objectives of a good request, such as ttft:500 tpot:50",
    )
    parser.add_argument(
        "--output-file", type=Path, metavar="FILE", help="append each run as a JSON line"
    )
    if not always_saves_records:
        parser.add_argument(
            "--save-records", action="store_true", help="keep every request beside --output-file"
        )


def replay_options(args: argparse.Namespace) -> ReplayOptions:
    """The checked options of `add_replay_options`.

    Raises:
        ConfigError: names the option that cannot work.
    """
    for name in ("limit", "max_concurrency"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "must be at least 1")
    for name in ("time_scale", "timeout_s", "ttft_slo_ms"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ConfigError(f"--{name.replace('_', '-')}", value, "must be above 0")
    for name in ("warm_up", "seed"):
        if (value := getattr(args, name)) < 0:
            raise ConfigError(f"--{name.replace('_', '-')}", value, "must not be negative")
    arrivals = ArrivalKind(args.arrivals)
    if arrivals is ArrivalKind.CLOSED and args.max_concurrency is None:
        raise ConfigError("--arrivals", args.arrivals, "needs --max-concurrency")
    return ReplayOptions(
        trace=args.trace,
        limit=args.limit,
        time_scale=args.time_scale,
        arrivals=arrivals,
        request_rate=args.request_rate,
        burstiness=args.burstiness,
        seed=args.seed,
        arrivals_file=args.arrivals_file,
        max_concurrency=args.max_concurrency,
        num_warm_up=args.warm_up,
        timeout_s=args.timeout_s,
        ttft_slo_ms=args.ttft_slo_ms,
    )


def workload_of(options: ReplayOptions) -> Workload:
    """The trace, read through once.

    Raises:
        TraceError: it cannot be read.
        ConfigError: all its requests would be warm-ups.
    """
    workload = read_workload(options.trace, limit=options.limit, time_scale=options.time_scale)
    if options.num_warm_up >= workload.num_requests:
        remedy = f"leaves none of the {workload.num_requests} requests to be measured"
        raise ConfigError("--warm-up", options.num_warm_up, remedy)
    return workload


def as_in_file(options: ReplayOptions, workload: Workload) -> ReplayOptions:
    """The options, with what the file of arrivals was drawn by, where there is one: a run is called
    after the arrivals that it has.

    Raises:
        ConfigError: the file cannot be used.
    """
    path = options.arrivals_file
    if path is None or not path.exists():
        return options
    found = load_arrivals(path, workload.num_requests)
    if found.kind is ArrivalKind.CLOSED and options.max_concurrency is None:
        raise ConfigError(
            "--arrivals-file", str(path), "has closed arrivals, which need --max-concurrency"
        )
    return msgspec.structs.replace(
        options,
        arrivals=found.kind,
        request_rate=found.request_rate,
        burstiness=found.burstiness,
        seed=found.seed,
    )


def starts_of(options: ReplayOptions, workload: Workload) -> tuple[float, ...]:
    """When each request starts: from the file of arrivals, if there is one, else drawn, and written
    to that file if it is named.

    Raises:
        ConfigError: an option cannot work, or the file cannot be used.
    """
    path = options.arrivals_file
    if path is not None and path.exists():
        return load_arrivals(path, workload.num_requests).starts_s
    starts_s = make_arrivals(
        options.arrivals,
        workload.num_requests,
        rate=options.request_rate,
        burstiness=options.burstiness,
        seed=options.seed,
        trace_arrivals_s=workload.arrivals_s,
    )
    if path is not None:
        arrivals = ArrivalsFile(
            kind=options.arrivals,
            request_rate=options.request_rate,
            burstiness=options.burstiness,
            seed=options.seed,
            starts_s=tuple(starts_s),
        )
        save_arrivals(path, arrivals)
    return tuple(starts_s)
