"""Making the runs of a comparison, on targets in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from streamfill.errors import (
    ConfigError,
    FailedPreconditionError,
    StreamError,
    UnavailableError,
)
from streamfill.loadgen.cluster_target import OpenTarget
from streamfill.loadgen.compare import PlannedRun, plan_runs
from streamfill.loadgen.compare_modes import parse_modes
from streamfill.loadgen.compare_runs import make_runs
from streamfill.loadgen.environment import LoadAverage
from streamfill.loadgen.identity import compare_outputs
from streamfill.loadgen.metrics import summarise
from streamfill.loadgen.peers.errors import PeerUnavailable
from streamfill.loadgen.records import RunResult
from streamfill.loadgen.runner import RunPlan, replay
from streamfill.loadgen.targets.fake import FakeTarget, FakeTimes
from streamfill.messages.common import StreamMode
from streamfill.traces.script import Script, Step
from tests.unit.loadgen.run_builders import failed, record, result


async def open_target_of(fake: FakeTarget) -> OpenTarget:
    return OpenTarget(target=fake, facts=await fake.facts())


class Engines:
    """Starts fakes and notes what happened to them."""

    def __init__(
        self,
        missing: dict[str, Exception] | None = None,
        *,
        refusals: dict[tuple[str, str], str] | None = None,
    ) -> None:
        self.log: list[str] = []
        self._refusals = refusals or {}
        self.fakes: dict[str, FakeTarget] = {}
        self._missing = missing or {}

    @asynccontextmanager
    async def open(self, engine: str) -> AsyncIterator[OpenTarget]:
        if engine in self._missing:
            raise self._missing[engine]
        self.log.append(f"start {engine}")
        self.fakes[engine] = FakeTarget(FakeTimes(first_token_s=0.001))
        self.fakes[engine].refusals = self._refusals
        try:
            yield await open_target_of(self.fakes[engine])
        finally:
            self.log.append(f"stop {engine}")


def script(number: int, mode: StreamMode = StreamMode.APPEND) -> Script:
    pieces = [(number, 1), (2,)] if mode is StreamMode.APPEND else [(9,), (number, 1, 2)]
    steps = tuple(Step(due_s=0.005 * n, piece=piece) for n, piece in enumerate(pieces))
    return Script(
        request_id=f"q{number}",
        session_id=None,
        mode=mode,
        arrival_s=0.0,
        steps=steps,
        commit_due_s=steps[-1].due_s,
        max_output_tokens=3,
    )


async def quick(opened: OpenTarget, planned: PlannedRun) -> RunResult:
    """A run that takes no time."""
    return result(record(0), label=planned.variant.label, run=planned.run)


async def made(
    modes: str, engines: Engines, *, num_runs: int = 1
) -> tuple[list[tuple[str, int]], dict[str, str]]:
    """(label, run) of the runs that were made, and what was skipped."""
    runs: list[tuple[str, int]] = []

    def keep(each: RunResult, load: LoadAverage) -> None:
        assert load.start >= 0
        runs.append((each.label, each.run))

    skipped = await make_runs(
        plan_runs(parse_modes(modes), num_runs),
        open_engine=engines.open,
        replay=quick,
        on_result=keep,
    )
    return runs, skipped


async def test_engines_run_one_after_the_other() -> None:
    """Each engine is started once, and stopped before the next one starts."""
    engines = Engines()
    runs, skipped = await made("oneshot,vllm,stream", engines, num_runs=2)
    assert engines.log == ["start streamfill", "stop streamfill", "start vllm", "stop vllm"]
    assert sorted(runs) == sorted(
        (label, run)
        for label in ("oneshot", "stream", "vllm:oneshot", "vllm:warmup", "vllm:stream")
        for run in (0, 1)
    )
    assert skipped == {}


async def test_every_run_starts_cold() -> None:
    """The caches are emptied before each run."""
    engines = Engines()
    await made("oneshot,stream", engines, num_runs=3)
    assert engines.fakes["streamfill"].num_emptied == 6


async def test_every_run_has_its_policy() -> None:
    """It is set before each run of ours, and never on a peer."""
    engines = Engines()
    await made("oneshot,stream@lcas(order=newest),stream,vllm", engines, num_runs=2)
    assert engines.fakes["streamfill"].policies_set == [
        "default",
        "lcas(order=newest)",
        "adaptive",
        "adaptive",
        "lcas(order=newest)",
        "default",
    ]
    assert engines.fakes["vllm"].policies_set == []


async def test_a_refused_policy_stops_the_comparison() -> None:
    """With the server and its reason; runs from before count, and the engine is stopped."""
    engines = Engines(refusals={("prefill-0", "mcps"): "too old"})
    runs: list[str] = []
    with pytest.raises(FailedPreconditionError, match=r"mcps was refused: prefill-0: too old"):
        await make_runs(
            plan_runs(parse_modes("oneshot,stream@mcps,stream"), 1),
            open_engine=engines.open,
            replay=quick,
            on_result=lambda each, load: runs.append(each.label),
        )
    assert runs == ["oneshot"]
    assert engines.log[-1] == "stop streamfill"


async def test_all_modes_give_the_same_answers() -> None:
    """Replayed for real, the modes' answers are the same for each request, appended or updated."""
    engines = Engines()
    scripts = [script(0), script(1, StreamMode.UPDATE), script(2)]
    results: list[RunResult] = []

    async def really(opened: OpenTarget, planned: PlannedRun) -> RunResult:
        plan = RunPlan(
            mode=planned.variant.mode, label=planned.variant.label, run=planned.run, num_warm_up=0
        )
        return await replay(opened.target, scripts, [0.0, 0.0, 0.001], plan)

    await make_runs(
        plan_runs(parse_modes("oneshot,warmup,stream"), 2),
        open_engine=engines.open,
        replay=really,
        on_result=lambda each, load: results.append(each),
    )
    identity = compare_outputs(results)
    assert identity.is_identical
    assert identity.num_compared == 3
    for summary in map(summarise, results):
        assert summary.num_completed == 3
        assert summary.figures["ttft_last_segment_ms"].p50 > 0


