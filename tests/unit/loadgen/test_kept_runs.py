"""Runs of an earlier call that need not be made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamfill.errors import ConfigError
from streamfill.loadgen.compare import PlannedRun
from streamfill.loadgen.compare_modes import parse_modes
from streamfill.loadgen.environment import Environment, LoadAverage
from streamfill.loadgen.kept_runs import KeptRuns, read_kept_runs
from streamfill.loadgen.metrics import summarise
from streamfill.loadgen.run_file import RunFile, SavedRun
from tests.unit.loadgen.run_builders import record, result

CONFIG = {
    "request_rate": 0.5,
    "load": "light",
    "cluster": {"name": "bench-1", "prefill": {"count": 1}},
}


def saved(
    label: str = "stream@fcfs", policy: str = "fcfs", run: int = 0, **config: Any
) -> SavedRun:
    return SavedRun(
        result=result(record(0), label=label, policy=policy, run=run),
        environment=Environment(
            cpu="c", num_cores=2, memory_bytes=1, platform="p", versions={}, trace_digest="d"
        ),
        load=LoadAverage(start=0.0, end=0.0),
        config={**CONFIG, **config},
    )


def planned(mode: str = "stream@fcfs", run: int = 0) -> PlannedRun:
    (variant,) = parse_modes(mode)
    return PlannedRun(variant=variant, run=run)


def found(each: SavedRun, wanted: PlannedRun | None = None, digest: str = "d") -> bool:
    kept = KeptRuns([each])
    return kept.find(wanted or planned(), config=CONFIG, trace_digest=digest) is each


def test_the_same_run_is_found_whatever_the_cluster_was_called() -> None:
    """A cluster for a measurement has the number of a process in its name."""
    assert found(saved())
    assert found(saved(cluster={"name": "bench-2", "prefill": {"count": 1}}))


@pytest.mark.parametrize(
    "each",
    [
        saved(label="stream@mcps"),
        saved(policy="lcas"),
        saved(run=1),
        saved(request_rate=0.6),
        saved(load="heavy"),
        saved(seed=1),
        saved(cluster={"name": "bench-1", "prefill": {"count": 2}}),
    ],
)
def test_another_run_is_not(each: SavedRun) -> None:
    """Mode, policy, repetition, options and cluster all count."""
    assert not found(each)


def test_another_trace_of_the_same_name_is_not() -> None:
    """What is in the file counts."""
    assert not found(saved(), digest="e")


def test_the_newest_one_is_taken() -> None:
    """A run that was made twice was made again for a reason."""
    first, second = saved(), saved()
    kept = KeptRuns([first, second])
    assert kept.find(planned(), config=CONFIG, trace_digest="d") is second


def test_reading_a_file(tmp_path: Path) -> None:
    """What was saved is found; no file and an empty one hold nothing; figures alone are refused."""
    path = tmp_path / "runs.jsonl"
    assert read_kept_runs(path).find(planned(), config=CONFIG, trace_digest="d") is None
    file = RunFile(path, saves_records=True)
    assert read_kept_runs(path).find(planned(), config=CONFIG, trace_digest="d") is None
    file.add(saved(), summarise(saved().result))
    assert read_kept_runs(path).find(planned(), config=CONFIG, trace_digest="d") == saved()
    figures = tmp_path / "figures.jsonl"
    RunFile(figures, saves_records=False).add(saved(), summarise(saved().result))
    with pytest.raises(ConfigError, match="records"):
        read_kept_runs(figures)
