"""Runs of a small simulated cluster, for tests of the report and for looking at it.

One prefill server computes pieces of at most ``STEP_TOKENS``, committed streams first, in the order
of their arrival; the events are those that a router, a server and the load generator would note.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from streamfill.loadgen.records import Event, ModeName, RequestRecord, RunResult
from streamfill.observability.lifetime import LifetimeEvent as E
from tests.unit.loadgen.run_builders import event

STEP_TOKENS: Final = 256
_TOKENISE_S: Final = 0.002
_HANDOFF_S: Final = 0.012
_TPOT_S: Final = 0.03
_NUM_OUTPUT: Final = 16


@dataclass
class _Job:
    """A prompt that is computed: a request of ours, or one of its warm-ups."""

    arrivals: list[tuple[float, int]]
    """When so many tokens come to the server."""
    commit_s: float
    runs: list[Event] = field(default_factory=list)
    done_s: float = 0.0
    num_done: int = 0

    def waiting(self, now_s: float) -> int:
        return sum(n for at_s, n in self.arrivals if at_s <= now_s) - self.num_done

    @property
    def num_tokens(self) -> int:
        return sum(n for _, n in self.arrivals)


@dataclass(frozen=True)
class _Query:
    open_s: float
    segments: list[tuple[float, int]]

    @property
    def last_s(self) -> float:
        return self.segments[-1][0]


def simulated_run(
    mode: ModeName,
    *,
    run: int = 0,
    num_requests: int = 80,
    request_rate: float | None = 0.55,
    tokens_per_s: float = 1500.0,
    label: str | None = None,
    num_output: int = _NUM_OUTPUT,
    trace: str = "crawl-small",
) -> RunResult:
    """A run whose arrivals depend on the rate and the number of requests only."""
    queries = _queries(num_requests, request_rate or 0.55)
    jobs = [_jobs(mode, query) for query in queries]
    _compute([job for each in jobs for job in each], tokens_per_s * (1 + 0.02 * run))
    records = tuple(
        _record(index, query, each, num_output)
        for index, (query, each) in enumerate(zip(queries, jobs, strict=True))
    )
    return RunResult(
        run=run,
        label=label or mode.value,
        mode=mode,
        target="streamfill",
        policy="fcfs",
        trace=trace,
        request_rate=request_rate,
        wall_s=max(record.client_events[-1][1] for record in records),
        records=records,
    )


def comparison(num_runs: int = 2, num_requests: int = 80) -> list[RunResult]:
    """All of our modes on the same arrivals."""
    return [
        simulated_run(mode, run=run, num_requests=num_requests)
        for run in range(num_runs)
        for mode in ModeName
    ]


def _queries(num: int, rate: float) -> list[_Query]:
    draw = random.Random(7)
    queries, now_s = [], 0.0
    for _ in range(num):
        at_s, segments = now_s, []
        for _ in range(draw.randint(3, 10)):
            at_s += min(6.0, draw.lognormvariate(-0.35, 0.9))
            segments.append((at_s, int(min(1500, 40 + draw.lognormvariate(5.2, 0.7)))))
        queries.append(_Query(now_s, segments))
        now_s += draw.expovariate(rate)
    return queries


def _jobs(mode: ModeName, query: _Query) -> list[_Job]:
    """The last one is the request itself."""
    total = sum(n for _, n in query.segments)
    if mode is ModeName.ONESHOT:
        return [_Job([(query.last_s, total)], query.last_s)]
    if mode is ModeName.STREAM:
        return [_Job(query.segments, query.last_s)]
    *before, last = query.segments
    return [*(_Job([each], each[0]) for each in before), _Job([last], query.last_s)]


def _compute(jobs: Sequence[_Job], tokens_per_s: float) -> None:
    now_s, open_jobs = 0.0, sorted(jobs, key=lambda job: job.arrivals[0][0])
    while open_jobs:
        ready = [job for job in open_jobs if job.waiting(now_s) > 0]
        if not ready:
            now_s = min(at_s for job in open_jobs for at_s, _ in job.arrivals if at_s > now_s)
            continue
        job = min(ready, key=lambda each: (each.commit_s > now_s, each.arrivals[0][0]))
        num = min(STEP_TOKENS, job.waiting(now_s))
        start_s, now_s = now_s + 0.001, now_s + 0.004 + num / tokens_per_s
        job.runs += [
            event(E.COMPUTE_STARTED, start_s),
            event(E.COMPUTE_DONE, now_s, num_tokens=num),
        ]
        job.num_done += num
        if job.num_done == job.num_tokens:
            job.done_s = now_s
            open_jobs.remove(job)


def _record(index: int, query: _Query, jobs: Sequence[_Job], num_output: int) -> RequestRecord:
    first_s = max(jobs[-1].done_s, query.last_s) + 0.003
    received = [
        event(E.SEGMENT_RECEIVED, at_s, segment=n) for n, (at_s, _) in enumerate(query.segments)
    ]
    later_s = [first_s + 0.035 + _TPOT_S * n for n in range(num_output - 1)]
    tokens = [
        event(E.FIRST_TOKEN, first_s),
        event(E.SECOND_TOKEN, later_s[0]),
        *(event(E.TOKEN, at_s) for at_s in later_s[1:-1]),
        event(E.LAST_TOKEN, later_s[-1]),
    ]
    client = [
        event(E.OPENED, query.open_s),
        *received,
        event(E.COMMIT_RECEIVED, query.last_s),
        *tokens,
        event(E.DONE, later_s[-1]),
    ]
    server: list[Event] = []
    for job in jobs:
        is_last = job is jobs[-1]
        server += [event(E.OPENED, query.open_s if len(jobs) == 1 else job.arrivals[0][0])]
        for n, (at_s, _) in enumerate(job.arrivals):
            server.append(event(E.SEGMENT_RECEIVED, at_s, segment=n))
            server.append(event(E.SEGMENT_SENT, at_s + _TOKENISE_S, segment=n))
        server.append(event(E.COMMIT_RECEIVED, job.commit_s))
        server += job.runs
        server.append(event(E.FIRST_TOKEN, first_s if is_last else job.done_s))
        if is_last:
            server.append(event(E.HANDOFF_STARTED, first_s + 0.001))
            server.append(event(E.HANDOFF_DONE, first_s + 0.001 + _HANDOFF_S))
            server.append(event(E.SECOND_TOKEN, later_s[0]))
        server.append(event(E.DONE, later_s[-1] if is_last else job.done_s))
    return RequestRecord(
        index=index,
        request_id=f"q{index}",
        client_events=tuple(client),
        server_events=tuple(server),
        lag_s=(0.0004,) * (len(query.segments) + 1),
        num_segments=len(query.segments),
        num_requests=len(jobs),
        token_ids=tuple(range(num_output)),
        text=f"answer {index}",
        num_output_tokens=num_output,
        num_prompt_tokens=sum(n for _, n in query.segments),
        handoff="done",
    )
