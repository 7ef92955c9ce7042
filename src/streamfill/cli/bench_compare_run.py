"""One comparison while it runs: makes each run, keeps it, and says how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from streamfill.cli.bench_facts import run_config
from streamfill.cli.bench_options import ReplayOptions
from streamfill.cli.bench_progress import run_progress
from streamfill.launcher.cluster import unless_stopped
from streamfill.launcher.signals import StopRequest
from streamfill.loadgen.cluster_target import OpenTarget, OwnCluster, RunningCluster
from streamfill.loadgen.compare import PlannedRun
from streamfill.loadgen.environment import Environment, LoadAverage, environment
from streamfill.loadgen.figures import Figure
from streamfill.loadgen.goodput import Goodput
from streamfill.loadgen.metrics import RunSummary, summarise
from streamfill.loadgen.records import RunResult
from streamfill.loadgen.run_file import RunFile, SavedRun
from streamfill.loadgen.runner import RunPlan, replay
from streamfill.loadgen.workload import Workload


class CompareRun:
    """Makes and keeps the runs of a comparison.

    Attributes:
        results: of all finished runs, in the order in which they were made.
        summaries: of each.
    """

    def __init__(
        self,
        options: ReplayOptions,
        workload: Workload,
        starts_s: tuple[float, ...],
        *,
        own: OwnCluster | RunningCluster,
        goodput: Goodput | None,
        file: RunFile | None,
        num_runs: int,
        stop: StopRequest,
        say: Callable[[str], None],
        name: str = "",
        num_before: int = 0,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            num_runs: all that are planned, over all modes, and over all comparisons where this is
                one of several.
            stop: its first signal throws the run under way away.
            name: of the comparison, where it is one of several.
            num_before: runs of the comparisons before it.
            facts: kept with each run beside the options.
        """
        self.results: list[RunResult] = []
        self.summaries: list[RunSummary] = []
        self.config = {**run_config(options, own), **(facts or {})}
        self._options = options
        self._workload = workload
        self._starts_s = starts_s
        self._goodput = goodput
        self._file = file
        self._num_runs = num_runs
        self._stop = stop
        self._say = say
        self._prefix = f"{name} " if name else ""
        self._num_before = num_before
        self._model = own.model_path.name if isinstance(own, OwnCluster) else ""
        self._environment: Environment | None = None

    @property
    def environment(self) -> Environment:
        """Where it runs; of the model, the name is known once the first engine runs."""
        if self._environment is None:
            self._environment = environment(trace=self._workload.path, model=self._model)
        return self._environment

    async def make(self, opened: OpenTarget, planned: PlannedRun) -> RunResult:
        """As ``compare_runs.Replay``.

        Raises:
            StoppedError: a signal came.
        """
        self._model = self._model or opened.facts.model
        variant = planned.variant
        plan = RunPlan(
            mode=variant.mode,
            label=variant.label,
            run=planned.run,
            policy=variant.policy,
            trace=self._workload.name,
            request_rate=self._options.request_rate,
            max_concurrency=self._options.max_concurrency,
            is_closed_loop=self._options.is_closed_loop,
            num_warm_up=self._options.num_warm_up,
            timeout_s=self._options.timeout_s,
            ttft_slo_ms=self._options.ttft_slo_ms,
        )
        with run_progress(self._title(planned)) as show:
            scripts = self._workload.scripts(opened.facts.vocab_size)
            run = replay(opened.target, scripts, self._starts_s, plan, on_progress=show)
            return await unless_stopped(run, self._stop)

    def restore(self, saved: SavedRun) -> None:
        """A run that was made and kept before counts as one of these."""
        self.results.append(saved.result)
        self.summaries.append(summarise(saved.result, self._goodput))

    def keep(self, result: RunResult, load: LoadAverage) -> None:
        """As ``compare_runs.OnResult``.

        Raises:
            ConfigError: the output file cannot be written any more.
        """
        summary = summarise(result, self._goodput)
        self.results.append(result)
        self.summaries.append(summary)
        if self._file is not None:
            saved = SavedRun(
                result=result,
                environment=self.environment,
                load=load,
                config=self.config,
                goodput=self._goodput,
            )
            self._file.add(saved, summary)
        self._say(self._line(summary))

    def _title(self, planned: PlannedRun) -> str:
        number = self._num_before + len(self.results) + 1
        label = f"{self._prefix}{planned.variant.label}"
        return f"{number}/{self._num_runs} {label} run {planned.run}"

    def _line(self, summary: RunSummary) -> str:
        ttft = summary.figure(Figure.TTFT_LAST_SEGMENT)
        time = "" if ttft is None else f", TTFT from the last segment P50 {ttft.p50:.0f} ms"
        return (
            f"{self._num_before + len(self.results)}/{self._num_runs} "
            f"{self._prefix}{summary.label} run {summary.run}: "
            f"{summary.num_completed} of {summary.num_requests} requests"
            f" in {summary.wall_s:.0f} s{time}"
        )