@pytest.mark.parametrize("error", [PeerUnavailable("no space"), UnavailableError("gone")])
async def test_a_peer_that_is_missing_is_skipped(error: Exception) -> None:
    """The other engines run; each mode of the missing one has the reason."""
    runs, skipped = await made("vllm,oneshot", Engines({"vllm": error}))
    assert runs == [("oneshot", 0)]
    assert skipped == dict.fromkeys(("vllm:oneshot", "vllm:warmup", "vllm:stream"), str(error))


@pytest.mark.parametrize(
    ("engine", "error"),
    [("streamfill", UnavailableError("gone")), ("vllm", ConfigError("--x", 1, "wrong"))],
)
async def test_other_errors_stop_the_comparison(engine: str, error: Exception) -> None:
    """Our own engine has to work, and a wrong option is nobody's breakdown."""
    with pytest.raises(type(error)):
        await made("oneshot,vllm", Engines({engine: error}))


async def test_a_peer_that_breaks_down_keeps_its_runs() -> None:
    """Runs made before the break-down count; those that are missing are said to be."""
    engines = Engines()
    runs: list[str] = []

    async def second_breaks(opened: OpenTarget, planned: PlannedRun) -> RunResult:
        if planned.variant.label == "vllm:warmup":
            raise StreamError("it crashed")
        return await quick(opened, planned)

    skipped = await make_runs(
        plan_runs(parse_modes("vllm"), 1),
        open_engine=engines.open,
        replay=second_breaks,
        on_result=lambda each, load: runs.append(each.label),
    )
    assert runs == ["vllm:oneshot"]
    assert set(skipped) == {"vllm:warmup", "vllm:stream"}
    assert engines.log[-1] == "stop vllm"


async def test_logs_are_kept_after_failures() -> None:
    """A run with a failed request keeps the logs of its engine; one without does not."""
    opened = await open_target_of(FakeTarget())
    outcomes = [record(0), failed(0)]
    kept: list[bool] = []

    @asynccontextmanager
    async def the_same(engine: str) -> AsyncIterator[OpenTarget]:
        yield opened

    async def next_outcome(opened: OpenTarget, planned: PlannedRun) -> RunResult:
        kept.append(opened.keeps_logs)
        return result(outcomes.pop(0))

    await make_runs(
        plan_runs(parse_modes("oneshot"), 2),
        open_engine=the_same,
        replay=next_outcome,
        on_result=lambda each, load: None,
    )
    assert kept == [False, False]
    assert opened.keeps_logs


async def test_a_cancelled_comparison_stops_its_engine() -> None:
    """After a cancel the run under way is not counted, and the engine is stopped."""
    engines = Engines()
    runs: list[str] = []

    async def second_hangs(opened: OpenTarget, planned: PlannedRun) -> RunResult:
        if runs:
            hanging.set()
            await asyncio.Event().wait()
        return await quick(opened, planned)

    hanging = asyncio.Event()
    task = asyncio.create_task(
        make_runs(
            plan_runs(parse_modes("oneshot,warmup,stream"), 1),
            open_engine=engines.open,
            replay=second_hangs,
            on_result=lambda each, load: runs.append(each.label),
        )
    )
    await hanging.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert runs == ["oneshot"]
    assert engines.log == ["start streamfill", "stop streamfill"]
