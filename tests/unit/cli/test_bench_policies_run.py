"""`streamfill bench policies` on targets in this process."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from streamfill.cli import bench_compare_run, bench_policies
from streamfill.cli.bench_policies_run import BETWEEN_RUNS_S, about
from streamfill.cli.main import main
from streamfill.launcher.signals import StopRequest
from streamfill.loadgen.arrivals import make_arrivals
from streamfill.loadgen.cluster_target import OpenTarget, RunningCluster
from streamfill.loadgen.runner import replay
from streamfill.loadgen.targets.fake import FakeTarget, FakeTimes
from tests.unit.loadgen.command_builders import result_of, trace


class FakeEngines:
    """Stands for ``bench_engines.Engines``: one fake, which may get a signal at a policy."""

    def __init__(self, *, stops_at: str = "", refuses: str = "") -> None:
        self.fake = FakeTarget(FakeTimes(first_token_s=0.001))
        self.num_opened = 0
        self._stops_at = stops_at
        if refuses:
            self.fake.refusals["prefill-0", refuses] = "too old"

    def __call__(
        self,
        own: RunningCluster,
        *,
        peer_threads: int,
        stop: StopRequest,
        say: Callable[[str], None],
    ) -> FakeEngines:
        set_policy = self.fake.set_policy

        async def watched(spec: str, server_id: str | None = None) -> dict[str, str]:
            if spec == self._stops_at:
                stop.note()
            return await set_policy(spec, server_id)

        self.fake.set_policy = watched  # type: ignore[method-assign]
        return self

    @asynccontextmanager
    async def open(self, engine: str) -> AsyncIterator[OpenTarget]:
        self.num_opened += 1
        yield OpenTarget(target=self.fake, facts=await self.fake.facts())


Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The command over two traces at one load each, with a given fake."""

    def run_it(engines: FakeEngines, *words: str) -> int:
        monkeypatch.setattr(bench_policies, "Engines", engines)
        paths = ",".join(str(trace(tmp_path, name=name)) for name in ("a", "b"))
        command = ["bench", "policies", "--traces", paths, "--loads", "l", "--address", "x:1"]
        command += ["--rate", "a:l=100", "--rate", "b:l=100", "--policies", "fcfs,mcps,adaptive"]
        return main([*command, *words])

    return run_it


def test_one_cluster_for_all_cells(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """It is opened once; every repetition of a cell is made before the next cell."""
    engines = FakeEngines()
    assert run(engines, "--runs", "2") == 0
    assert engines.num_opened == 1
    once = ["default", "default", "fcfs", "mcps", "adaptive"]
    assert engines.fake.policies_set == 2 * [*once, *reversed(once)]
    assert engines.fake.num_emptied == 20
    output = capsys.readouterr().out
    assert "\n1/20 a l oneshot run 0: 4 of 4 requests" in output
    assert "\n11/20 b l oneshot run 0: 4 of 4 requests" in output
    assert re.search(r"; (less than a minute|about \d+ min) left\n2/20 ", output)
    last = next(line for line in output.splitlines() if line.startswith("20/20 "))
    assert last.endswith(" ms")


def test_all_runs_of_a_cell_meet_the_same_arrivals(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also drawn ones: the requests of each mode and repetition are as far from each other."""
    engines = FakeEngines()
    asked: list[Sequence[float]] = []

    def noting(
        target: Any, scripts: Any, starts_s: Sequence[float], *rest: Any, **more: Any
    ) -> Any:
        asked.append(starts_s)
        return replay(target, scripts, starts_s, *rest, **more)

    monkeypatch.setattr(bench_compare_run, "replay", noting)
    assert run(engines, "--arrivals", "poisson", "--runs", "2", "--seed", "3") == 0
    drawn = make_arrivals("poisson", 4, rate=100.0, seed=3)
    assert [list(starts_s) for starts_s in asked] == 20 * [drawn]


def test_a_signal_shows_what_there_is(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 130; the run under way is thrown away, finished ones have a table and figures."""
    assert run(FakeEngines(stops_at="mcps")) == 130
    output = capsys.readouterr().out
    assert "Stopped. The runs that were finished:" in output
    facts = result_of(output)
    assert facts["complete"] is False
    assert set(facts) == {"identical", "complete", "a"}
    assert "stream@fcfs" in facts["a"]["l"]
    assert "stream@mcps" not in facts["a"]["l"]
    assert facts["a"]["l"]["adaptive_to_best_other"] == {}


def test_a_signal_before_the_first_run_shows_nothing(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is nothing to show."""
    assert run(FakeEngines(stops_at="default")) == 130
    assert "RESULT" not in capsys.readouterr().out


def test_a_refused_policy_stops_with_its_reason(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was measured before it is shown."""
    assert run(FakeEngines(refuses="mcps")) == 2
    captured = capsys.readouterr()
    assert result_of(captured.out)["complete"] is False
    assert "the policy mcps was refused: prefill-0: too old" in captured.err


def test_the_estimate(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """It covers the schedule and the last prompt of each run, and what lies between runs."""
    words = ["--rate", "a:l=0.04", "--time-scale", "0.001", "--limit", "2"]
    assert run(FakeEngines(stops_at="default"), *words) == 130
    schedule_s = 25 + 2 * BETWEEN_RUNS_S  # a: two requests 25 s apart; b: at once
    assert f"10 runs, about {round(5 * schedule_s / 60)} min where" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "less than a minute"),
        (29, "less than a minute"),
        (31, "about 1 min"),
        (59.6 * 60, "about 1 h 0 min"),
        (7500, "about 2 h 5 min"),
    ],
)
def test_durations(duration_s: float, text: str) -> None:
    """Minutes, and hours where there are any."""
    assert about(duration_s) == text
