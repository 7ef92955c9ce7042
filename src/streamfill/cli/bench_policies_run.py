"""A comparison of policies while it runs: one cell after the other, all on one cluster."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

from streamfill.cli.bench_compare_run import CompareRun
from streamfill.cli.bench_options import ReplayOptions
from streamfill.launcher.signals import StopRequest
from streamfill.loadgen.cluster_target import OpenTarget, OwnCluster, RunningCluster
from streamfill.loadgen.compare import OWN_ENGINE, EngineSession, Variant, plan_runs
from streamfill.loadgen.compare_runs import OpenEngine, make_runs
from streamfill.loadgen.environment import LoadAverage, file_digest
from streamfill.loadgen.goodput import Goodput
from streamfill.loadgen.identity import compare_outputs
from streamfill.loadgen.kept_runs import KeptRuns
from streamfill.loadgen.policy_cells import Cell
from streamfill.loadgen.policy_outcome import CellOutcome
from streamfill.loadgen.records import RunResult
from streamfill.loadgen.run_file import RunFile
from streamfill.loadgen.workload import Workload

BETWEEN_RUNS_S: Final = 5.0
"""About: the last answer, two waits for heartbeats with counters, emptying caches."""


@dataclass(frozen=True, kw_only=True)
class CellPlan:
    """What is replayed in all runs of a cell, and when."""

    cell: Cell
    options: ReplayOptions
    workload: Workload
    starts_s: tuple[float, ...]

    @property
    def run_s(self) -> float:
        """How long a run takes where servers keep up."""
        ends_s = zip(self.starts_s, self.workload.durations_s, strict=True)
        return max(start_s + duration_s for start_s, duration_s in ends_s) + BETWEEN_RUNS_S


class PolicyRuns:
    """Makes and keeps all runs.

    Attributes:
        num_kept: runs that an earlier call made.
        kept_commits: of the source trees that they were made with.
        num_left: runs that are still to be made.
    """

    def __init__(
        self,
        plans: Sequence[CellPlan],
        variants: Sequence[Variant],
        num_runs: int,
        *,
        own: OwnCluster | RunningCluster,
        goodput: Goodput | None,
        file: RunFile | None,
        kept: KeptRuns,
        stop: StopRequest,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
            num_runs: repetitions of each variant in each cell.
            kept: runs that need not be made again.
        """
        self._plans = plans
        (session,) = plan_runs(variants, num_runs)
        num_in_cell = len(session.runs)
        self._comparisons = [
            CompareRun(
                plan.options,
                plan.workload,
                plan.starts_s,
                own=own,
                goodput=goodput,
                file=file,
                num_runs=len(plans) * num_in_cell,
                stop=stop,
                say=self._say_with_pace,
                name=plan.cell.title,
                num_before=number * num_in_cell,
                facts={"load": plan.cell.load},
            )
            for number, plan in enumerate(plans)
        ]
        self._say = say
        self.kept_commits: set[str] = set()
        self._sessions = [
            self._without_kept(session, kept, comparison, file_digest(plan.cell.path))
            for plan, comparison in zip(plans, self._comparisons, strict=True)
        ]
        self.num_left = sum(len(each.runs) for each in self._sessions)
        self.num_kept = len(plans) * num_in_cell - self.num_left
        self._planned_left_s = self.left_s
        self._planned_done_s = 0.0
        self._took_s = 0.0
        self._last_s = 0.0

    @property
    def left_s(self) -> float:
        """How long the runs that are left take where servers keep up."""
        return sum(
            plan.run_s * len(session.runs)
            for plan, session in zip(self._plans, self._sessions, strict=True)
        )

    @property
    def outcomes(self) -> list[CellOutcome]:
        """Of the cells with at least one finished run."""
        return [
            CellOutcome(
                cell=plan.cell,
                summaries=comparison.summaries,
                identity=compare_outputs(comparison.results),
            )
            for plan, comparison in zip(self._plans, self._comparisons, strict=True)
            if comparison.results
        ]

    async def make(self, open_engine: OpenEngine) -> None:
        """Makes the runs that are left; the cluster is started once, if there are any.

        Raises:
            StoppedError: a signal came.
            StreamfillError: the cluster could not be started, broke down, or refused a policy.
        """
        if not self.num_left:
            return
        async with open_engine(OWN_ENGINE) as opened:

            @asynccontextmanager
            async def already_open(engine: str) -> AsyncIterator[OpenTarget]:
                yield opened

            self._last_s = time.monotonic()
            for plan, session, comparison in zip(
                self._plans, self._sessions, self._comparisons, strict=True
            ):
                await make_runs(
                    [session],
                    open_engine=already_open,
                    replay=comparison.make,
                    on_result=self._keeper(plan, comparison),
                )

    def _without_kept(
        self, session: EngineSession, kept: KeptRuns, comparison: CompareRun, trace_digest: str
    ) -> EngineSession:
        """The runs that are still to be made; the others are handed to the comparison."""
        left = []
        for planned in session.runs:
            saved = kept.find(planned, config=comparison.config, trace_digest=trace_digest)
            if saved is None:
                left.append(planned)
            else:
                comparison.restore(saved)
                self.kept_commits.add(saved.environment.commit or "unknown")
        return replace(session, runs=tuple(left))

    def _keeper(
        self, plan: CellPlan, comparison: CompareRun
    ) -> Callable[[RunResult, LoadAverage], None]:
        def keep(result: RunResult, load: LoadAverage) -> None:
            now_s = time.monotonic()
            self._took_s += now_s - self._last_s
            self._last_s = now_s
            self._planned_done_s += plan.run_s
            self._planned_left_s -= plan.run_s
            self.num_left -= 1
            comparison.keep(result, load)

        return keep

    def _say_with_pace(self, line: str) -> None:
        left_s = self._planned_left_s * self._took_s / self._planned_done_s
        self._say(f"{line}; {about(left_s)} left" if self.num_left else line)


def about(duration_s: float) -> str:
    """A duration for people: ``about 2 h 5 min``."""
    minutes = round(duration_s / 60)
    if minutes < 1:
        return "less than a minute"
    hours, minutes = divmod(minutes, 60)
    return f"about {hours} h {minutes} min" if hours else f"about {minutes} min"
